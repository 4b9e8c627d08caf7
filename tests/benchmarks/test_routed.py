"""SMILE beside FusionBench's, interleaved in one run; ratios are printed, values are asserted.

Run with ``python -m pytest tests/benchmarks/test_routed.py -s`` where fusion_bench is installed. Two threads; eight
tasks, the linear layers of one block of a vision transformer of RMTLLMF_BENCH_WIDTH (256), 4 images of 197 tokens.
"""

import copy
import os
import time

import pytest
import torch
from torch import nn

from helpers.timing import interleaved
from rmtllmf.taskvec import smile

pytestmark = pytest.mark.usefixtures("two_threads")

WIDTH = int(os.environ.get("RMTLLMF_BENCH_WIDTH", 256))
SHAPES = [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]


@pytest.mark.parametrize("top_k", [1, 2])
def test_smile(top_k):
    peer = pytest.importorskip("fusion_bench.models.smile_moe.linear_from_module").SmileMoELinear
    source = torch.Generator().manual_seed(0)
    base = nn.ModuleList(nn.Linear(n, m) for m, n in SHAPES).requires_grad_(False)
    vectors = [
        {key: 0.02 * torch.randn(value.shape, generator=source) for key, value in base.state_dict().items()}
        for _ in range(8)
    ]
    tuned = [copy.deepcopy(base) for _ in vectors]
    for model, vector in zip(tuned, vectors, strict=True):
        model.load_state_dict({key: value + vector[key] for key, value in base.state_dict().items()})

    start = time.perf_counter()
    ours = smile(base, vectors, rank=32, gate_rank=16, top_k=top_k)
    made, start = time.perf_counter() - start, time.perf_counter()
    theirs = nn.ModuleList(
        peer(copy.deepcopy(layer), [model[index] for model in tuned], gate_k=16, k=32, top_k=top_k)
        for index, layer in enumerate(base)
    )
    their_made = time.perf_counter() - start

    inputs = [torch.randn(4, 197, layer.in_features, generator=source) for layer in base]
    with torch.no_grad():
        run = [lambda model=model: [f(x) for f, x in zip(model, inputs, strict=True)] for model in (ours, theirs, base)]
        apart = max(float((a - b).abs().max()) for a, b in zip(run[0](), run[1](), strict=True))
        seconds = interleaved(*run)
    made, seconds = their_made / made, [time / seconds[0] for time in seconds]
    print(
        f"\nSMILE of width {WIDTH}, top {top_k}: FusionBench takes {made:.1f} times as long to make it and "
        f"{seconds[1]:.2f} times as long to run it, the base model {seconds[2]:.2f} times; apart by {apart:.1e}"
    )
    assert apart < 2e-3
