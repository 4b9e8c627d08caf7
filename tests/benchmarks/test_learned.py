"""Rules that learn beside FusionBench's parts, interleaved in one run; times are printed, values are asserted.

Run with ``python -m pytest tests/benchmarks/test_learned.py -s`` where fusion_bench is installed. Two threads; four
vectors and four tasks of a vision transformer with RMTLLMF_BENCH_BLOCKS (2) blocks and RMTLLMF_BENCH_WIDTH (768, that
of ViT-B/16) features; medians of RMTLLMF_BENCH_REPETITIONS (3).
"""

import os
from copy import deepcopy

import pytest
import torch
from open_clip.transformer import VisionTransformer

from helpers.timing import interleaved
from rmtllmf._random import generator
from rmtllmf.taskvec import TaskVector, adamerging_coefficients, concrete_mask, frank_wolfe

pytestmark = pytest.mark.usefixtures("two_threads")

BLOCKS = int(os.environ.get("RMTLLMF_BENCH_BLOCKS", 2))
WIDTH = int(os.environ.get("RMTLLMF_BENCH_WIDTH", 768))
REPETITIONS = int(os.environ.get("RMTLLMF_BENCH_REPETITIONS", 3))
COUNT, STEPS = 4, 3
REAL_RAND = torch.rand


