"""Speed and memory of the fusion engine beside its peers in one run; figures are printed, only values are asserted.

Run with ``python -m pytest tests/benchmarks/test_fusion.py -s``, with the extra ``peers`` installed to see the peers.
Eight visual towers of ViT-B/16 (8 x 86 M float32), as many threads as torch uses; medians of interleaved repetitions.
``RMTLLMF_BENCH_BLOCKS`` (12) and ``RMTLLMF_BENCH_PARAMETERS`` (0.67e9) make it smaller.
"""

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.timing import interleaved
from rmtllmf.taskvec import TaskVector, fuse, task_arithmetic

BLOCKS = int(os.environ.get("RMTLLMF_BENCH_BLOCKS", 12))
PARAMETERS = float(os.environ.get("RMTLLMF_BENCH_PARAMETERS", 0.67e9))
ROOT = Path(__file__).parents[2]


def vit_b_16(blocks):
    """Names and shapes of the visual tower of ViT-B/16."""
    d = 768
    shapes = {"conv1.weight": (d, 3, 16, 16), "class_embedding": (d,), "positional_embedding": (197, d)}
    shapes |= {"proj": (d, 512), **{f"{part}.{kind}": (d,) for part in ("pre", "post") for kind in ("weight", "bias")}}
    for i in range(blocks):
        name = f"resblocks.{i}."
        shapes |= {name + f"ln_{k}.{kind}": (d,) for k in (1, 2) for kind in ("weight", "bias")}
        shapes |= {name + "attn.in_proj_weight": (3 * d, d), name + "attn.in_proj_bias": (3 * d,)}
        shapes |= {name + "attn.out_proj.weight": (d, d), name + "attn.out_proj.bias": (d,)}
        shapes |= {name + "mlp.c_fc.weight": (4 * d, d), name + "mlp.c_fc.bias": (4 * d,)}
        shapes |= {name + "mlp.c_proj.weight": (d, 4 * d), name + "mlp.c_proj.bias": (d,)}
    return shapes


def towers(count):
    source = torch.Generator().manual_seed(0)
    shapes = vit_b_16(BLOCKS)
    return [{k: 0.01 * torch.randn(shape, generator=source) for k, shape in shapes.items()} for _ in range(count)]


def test_task_arithmetic():
    base, *vectors = towers(9)
    entries = sum(tensor.numel() for tensor in base.values())
    out = {key: torch.empty_like(tensor) for key, tensor in base.items()}
    update = {key: torch.empty_like(tensor) for key, tensor in base.items()}
    plain = {key: torch.empty_like(tensor) for key, tensor in base.items()}
    given = [dict(vector) for vector in vectors]
    taskvectors = [TaskVector(vector) for vector in vectors]

    def bare(target):
        for tensor, start in zip(target.values(), base.values(), strict=True):
            tensor.copy_(start)
        for vector in given:
            torch._foreach_add_(list(target.values()), list(vector.values()), alpha=0.3)

    def bare_fresh():
        bare({key: torch.empty_like(tensor) for key, tensor in base.items()})

    def read():
        for state in (base, *given):
            for tensor in state.values():
                tensor.sum()

    model, fresh, alone, loop, loop_fresh, reading = interleaved(
        lambda: fuse(base, taskvectors, scale=0.3, out=out),
        lambda: fuse(base, taskvectors, scale=0.3),
        lambda: task_arithmetic(given, 0.3, out=update),
        lambda: bare(plain),
        bare_fresh,
        read,
    )
    for key, tensor in plain.items():
        torch.testing.assert_close(out[key], tensor, rtol=1e-5, atol=1e-6)
    print(
        f"\ntask arithmetic, base and 8 x {entries:,} entries, into out: {model:.3f} s, {model / reading:.2f} times "
        f"reading the nine inputs, {model / loop:.2f} times a bare _foreach_add_ loop; into fresh memory {fresh:.3f} "
        f"s, {fresh / loop_fresh:.2f} times the loop into it; the update alone {alone / reading:.2f} times reading"
    )


def test_import():
    code = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import rmtllmf.taskvec; "
    code += "print(b - a, time.perf_counter() - b)"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
        for _ in range(5)
    ]
    torch_seconds, ours = (statistics.median(float(run[i]) for run in runs) for i in (0, 1))
    print(f"\nimport torch {torch_seconds:.2f} s, import rmtllmf.taskvec {ours:.3f} s more")


MEMORY = """
import sys, json, torch
from functools import partial
from rmtllmf import taskvec
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
shapes, name = json.loads(sys.argv[1]), sys.argv[2]
options = {"dare": {"seed": 0}, "multi_krum": {"hostile": 1}}.get(name, {})
source = torch.Generator().manual_seed(0)
vectors = [{k: torch.randn(s, generator=source).mul_(0.01) for k, s in shapes.items()} for _ in range(8)]
out = {k: torch.zeros(s) for k, s in shapes.items()}
small = [{"w": torch.randn(70, 60, generator=source)} for _ in range(8)]
getattr(taskvec, name)(small, **options)  # what libraries load on first use
before = peak()
getattr(taskvec, name)(vectors, out=out, **options)
print(1024 * (peak() - before))
"""

