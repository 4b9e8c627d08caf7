"""Speed and memory of TIES and DARE beside PEFT and FusionBench, in one run; figures are printed, nothing is asserted.

Run with ``python -m pytest tests/benchmarks/test_ties.py -s``, in an environment that has the peers. Two threads;
medians of interleaved repetitions. Eight vectors with the shapes of ViT-B/16's visual tower: RMTLLMF_BENCH_LAYERS of
its 12 layers, by default all of them beside PEFT, and 4 beside FusionBench, which takes 24 GB for 12.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rmtllmf.taskvec import dare, task_arithmetic, ties

pytestmark = pytest.mark.usefixtures("two_threads")

REPETITIONS = int(os.environ.get("RMTLLMF_BENCH_REPETITIONS", 5))


def layers(default):
    return int(os.environ.get("RMTLLMF_BENCH_LAYERS", default))


def vit(count, users=8):
    shapes = {"conv1": (768, 3, 16, 16), "class": (768,), "positional": (197, 768), "proj": (768, 512)}
    shapes |= {f"ln_{place}.{kind}": (768,) for place in ("pre", "post") for kind in ("weight", "bias")}
    for index in range(count):
        for name, shape in {
            "in_proj": (2304, 768),
            "out_proj": (768, 768),
            "c_fc": (3072, 768),
            "c_proj": (768, 3072),
        }.items():
            shapes |= {f"blocks.{index}.{name}.weight": shape, f"blocks.{index}.{name}.bias": shape[:1]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"blocks.{index}.{name}.{kind}": (768,) for kind in ("weight", "bias")}
    draw = torch.Generator().manual_seed(0)
    return [{key: torch.randn(shape, generator=draw) for key, shape in shapes.items()} for _ in range(users)]


def interleaved(*functions, repetitions=REPETITIONS):
    """Seconds of each, run in turn, so that all of them see the same machine."""
    seconds = [[] for _ in functions]
    functions[0]()
    for _ in range(repetitions):
        for times, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return seconds


def report(what, ours, theirs):
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(
        f"\n{what}: {statistics.median(ours):.2f} s against {statistics.median(theirs):.2f} s, "
        f"{statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})"
    )


def different(ours, theirs):
    """How many entries differ by more than rounding."""
    return int((~torch.isclose(ours, theirs, rtol=1e-5, atol=1e-8)).sum())


def test_by_tensor_beside_peft():
    peft = pytest.importorskip("peft.utils.merge_utils")
    vectors = vit(layers(12))
    keys, weights = list(vectors[0]), torch.ones(8)
    out = {key: torch.zeros_like(tensor) for key, tensor in vectors[0].items()}
    theirs = {}

    def ours():
        ties(vectors, 0.2, trim="tensor", out=out)

    def other():
        for key in keys:
            theirs[key] = peft.ties([vector[key] for vector in vectors], weights, 0.2)

    report("TIES by tensor, PEFT", *interleaved(ours, other, repetitions=max(1, REPETITIONS // 2)))
    total = sum(tensor.numel() for tensor in out.values())
    print(f"{sum(different(out[key], theirs[key]) for key in keys)} of {total:,} entries differ")


def test_global_beside_fusion_bench():
    utils = pytest.importorskip("fusion_bench.method.ties_merging.ties_merging_utils")
    vectors = vit(layers(4))
    keys = sorted(vectors[0])
    out = {key: torch.zeros_like(tensor) for key, tensor in vectors[0].items()}
    stacked = torch.stack([torch.cat([vector[key].reshape(-1) for key in keys]) for vector in vectors])
    for how in ("sum", "mean"):
        found = {}

        def ours(how=how):
            ties(vectors, 0.2, combine=how, undecided="majority", out=out)

        def paper(how=how):
            ties(vectors, 0.2, combine=how, out=out)

        def other(how=how, found=found):
            with contextlib.redirect_stdout(io.StringIO()):
                found["theirs"] = utils.ties_merging(stacked, reset_thresh=0.2, merge_func=how)

        times, majority, theirs = interleaved(paper, ours, other, repetitions=max(1, REPETITIONS // 2))
        size = f"8 x {stacked.shape[1]:,}"
        report(f"TIES global, {how}, {size}, FusionBench", times, theirs)
        report("the same with its majority signs", majority, theirs)
        left = torch.cat([out[key].reshape(-1) for key in keys])
        print(f"{different(left, found['theirs'])} of {stacked.shape[1]:,} entries differ (it keeps 8 more)")


def test_dare_beside_its_rules():
    vectors = vit(layers(12))
    out = {key: torch.zeros_like(tensor) for key, tensor in vectors[0].items()}
    functions = [
        lambda: task_arithmetic(vectors, out=out),
        lambda: dare(vectors, seed=0, out=out),
        lambda: dare(vectors, seed=0, rule=ties, density=1.0, out=out),
        lambda: dare(vectors, seed=0, rule=ties, out=out),
    ]
    names = ["task arithmetic", "DARE", "DARE with TIES, not trimmed", "DARE with TIES"]
    for name, times in zip(names, interleaved(*functions, repetitions=max(1, REPETITIONS // 2)), strict=True):
        print(f"\n{name}: {statistics.median(times):.2f} s")


MEMORY = """
import json, torch
from test_ties import vit
from rmtllmf.taskvec import dare, ties

def kilobytes(what):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(what)).split()[1])

torch.set_num_threads(2)
vectors = vit({layers})
out = {{key: torch.zeros_like(tensor) for key, tensor in vectors[0].items()}}
before = kilobytes("VmRSS")
{call}
print(json.dumps((kilobytes("VmHWM") - before) * 1024))
"""

CALLS = {
    "TIES by tensor": "ties(vectors, trim='tensor', out=out)",
    "TIES global": "ties(vectors, out=out)",
    "TIES global with majority signs": "ties(vectors, undecided='majority', out=out)",
    "DARE": "dare(vectors, seed=0, out=out)",
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory(name):
    script = MEMORY.format(layers=layers(12), call=CALLS[name])
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    print(f"\n{name}: {json.loads(run.stdout) / 1e6:.0f} MB beyond the vectors and the result")
