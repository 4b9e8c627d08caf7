"""Iso-CTS, WUDI, OPCM and DOGE beside FusionBench's, interleaved in one run; figures are printed, values asserted.

Run with ``python -m pytest tests/benchmarks/test_subspaces.py -s`` where fusion_bench is installed. Two threads; four
tasks' matrices of one block of ViT-B/16, over RMTLLMF_BENCH_SHRINK (4; 1 for the real size) in either direction.
"""

import contextlib
import io
import os
from functools import partial

import pytest
import torch

from helpers import fusion_bench_peer
from helpers.timing import interleaved
from rmtllmf.taskvec import doge, iso_cts, opcm, wudi

pytestmark = pytest.mark.usefixtures("two_threads")

SHRINK = int(os.environ.get("RMTLLMF_BENCH_SHRINK", 4))


def towers(count=4, size=2e-3):
    shapes = {"in": (2304, 768), "out": (768, 768), "fc": (3072, 768), "proj": (768, 3072)}
    source = torch.Generator().manual_seed(0)
    return [
        {key: size * torch.randn(m // SHRINK, n // SHRINK, generator=source) for key, (m, n) in shapes.items()}
        for _ in range(count)
    ]


def compare(name, ours, theirs, tolerance, repetitions=2):
    vectors, kept = towers(), {}

    def run(label, rule):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            kept[label] = rule(vectors)

    seconds = interleaved(partial(run, "ours", ours), partial(run, "theirs", theirs), repetitions=repetitions)
    apart = max(
        float((kept["ours"][key] - theirs.detach()).norm() / theirs.detach().norm())
        for key, theirs in kept["theirs"].items()
    )
    print(
        f"\n{name}: {seconds[0]:.2f} s, FusionBench {seconds[1]:.2f} s, {seconds[1] / seconds[0]:.1f} times as long; "
        f"apart by {apart:.1e} at most"
    )
    assert apart < tolerance


def test_iso_cts():
    peer = pytest.importorskip("fusion_bench.method.isotropic_merging.iso_utils")
    compare("Iso-CTS", iso_cts, lambda vectors: peer.iso_cts(vectors, 0.8, accelerator="cpu"), 1e-3)


def test_opcm():
    compare("OPCM", opcm, lambda vectors: fusion_bench_peer.opcm(vectors, 0.5), 1e-3)


def test_wudi():
    peer = pytest.importorskip("fusion_bench.method.wudi")
    merge = partial(peer.wudi_merging, accelerator="cpu", iter_num=20)
    compare("WUDI, 20 steps", partial(wudi, steps=20), merge, 1e-4)
    vectors = towers()
    (seconds,) = interleaved(lambda: wudi(vectors), repetitions=2)
    print(f"WUDI, the minimum: {seconds:.2f} s")


def test_doge():
    theirs = partial(fusion_bench_peer.doge, scale=0.07, density=0.3, subspace=6, steps=20)
    compare("DOGE, 20 steps", partial(doge, steps=20), theirs, 1e-2)
