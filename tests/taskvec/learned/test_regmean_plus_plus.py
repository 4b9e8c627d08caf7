"""RegMean++ against a loop over layers, blocks that follow each other or not, and bad input."""

import copy

import pytest
import torch
from torch import nn

import rmtllmf.taskvec.learned.regmean_plus_plus as module
from helpers import statistics_definitions as definitions
from rmtllmf.errors import InputError, ShapeError, StateMismatchError
from rmtllmf.taskvec import TaskVector, fuse, input_grams, regmean, regmean_plus_plus, weighted_average


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vectors_of(model, count, size=0.3):
    state = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return [
        {key: size * normal(*tensor.shape, seed=10 * q + i) for i, (key, tensor) in enumerate(state.items())}
        for q in range(count)
    ]


def batches_of(count, *shape):
    return {
        str(q): [normal(3, *shape, seed=100 + q), (normal(2, *shape, seed=200 + q), "labels")] for q in range(count)
    }


def joined(batches):
    return torch.cat([batch[0] if isinstance(batch, tuple) else batch for batch in batches])


def mean(x):
    rows = x.reshape(-1, x.shape[-1])
    return rows.mT @ rows / len(rows)


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_loop_over_the_layers_of_a_perceptron(scale):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    vectors, tasks = vectors_of(model, 3), batches_of(3, 4)
    features = [joined(tasks[name]) for name in tasks]  # in the merged model
    merged = {}
    for layer in "024":
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        given = [{weight: mean(x)} for x in features]
        update = definitions.regmean([{k: v[k] for k in (weight, bias)} for v in vectors], given, 0.95)
        merged |= {key: scale * tensor for key, tensor in update.items()}
        W, b = base[weight] + merged[weight], base[bias] + merged[bias]
        features = [torch.tanh(x @ W.mT + b) for x in features]
    found = regmean_plus_plus(vectors, model, tasks, layers=["0", "2", "4"], scale=scale)
    assert list(found) == list(base)
    for key, tensor in merged.items():
        torch.testing.assert_close(found[key], tensor)
    assert all(torch.equal(base[key], tensor) for key, tensor in model.state_dict().items())


class Block(nn.Module):
    def __init__(self, wide, pair=False):
        super().__init__()
        self.pair = pair
        self.norm = nn.LayerNorm(4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down = nn.Linear(4, wide), nn.Linear(wide, 4)

    def forward(self, x, mask=None):
        y = self.norm(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(x)))
        return (x, None) if self.pair else x


class Tower(nn.Module):
    """A transformer; `step` is what happens to the output of a block before the next one gets it."""

    def __init__(self, step=None):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block(6, pair=step == "pair") for _ in range(3)])
        self.final = nn.Linear(4, 2)
        self.register_buffer("mask", torch.zeros(5, 5, dtype=torch.float64), persistent=False)
        self.step, self.calls = step, 0

    def forward(self, x):
        self.calls += 1
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask=self.mask)
            if self.step == "pair":
                x = x[0]
            if self.step == "in place":
                x += 0.1
            elif self.step == "new":
                x = x + 0.1
        return self.final(x)


def by_hand(model, vectors, tasks, alpha=0.95):
    """With whole models, of which everything is calculated from the start."""
    base = model.state_dict()
    merged = {k: base[k] + tensor for k, tensor in weighted_average(vectors).items()}
    merged |= {k: base[k] for k in base if k.startswith("blocks.")}
    for index in range(3):
        prefix, given = f"blocks.{index}.", []
        for vector, batches in zip(vectors, tasks.values(), strict=True):
            state = merged | {k: base[k] + vector[k] for k in base if k.startswith(prefix)}
            given.append({k: g for k, g in input_grams(model, batches, state=state).items() if k.startswith(prefix)})
        own = [{k: v[k] for k in v if k.startswith(prefix)} for v in vectors]
        merged |= {k: base[k] + tensor for k, tensor in definitions.regmean(own, given, alpha).items()}
    return {k: merged[k] - base[k] for k in base}


