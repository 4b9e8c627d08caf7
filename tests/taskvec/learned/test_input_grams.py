"""Gram matrices against the inputs that layers are seen to get, also where no layer is called."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import input_grams


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(x):
    rows = x.reshape(-1, x.shape[-1])
    return rows.mT @ rows / len(rows)


class Encoder(nn.Module):
    """Layers that are called, one of them twice under two names, one that is not, and a product of its own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b = nn.Linear(5, 5, bias=False)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(5, 5)
        self.own = nn.Parameter(torch.ones(5, 5))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return linear(self.b(torch.tanh(self.drop(self.a(x)))), self.own)


def test_linear_layers_and_ties():
    model, x = Encoder().double().train(), normal(7, 3, 5)
    before = copy.deepcopy(model.state_dict())
    found = input_grams(model, [x[:4], (x[4:], "labels")])
    assert list(found) == ["a.weight", "b.weight"]
    assert found["a.weight"] is found["b.weight"]
    inner = torch.tanh(linear(x, model.a.weight, model.a.bias))
    torch.testing.assert_close(found["a.weight"], mean(torch.cat([x, inner])).detach())
    assert model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_removed_after_an_exception():
    model = Encoder().double()
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        input_grams(model, [normal(7, 4)])
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_to_itself(batch_first, bias):
    model = nn.MultiheadAttention(6, 2, bias=bias, batch_first=batch_first).double()
    if bias:  # torch makes them 0; the output's is no part of what its projection is given
        nn.init.normal_(model.in_proj_bias, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(model.out_proj.bias, generator=torch.Generator().manual_seed(1))
    x = normal(4, 3, 6)
    found = input_grams(model, [{"query": x, "key": x, "value": x}])
    assert set(found) == {"in_proj_weight", "out_proj.weight"}
    torch.testing.assert_close(found["in_proj_weight"], mean(x))
    q, k, v = linear(x, model.in_proj_weight, model.in_proj_bias).detach().chunk(3, -1)
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.mT / 3**0.5).softmax(-1)
    torch.testing.assert_close(found["out_proj.weight"], mean((weights @ v).transpose(1, 2).flatten(-2)))
    assert not any(module._forward_hooks for module in model.modules())


def test_attention_to_something_else():
    model = nn.MultiheadAttention(6, 2, batch_first=True).double()
    x, y, z = normal(4, 3, 6), normal(4, 5, 6, seed=1), normal(4, 5, 6, seed=2)
    found = input_grams(model, [(x, y, z)])
    torch.testing.assert_close(found["in_proj_weight"], torch.stack([mean(x), mean(y), mean(z)]))
    both = input_grams(model, [{"query": x, "key": x, "value": x}, {"query": x, "key": y, "value": z}])
    expected = [mean(x), mean(torch.cat([x, y], 1)), mean(torch.cat([x, z], 1))]
    torch.testing.assert_close(both["in_proj_weight"], torch.stack(expected))
    tasks = {"self": [{"query": x, "key": x, "value": x}], "other": [{"query": x, "key": y, "value": z}]}
    expected = [mean(x), (mean(x) + mean(y)) / 2, (mean(x) + mean(z)) / 2]
    torch.testing.assert_close(input_grams(model, tasks)["in_proj_weight"], torch.stack(expected))


def test_attention_with_projections_apart():
    model = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True).double()
    x, y, z = normal(4, 3, 6), normal(4, 5, 4, seed=1), normal(4, 5, 5, seed=2)
    found = input_grams(model, [{"query": x, "key": y, "value": z}])
    for name, given in {"q_proj_weight": x, "k_proj_weight": y, "v_proj_weight": z}.items():
        torch.testing.assert_close(found[name], mean(given))
    assert found["out_proj.weight"].shape == (6, 6)


def test_a_transformer_layer_with_its_fast_path():
    """What would be calculated without calling any layer."""
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
    x = normal(4, 3, 6).float()
    found = input_grams(model, [x])
    assert set(found) == {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    attended = model.norm1(x + model.self_attn(x, x, x)[0])
    torch.testing.assert_close(found["linear1.weight"], mean(attended).detach(), rtol=1e-4, atol=1e-5)
    hidden = model.linear1(attended).relu()
    torch.testing.assert_close(found["linear2.weight"], mean(hidden).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": (3, 2), "padding": (1, 2), "dilation": (1, 2)},
        {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
        {"kernel_size": 3, "padding": "valid", "stride": 2},
    ],
)
def test_convolutions(options):
    """The mean square of the outputs is what the Gram matrix says, for any weights."""
    model, x = nn.Conv2d(2, 3, bias=False, **options).double(), normal(4, 2, 6, 7)
    found = input_grams(model, [x])["weight"]
    for seed in range(3):
        weight = normal(*model.weight.shape, seed=seed)
        out = conv2d(x, weight, None, model.stride, model.padding, model.dilation)
        rows = weight.flatten(1)
        torch.testing.assert_close(((rows @ found) * rows).sum(1), out.square().mean((0, 2, 3)))


def test_other_convolutions_are_not_seen():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    with pytest.raises(InputError, match="no linear layer was called"):
        input_grams(model.double(), [normal(4, 2, 6, 7)])


def test_other_weights_than_the_models_own_and_precision():
    model, other, x = Encoder(), Encoder(), normal(7, 3, 5).float()
    found = input_grams(model, [x.bfloat16().float()], state=other)["a.weight"]
    assert torch.equal(found, input_grams(other, [x.bfloat16().float()])["a.weight"])
    assert not torch.equal(found, input_grams(model, [x.bfloat16().float()])["a.weight"])
    half = input_grams(copy.deepcopy(other).bfloat16(), [x.bfloat16()])["a.weight"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, found, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, TypeError, "model: expected a torch.nn.Module"),
        ({"tasks": []}, InputError, "tasks: expected at least one batch"),
        ({"model": nn.ReLU()}, InputError, "model: no linear layer was called"),
        ({"tasks": {"t": [normal(3, 5) / 0]}}, NonFiniteError, r"the inputs of 'weight' are not finite for tasks\['t'"),
        ({"state": {"weight": torch.ones(2, 5)}}, StateMismatchError, "state lacks 'bias'"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    given = {"model": nn.Linear(5, 2).double(), "tasks": [normal(3, 5)]} | arguments
    with pytest.raises(error, match=message):
        input_grams(**given)