def world():
    """A model, its fine-tuned copies and tasks: images of 32 x 32 pixels, 16 a batch, of ten classes."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, WIDTH, BLOCKS, 4, 4.0, output_dim=512).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True).data.add_(torch.randn_like(parameter), alpha=0.01)  # no tensor without direction
    tuned = [deepcopy(model) for _ in range(COUNT)]
    for copy in tuned:
        for parameter in copy.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    heads = [torch.nn.Linear(512, 10).requires_grad_(False) for _ in range(COUNT)]
    for head in heads:
        head.weight.mul_(10)  # far from the largest entropy, where slopes would be those of rounding
    batches = [[(torch.randn(16, 3, 32, 32), torch.arange(16) % 10) for _ in range(STEPS)] for _ in range(COUNT)]
    tasks = {str(i): task for i, task in enumerate(zip(heads, batches, strict=True))}
    return model, tuned, [TaskVector.between(model, copy) for copy in tuned], tasks


def report(name, ours, theirs, apart):
    print(
        f"\n{name}, {BLOCKS} blocks of {WIDTH}, {STEPS} steps: {ours:.2f} s, FusionBench {theirs:.2f} s: "
        f"{theirs / ours:.2f} times as long; apart by {apart:.1e} at most"
    )


def test_adamerging():
    wrappers = pytest.importorskip("fusion_bench.models.wrappers.layer_wise_fusion")
    entropy = pytest.importorskip("fusion_bench.method.adamerging.entropy_loss").entropy_loss
    model, tuned, vectors, tasks = world()
    found = {}

    def ours():
        found["ours"] = adamerging_coefficients(vectors, model, tasks, steps=STEPS, bounds=None)

    layers = len(list(model.parameters()))
    merged = wrappers.LayerWiseMergedModel(
        wrappers.get_layer_wise_weights(COUNT, layers, 0.3), deepcopy(model), tuned, clamp_weights=False
    )

    def theirs():
        """The loop of `LayerWiseAdaMergingAlgorithm.test_time_adaptation`."""
        merged.merge_weight.data.fill_(0.3)
        adam = torch.optim.Adam([merged.merge_weight], lr=1e-3)
        merged.merge_weights()
        for step in range(STEPS):
            for head, batches in tasks.values():
                entropy(head(merged(batches[step][0]))).backward(retain_graph=True)
            adam.step()
            adam.zero_grad()
            merged.merge_weights()
        found["theirs"] = merged.merge_weight.detach().clone()

    seconds = interleaved(ours, theirs, repetitions=REPETITIONS)
    names = [name for name, _ in model.named_parameters()]
    apart = max(
        abs(float(found["theirs"][q, index]) - found["ours"].weights[name][q])
        for index, name in enumerate(names)
        for q in range(COUNT)
    )
    report("AdaMerging, layer-wise", *seconds, apart)
    assert apart < 1e-5


@pytest.mark.parametrize("by", ["task", "layer"])
def test_frank_wolfe(by):
    """`FrankWolfeHardAlgorithm.run` from the base model on: all samples at once, where it takes one at a time."""
    peer = pytest.importorskip("fusion_bench.method.fw_merging.fw_hard")
    model, tuned, vectors, tasks = world()
    found = {}

    def ours():
        options = {"by": by, "steps": STEPS, "oracle": "cosine", "step_size": 0.5, "start": 0.0}
        found["ours"] = frank_wolfe(vectors, model, tasks, **options)

    def theirs():
        select = peer.FrankWolfeHardAlgorithm.frank_wolfe_selection
        merged, pool = deepcopy(model), {str(q): copy for q, copy in enumerate(tuned)}
        pool["initial"] = deepcopy(model)
        for step in range(STEPS):
            for head, batches in tasks.values():
                for X, y in batches:
                    (torch.nn.functional.cross_entropy(head(merged(X)), y) / (STEPS * COUNT)).backward()
            gradients = {name: parameter.grad.clone() for name, parameter in merged.named_parameters()}
            none = [] if by == "task" else {name: [] for name in gradients}
            chosen = select(None, gradients, pool, model_to_merge_names=none, type=by)[0]
            for name, parameter in merged.named_parameters():  # their task_arithmetic_merge raises a TypeError here
                parameter.data.add_(chosen[name] - parameter.data, alpha=2 / (step + 2) * 0.5)
            merged.zero_grad()
        found["theirs"] = TaskVector.between(model, merged)

    seconds = interleaved(ours, theirs, repetitions=REPETITIONS)
    apart = max(float((found["ours"][name] - found["theirs"][name]).abs().max()) for name in vectors[0])
    report(f"Frank-Wolfe, {by}-wise", *seconds, apart)
    assert apart < 1e-5


def test_concrete(monkeypatch):
    """The loop of `ConcreteTaskArithmeticAlgorithmForCLIP.train_mask`, with the same random numbers."""
    masks = pytest.importorskip("fusion_bench.models.masks")
    wrappers = pytest.importorskip("fusion_bench.models.wrappers.task_wise_fusion")
    entropy = pytest.importorskip("fusion_bench.method.adamerging.entropy_loss").entropy_loss
    model, tuned, vectors, tasks = world()
    names = [name for name, _ in model.named_parameters()]
    found = {}

    def ours():
        found["ours"] = concrete_mask(vectors, model, tasks, seed=0, scale=0.3, steps=STEPS, lr=0.1)

    module = wrappers.TaskWiseMergedModel(
        wrappers.get_task_wise_weights(COUNT, 0.3), deepcopy(model), tuned, clamp_weights=False
    )
    module.requires_grad_(False)

    def drawn(step):
        for name in names:
            source = generator(0, "concrete", step, name)
            yield REAL_RAND(dict(model.named_parameters())[name].shape, generator=source)

    def theirs():
        mask_model = masks.MaskModel(model, parameter_type="logits")
        mask_model.fill_(0.0)
        adam = torch.optim.Adam(mask_model.parameters(), lr=0.1)
        for step in range(STEPS + 1):
            numbers = drawn(step)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "rand", lambda shape, **_: next(numbers))  # noqa: B023 (used before the next turn)
                mask = mask_model.sample_mask(mask_type="continuous", temperature=0.5)
            mask = {name: m / torch.mean(m) for name, m in mask.items()}
            if step == STEPS:
                break
            module.merge_weights(task_vector_mask=mask)
            sum(entropy(head(module(batches[step][0]))) for head, batches in tasks.values()).backward()
            adam.step()
            adam.zero_grad()
        found["theirs"] = {name: m.detach() for name, m in mask.items()}

    seconds = interleaved(ours, theirs, repetitions=REPETITIONS)
    close = [(found["ours"].mask[name] - found["theirs"][name]).abs() < 1e-3 for name in names]
    share = sum(int(c.sum()) for c in close) / sum(c.numel() for c in close)
    report("Concrete mask", *seconds, 1 - share)
    assert share > 0.99  # the others' slopes are those of rounding, which Adam's first steps blow up to +-lr