@pytest.mark.parametrize("step", [None, "pair", "in place", "new"])
def test_a_transformer(step):
    torch.manual_seed(0)
    model = Tower(step).double().train()
    vectors, tasks = vectors_of(model, 2), batches_of(2, 5, 3)
    expected = by_hand(copy.deepcopy(model), vectors, tasks)
    before = copy.deepcopy(model.state_dict())
    found = regmean_plus_plus(vectors, model, tasks)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)
    assert model.calls == (5 if step in (None, "pair") else 13)  # 1 to see, and 4 batches once, or for each of 3 blocks
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert model.training
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_one_layer_is_regmean_and_so_are_blocks_that_nobody_changed():
    model = nn.Linear(4, 3).double()
    tower = nn.Sequential(model)
    vectors, tasks = vectors_of(tower, 2), batches_of(2, 4)
    found = regmean_plus_plus(vectors, tower, tasks, 0.9, layers=["0"])
    given = [input_grams(tower, batches) for batches in tasks.values()]
    expected = regmean(vectors, given, 0.9)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_features_of_the_merged_model_are_what_is_fitted():
    """No other weights of the last layer are closer to the tasks' own, on what the merged model gives them."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    vectors, tasks = vectors_of(model, 2, size=1.0), batches_of(2, 4)
    update = regmean_plus_plus(vectors, model, tasks, 1.0, layers=["0", "1"])
    fused = update.apply_to(model.state_dict())
    last = fused["1.weight"].clone().requires_grad_()
    cost = 0.0
    for vector, batches in zip(vectors, tasks.values(), strict=True):
        x = joined(batches) @ fused["0.weight"].mT + fused["0.bias"]
        cost = cost + (x @ (last - model[1].weight.detach() - vector["1.weight"]).mT).square().sum()
    cost.backward()
    assert float(last.grad.abs().max()) < 1e-9


def test_options_ties_and_another_base():
    torch.manual_seed(0)
    model, other = Tower().double(), Tower().double()
    for tower in (model, other):
        tower.blocks[0].down.weight = nn.Parameter(tower.blocks[0].up.weight.detach().mT.contiguous())
        tower.blocks[1].attn.out_proj.weight = tower.blocks[1].attn.out_proj.weight
    tuned = [Tower().double() for _ in range(2)]
    vectors, tasks = [TaskVector.between(other, each) for each in tuned], batches_of(2, 5, 3)
    expected = by_hand(other, vectors, tasks)
    out = {key: torch.empty_like(tensor) for key, tensor in vectors[0].items()}
    found = regmean_plus_plus(vectors, model, tasks, base=other, out=out)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)
        assert found[key].data_ptr() == out[key].data_ptr()
    skipped = regmean_plus_plus(vectors, model, tasks, base=other, skip="blocks.1.*", dtype=torch.float32)
    assert not any(key.startswith("blocks.1.") for key in skipped)
    assert {tensor.dtype for tensor in skipped.values()} == {torch.float32}
    torch.testing.assert_close(skipped["blocks.0.up.weight"].double(), expected["blocks.0.up.weight"])
    one = regmean_plus_plus(vectors, model, tasks, base=other, weights=[1.0, 0.0])
    for key in ("blocks.2.up.weight", "final.bias"):
        torch.testing.assert_close(one[key], vectors[0][key])
    again = fuse(other, tuned, lambda given: regmean_plus_plus(given, model, tasks, base=other))
    for key, tensor in expected.items():
        torch.testing.assert_close(again[key] - other.state_dict()[key], tensor)


def test_ties_inside_a_block():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model = nn.Sequential(Tied(), Tied()).double()
    vectors, tasks = vectors_of(model, 2), batches_of(2, 4)
    for apart in (False, True):
        for vector in vectors:
            for index in range(2):
                weight = vector[f"{index}.a.weight"]
                vector[f"{index}.b.weight"] = weight.clone() if apart else weight
        found = regmean_plus_plus(vectors, model, tasks)
        torch.testing.assert_close(found["1.a.weight"], found["1.b.weight"])


def test_batches_that_can_be_read_once_are_enough_for_blocks_that_follow():
    torch.manual_seed(0)
    model = Tower().double()
    vectors, tasks = vectors_of(model, 2), batches_of(2, 5, 3)
    once = {name: iter(batches) for name, batches in tasks.items()}
    found, expected = regmean_plus_plus(vectors, model, once), regmean_plus_plus(vectors, model, tasks)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_blocks_are_found():
    model = Tower()
    assert list(module._blocks(model, None)) == ["blocks.0", "blocks.1", "blocks.2"]
    layered = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False
    )
    assert list(module._blocks(layered, None)) == ["layers.0", "layers.1"]


class Turned(Tower):
    def forward(self, x):
        x = self.embed(x)
        for block in reversed(self.blocks):
            x = block(x)
        return x


PERCEPTRON = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
SHARED = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
SHARED[1].weight = SHARED[0].weight


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, TypeError, "model: expected a torch.nn.Module"),
        ({"tasks": batches_of(3, 4)}, ShapeError, "tasks: expected 2, one for each vector, got 3"),
        ({"layers": ["0", "7"]}, InputError, "layers: the model has no '7'"),
        ({"layers": []}, InputError, "layers: expected at least one name"),
        ({"layers": None}, InputError, "layers: found no list of blocks of one class"),
        ({"layers": ["2", "0"]}, InputError, "layers: expected names in the order in which the model calls them"),
        ({"model": SHARED, "layers": ["0", "1"]}, InputError, "layers: '0' and '1' share parameters"),
        ({"model": Turned().double(), "layers": None}, InputError, "in the order in which the model calls them"),
        ({"vectors": [{"x": torch.ones(2)}] * 2}, StateMismatchError, "model lacks 'x', which the vectors change"),
        ({"vectors": [{"0.bias": torch.ones(2)}] * 2}, StateMismatchError, r"model\['0.bias'\] has shape \(5,\)"),
        ({"alpha": -0.1}, InputError, "alpha: expected a share"),
        ({"tasks": {"a": [], "b": []}}, InputError, r"tasks\['a'\]: expected at least one batch"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    given = {"model": PERCEPTRON, "tasks": batches_of(2, 4), "layers": ["0", "2"]} | arguments
    if given["model"] is not None and isinstance(given["model"], Tower):
        given["tasks"] = batches_of(2, 5, 3)
    vectors = given.pop("vectors", None) or vectors_of(given["model"] or PERCEPTRON, 2)
    with pytest.raises(error, match=message):
        regmean_plus_plus(vectors, **given)


def test_a_block_that_is_not_called_is_named():
    model = Tower().double()
    model.unused = nn.Linear(4, 4).double()
    with pytest.raises(InputError, match=r"layers: 1 of 2 are not called by the model"):
        regmean_plus_plus(vectors_of(model, 2), model, batches_of(2, 5, 3), layers=["blocks.0", "unused"])
