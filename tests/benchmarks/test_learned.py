"""Rules that learn beside FusionBench's parts, interleaved in one run; times are printed, values are asserted.

Run with ``python -m pytest tests/benchmarks/test_learned.py -s`` where fusion_bench is installed. Two threads; four
vectors and four tasks of a vision transformer with RMTLLMF_BENCH_BLOCKS (2) blocks of ViT-B/16's width.
"""

import os
from copy import deepcopy

import pytest
import torch
from open_clip.transformer import VisionTransformer

from helpers.timing import interleaved
from rmtllmf.taskvec import TaskVector, adamerging_coefficients

pytestmark = pytest.mark.usefixtures("two_threads")

BLOCKS = int(os.environ.get("RMTLLMF_BENCH_BLOCKS", 2))
COUNT, STEPS = 4, 3


def world():
    """A model, its fine-tuned copies and tasks: images of 32 x 32 pixels, 16 a batch, of ten classes."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, 768, BLOCKS, 12, 4.0, output_dim=512).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tuned = [deepcopy(model) for _ in range(COUNT)]
    for copy in tuned:
        for parameter in copy.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    heads = [torch.nn.Linear(512, 10).requires_grad_(False) for _ in range(COUNT)]
    batches = [[(torch.randn(16, 3, 32, 32), torch.arange(16) % 10) for _ in range(STEPS)] for _ in range(COUNT)]
    tasks = {str(i): task for i, task in enumerate(zip(heads, batches, strict=True))}
    return model, tuned, [TaskVector.between(model, copy) for copy in tuned], tasks


def report(name, ours, theirs, apart):
    print(
        f"\n{name}, {BLOCKS} blocks, {STEPS} steps: {ours:.2f} s, FusionBench {theirs:.2f} s: "
        f"{theirs / ours:.2f} times as long; apart by {apart:.1e} at most"
    )


def test_adamerging():
    wrappers = pytest.importorskip("fusion_bench.models.wrappers.layer_wise_fusion")
    entropy = pytest.importorskip("fusion_bench.method.adamerging.entropy_loss").entropy_loss
    model, tuned, vectors, tasks = world()
    found = {}

    def ours():
        found["ours"] = adamerging_coefficients(vectors, model, tasks, steps=STEPS, bounds=None)

    def theirs():
        """The loop of `LayerWiseAdaMergingAlgorithm.test_time_adaptation`."""
        layers = len(list(model.parameters()))
        merged = wrappers.LayerWiseMergedModel(
            wrappers.get_layer_wise_weights(COUNT, layers, 0.3),
            deepcopy(model),
            [deepcopy(copy) for copy in tuned],
            clamp_weights=False,
        )
        adam = torch.optim.Adam([merged.merge_weight], lr=1e-3)
        merged.merge_weights()
        for step in range(STEPS):
            for head, batches in tasks.values():
                entropy(head(merged(batches[step][0]))).backward(retain_graph=True)
            adam.step()
            adam.zero_grad()
            merged.merge_weights()
        found["theirs"] = merged.merge_weight.detach()

    seconds = interleaved(ours, theirs, repetitions=3)
    names = [name for name, _ in model.named_parameters()]
    apart = max(
        abs(float(found["theirs"][q, index]) - found["ours"].weights[name][q])
        for index, name in enumerate(names)
        for q in range(COUNT)
    )
    report("AdaMerging, layer-wise", *seconds, apart)
    assert apart < 1e-5
