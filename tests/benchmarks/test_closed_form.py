"""Fisher, RegMean and RegMean++ beside FusionBench's, LED-Merging beside its definition by sorting; interleaved.

Run with ``python -m pytest tests/benchmarks/test_closed_form.py -s`` where fusion_bench is installed. Two threads;
RMTLLMF_BENCH_TASKS (4) towers of ViT-B/16's matrices, of which RMTLLMF_BENCH_BLOCKS (1; the model has 12) blocks are
taken and RMTLLMF_BENCH_REPETITIONS (3) medians made; for RegMean++ three whole layers of RMTLLMF_BENCH_WIDTH (384).
Ratios are printed; values are asserted.
"""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import statistics_definitions as definitions
from helpers.timing import interleaved
from rmtllmf.taskvec import fisher, input_grams, led_merging, regmean, regmean_plus_plus

pytestmark = pytest.mark.usefixtures("two_threads")

TASKS = int(os.environ.get("RMTLLMF_BENCH_TASKS", 4))
BLOCKS = int(os.environ.get("RMTLLMF_BENCH_BLOCKS", 1))
WIDTH = int(os.environ.get("RMTLLMF_BENCH_WIDTH", 384))
REPETITIONS = int(os.environ.get("RMTLLMF_BENCH_REPETITIONS", 3))


def shapes():
    found = {"positions": (197, 768)}
    for block in range(BLOCKS):
        found |= {f"{block}.in.weight": (2304, 768), f"{block}.out.weight": (768, 768)}
        found |= {f"{block}.fc.weight": (3072, 768), f"{block}.proj.weight": (768, 3072), f"{block}.bias": (3072,)}
    return found


def towers(seed=0):
    source = torch.Generator().manual_seed(seed)
    return [{key: 0.01 * torch.randn(s, generator=source) for key, s in shapes().items()} for _ in range(TASKS)]


def lists(vectors):
    return {key: [vector[key] for vector in vectors] for key in vectors[0]}


def apart(left, right):
    return max(float((left[key] - right[key]).double().norm() / right[key].double().norm()) for key in right)


def report(name, ours, theirs, note=""):
    mine, other = interleaved(ours, theirs, repetitions=REPETITIONS)
    print(f"\n{name}: {mine:.2f} s, the other {other:.2f} s: {other / mine:.2f} times as long{note}")


def test_led_merging():
    vectors, base, tuned = towers(), definitions.sizes(towers(1)), definitions.sizes(towers(2))
    base, tuned = ([{key: tensor.float() for key, tensor in each.items()} for each in some] for some in (base, tuned))

    def located(score, ratio):
        return score >= score.flatten().sort(descending=True).values[int(ratio * score.numel()) - 1]

    def by_sorting():
        fused = {}
        for key in vectors[0]:
            masks = [located(b[key], 0.3) & located(t[key], 0.3) for b, t in zip(base, tuned, strict=True)]
            votes = torch.stack(masks).sum(0)
            fused[key] = sum(v[key] * (mask & (votes == 1)) for v, mask in zip(vectors, masks, strict=True))
        return fused

    found, expected = led_merging(vectors, base, tuned, 0.3), by_sorting()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    report("LED-Merging beside sorting", lambda: led_merging(vectors, base, tuned, 0.3), by_sorting)


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher(normalize):
    peer = pytest.importorskip("fusion_bench.method.fisher_merging.fisher_merging")
    vectors, information = towers(), [{k: t.square() for k, t in each.items()} for each in towers(1)]

    def theirs(given=vectors, needed=information):
        return peer.merging_with_fisher_weights(
            lists(given),
            needed,
            torch.ones(TASKS) / TASKS,
            normalize_fisher_weight=normalize,
            minimal_fisher_weight=1e-20,
        )

    def ours():
        return fisher(vectors, information, normalize=normalize, floor=1e-12)

    distance = apart(ours(), theirs())
    assert distance < 1e-4
    report(f"Fisher, normalize={normalize}", ours, theirs, f"; apart by {distance:.1e}")