RULES = ("task_arithmetic", "ties", "dare", "consensus", "coordinate_median", "trimmed_mean", "geometric_median")
RULES += ("norm_clipping", "multi_krum", "iso_c", "tsv")


def test_memory_of_every_rule():
    shapes = vit_b_16(min(BLOCKS, 4))
    largest = max(torch.Size(shape).numel() for shape in shapes.values()) * 4
    print(
        f"\nmemory beyond eight vectors and the result, {torch.get_num_threads()} threads; largest tensor {largest:,} B"
    )
    for rule in RULES:
        _, output = process(sys.executable, "-c", MEMORY, json.dumps(shapes), rule)
        print(f"  {rule:20s} {int(output) / 1e6:5.0f} MB, {int(output) / largest:4.1f} times the largest tensor")


OURS = """
import sys, torch
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
from rmtllmf.taskvec import fuse_files
folder = sys.argv[1]
fuse_files(f"{folder}/base.safetensors", [f"{folder}/{i}.safetensors" for i in range(8)], f"{folder}/ours.safetensors",
           scale=0.3)
print(1024 * (peak() - before))
"""

SD_MECHA = """
import sys, torch, sd_mecha
from pathlib import Path
from sd_mecha.extensions.builtin.merge_methods.linear import add_difference, subtract
base, *models = (sd_mecha.model(Path(sys.argv[1]) / f"{name}.safetensors") for name in ("base", *range(8)))
recipe = base
for model in models:
    recipe = add_difference(recipe, subtract(model, base), alpha=0.3)
sd_mecha.merge(recipe, output=Path(sys.argv[1]) / "mecha.safetensors", merge_dtype=torch.float32,
               output_dtype=torch.bfloat16)
"""


def llama_like(parameters):
    d, f, vocabulary = 1536, 4096, 32000
    layer = {f"self_attn.{k}_proj.weight": (d, d) for k in "qkvo"}
    layer |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
    layer |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    size = sum(torch.Size(shape).numel() for shape in layer.values())
    layers = max(1, round((parameters - 2 * vocabulary * d) / size))
    shapes = {
        "model.embed_tokens.weight": (vocabulary, d),
        "lm_head.weight": (vocabulary, d),
        "model.norm.weight": (d,),
    }
    return shapes | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A base and eight models in bf16."""
    folder = tmp_path_factory.mktemp("checkpoints")
    source = torch.Generator().manual_seed(0)
    shapes = llama_like(PARAMETERS)
    base = {k: (0.02 * torch.randn(s, generator=source)).bfloat16() for k, s in shapes.items()}
    save_file(base, folder / "base.safetensors", {"format": "pt"})
    for i in range(8):
        tuned = {k: (t.float() + 0.002 * torch.randn(t.shape, generator=source)).bfloat16() for k, t in base.items()}
        save_file(tuned, folder / f"{i}.safetensors", {"format": "pt"})
    os.sync()  # who makes sure that a result is on disk must not wait for the inputs too
    yield folder
    shutil.rmtree(folder)


def process(*command):
    """Seconds and peak resident bytes of a whole process, and its output."""
    start = time.perf_counter()
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    output, errors = run.communicate()
    assert run.returncode == 0, errors[-2000:]
    return time.perf_counter() - start, output


def test_fuse_files(checkpoints):
    entries = sum(torch.Size(shape).numel() for shape in llama_like(PARAMETERS).values())
    command = [sys.executable, "-c", OURS, str(checkpoints)]
    runs = [process(*command) for _ in range(3)]
    seconds = statistics.median(run[0] for run in runs)
    above = int(runs[-1][1])
    print(
        f"\nfuse_files, base and eight of {entries / 1e9:.2f} B parameters in bf16: {seconds:.1f} s the whole process "
        f"({', '.join(f'{run[0]:.1f}' for run in runs)}), {above / 1e6:.0f} MB above importing torch"
    )
    if importlib.util.find_spec("mergekit") is not None:
        config = checkpoints / "mergekit.yml"
        models = "".join(
            f"  - model: {checkpoints}/{i}.safetensors\n    parameters:\n      weight: 0.3\n" for i in range(8)
        )
        config.write_text(
            f"merge_method: task_arithmetic\nbase_model: {checkpoints}/base.safetensors\nmodels:\n{models}"
            "parameters:\n  normalize: false\ndtype: float32\nout_dtype: bfloat16\n"
        )
        tool = str(Path(sys.executable).with_name("mergekit-pytorch"))
        peer, _ = process(tool, str(config), str(checkpoints / "mergekit"))
        merged = {k: v for file in (checkpoints / "mergekit").glob("*.safetensors") for k, v in load_file(file).items()}
        _compare(load_file(checkpoints / "ours.safetensors"), merged)
        print(f"mergekit-pytorch: {peer:.1f} s, {peer / seconds:.1f} times as long")
    if importlib.util.find_spec("sd_mecha") is not None:
        peer, _ = process(sys.executable, "-c", SD_MECHA, str(checkpoints))
        _compare(load_file(checkpoints / "ours.safetensors"), load_file(checkpoints / "mecha.safetensors"))
        print(f"sd-mecha: {peer:.1f} s, {peer / seconds:.1f} times as long")


def _compare(ours, theirs):
    """Equal but for the last bit of bf16."""
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor.float(), theirs[key].float(), rtol=2**-7, atol=1e-4)