def test_regmean():
    peer = pytest.importorskip("fusion_bench.method.regmean.regmean")
    vectors, grams = towers(), []
    for seed in range(TASKS):
        source, given = torch.Generator().manual_seed(seed), {}
        for key, shape in shapes().items():
            if key.endswith("weight"):
                x = torch.randn(1024, shape[1], generator=source) + 0.5 * torch.randn(shape[1], generator=source)
                given[key] = x.mT @ x / len(x)
        grams.append(given)
    named = [{key.removesuffix(".weight"): gram for key, gram in given.items()} for given in grams]

    def theirs():
        return peer.merging_with_regmean_weights(lists(vectors), named, reduce_non_diagonal_ratio=0.9)

    def ours():
        return regmean(vectors, grams, 0.9)

    found, other = ours(), theirs()
    exact = regmean(vectors, grams, 0.9, compute_dtype=torch.float64, dtype=torch.float64)
    assert apart(found, exact) < 1e-4
    assert apart(other, exact) < 1e-2
    note = f"; from exact values {apart(found, exact):.1e}, theirs {apart(other, exact):.1e}"
    report("RegMean", ours, theirs, note)


class Layer(nn.Module):
    """A layer of CLIP as Hugging Face has it."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, attention_mask=None, causal_attention_mask=None):
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, 32)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return (x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)))),)


class Tower(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.embed, self.layers = nn.Linear(48, width), nn.ModuleList([Layer(width) for _ in range(depth)])

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, None, None)[0]
        return x


def test_regmean_plus_plus():
    peer = pytest.importorskip("fusion_bench.method.regmean_plusplus.clip_regmean_plusplus")
    rules = pytest.importorskip("fusion_bench.method.regmean_plusplus.regmean_plusplus")
    torch.manual_seed(0)
    base, tuned = Tower(WIDTH, 3), [Tower(WIDTH, 3) for _ in range(TASKS)]
    for model in tuned:  # close to the base, as fine-tuned models are
        for key, tensor in model.state_dict().items():
            tensor.copy_(base.state_dict()[key] + 0.1 * tensor)
    vectors = [{key: tensor - base.state_dict()[key] for key, tensor in model.state_dict().items()} for model in tuned]
    tasks = {str(q): [torch.randn(16, 50, 48) * (1 + q) for _ in range(2)] for q in range(TASKS)}
    theirs_object = object.__new__(peer.RegMeanAlgorithmForCLIPPlusPlus)
    theirs_object.fabric = SimpleNamespace(setup=lambda module: module)

    @torch.no_grad()
    def theirs():
        merged = {k: torch.stack([v[k] for v in vectors]).mean(0) for k in vectors[0] if k.startswith("embed")}
        state = base.state_dict()
        weight, bias = (state[k] + merged[k] for k in ("embed.weight", "embed.bias"))
        inputs = {name: [nn.functional.linear(x, weight, bias) for x in batches] for name, batches in tasks.items()}
        for index in range(3):
            layer, grams = Layer(WIDTH), []
            for name, model in zip(tasks, tuned, strict=True):
                own = model.layers[index]
                linears = {key: module for key, module in own.named_modules() if isinstance(module, nn.Linear)}
                grams.append(theirs_object.get_regmean_weights(name, own, inputs[name], linears))
            parameters = lists([model.layers[index].state_dict() for model in tuned])
            found = rules.merging_with_regmean_weights(parameters, grams, reduce_non_diagonal_ratio=0.95)
            layer.load_state_dict(found)
            merged |= {f"layers.{index}.{key}": t - state[f"layers.{index}.{key}"] for key, t in found.items()}
            if index < 2:
                inputs = {name: theirs_object.layer_batches_forward(layer, batches) for name, batches in inputs.items()}
        return merged

    def ours():
        return regmean_plus_plus(vectors, base, tasks)

    distance = apart(ours(), theirs())
    assert distance < 1e-2
    plain = regmean(vectors, [input_grams(model, x) for model, x in zip(tuned, tasks.values(), strict=True)], 0.95)
    note = f"; apart by {distance:.1e}, from RegMean by {apart(ours(), plain):.1e}"
    report("RegMean++", ours, theirs, note)
