"""Squared gradients sample by sample, against one backward pass after another."""

import copy
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from helpers.draws import normal
from rmtllmf._sample_gradients import SampleGradients
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.resilience.harmful_keys import squared_gradients


class Attention(nn.Module):
    """What a transformer has, with a tie, an input of its own kind, and something with logits as its output."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.number = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("position", torch.arange(5.0).unsqueeze(-1) / 5)

    def forward(self, left, right):
        x = self.norm(left + self.position)
        hidden = self.attn(x, x, x, need_weights=False)[0]

        class Output:
            logits = self.number * self.b(torch.tanh(self.a(hidden.mean(1))) + right)[:, :4]

        return Output()


class Head(nn.Linear):
    def forward(self, x):
        return super().forward(getattr(x, "logits", x))


class Steered(nn.Module):
    """A value steers Python and a buffer is written: nothing for torch.func."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += float(x.mean())
        return self.w(x) if float(x.sum()) > 0 else self.w(2 * x).tanh()


def batch_norm():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4)
    )
    model[1].running_mean += 0.3
    model[1].running_var *= 2
    return model, normal(7, 2, 4, 4, seed=1)


MODELS = {
    "batch norm": batch_norm,
    "attention": lambda: (Attention(), (normal(7, 5, 8, seed=1), normal(7, 8, seed=2))),
    "named inputs": lambda: (Attention(), {"left": normal(7, 5, 8, seed=1), "right": normal(7, 8, seed=2)}),
    "encoder layer": lambda: (
        nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(24, 4)),
        normal(7, 3, 8, seed=1),
    ),
    "steered": lambda: (Steered(), normal(7, 6, seed=1)),
}
TARGETS = torch.tensor([0, 3, 1, 1, 2, 0, 3])


def row(inputs, i):
    if isinstance(inputs, dict):
        return {key: tensor[i : i + 1] for key, tensor in inputs.items()}
    return tuple(tensor[i : i + 1] for tensor in inputs) if isinstance(inputs, tuple) else inputs[i : i + 1]


def by_hand(model, head, inputs, targets, loss=cross_entropy):
    """One backward pass after another, on a copy of the model."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    mean = {name: 0.0 for name, _ in model.named_parameters(remove_duplicate=False)}
    for i in range(len(targets)):
        model.zero_grad()
        x = row(inputs, i)
        output = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
        output = getattr(output, "logits", output)
        loss(output if head is None else head(output), targets[i : i + 1]).backward()
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.grad is not None:
                mean[name] += float(p.grad.square().mean()) / len(targets)
    return mean


def double(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.double().train(), inputs


def snapshot(model):
    return (
        {name: (p.requires_grad, p.grad, p.detach().clone()) for name, p in model.named_parameters()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        [part.training for part in model.modules()],
    )


def assert_as_before(model, before):
    parameters, buffers, modes = before
    for name, p in model.named_parameters():
        flag, gradient, values = parameters[name]
        assert p.requires_grad == flag
        assert p.grad is gradient
        assert torch.equal(p, values)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("path", ["together", "in threes", "one by one"])
def test_gradients_are_those_of_a_loop_by_hand(name, path, monkeypatch):
    source = sys.modules[SampleGradients.__module__]
    model, inputs = double(name)
    size = sum(p.numel() for p in model.parameters())
    if path != "together":
        monkeypatch.setattr(source, "ENTRIES", (3 if path == "in threes" else 1) * size)
    if path == "one by one":
        monkeypatch.setattr(SampleGradients, "_vmapped", lambda *_: pytest.fail("together"))
    elif name != "steered":
        monkeypatch.setattr(SampleGradients, "_looped", lambda *_: pytest.fail("sample by sample"))
    want = by_hand(model, None, inputs, TARGETS)
    found = squared_gradients(model, [(inputs, TARGETS)])
    assert list(found) == list(want)
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-10, abs=1e-30)
    assert max(found.values()) > 0


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was_also_after_an_exception(name):
    model, inputs = double(name)
    first, *others = model.parameters()
    first.requires_grad_(False)
    others[0].grad = torch.ones_like(others[0])
    next(model.children()).eval()
    head = Head(4, 3).double().train()
    before, of_head, drawn = snapshot(model), snapshot(head), torch.get_rng_state()
    squared_gradients(model, {"t": (head, [(inputs, TARGETS % 3)])})
    assert_as_before(model, before)
    assert_as_before(head, of_head)
    calls = []

    def broken(logits, targets):
        calls.append(None)
        if len(calls) > 2:
            raise ZeroDivisionError("broken")
        return cross_entropy(logits, targets)

    with pytest.raises(ZeroDivisionError, match="broken"):
        squared_gradients(model, {"t": (head, [(inputs, TARGETS % 3)] * 4)}, loss=broken)
    assert_as_before(model, before)
    assert_as_before(head, of_head)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_tasks_count_the_same_and_samples_within_them():
    model = nn.Linear(5, 6).double()
    heads = {"a": nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4)).double(), "b": torch.tanh}
    x, y = normal(9, 5, seed=1), normal(9, 6, seed=2)
    a = [(x[:2], TARGETS[:2]), [x[2:7], TARGETS[2:]]]  # 2 and 5
    b = [(x[7:], y[7:])]

    def loss(logits, targets):
        return mse_loss(logits, targets) if targets.is_floating_point() else cross_entropy(logits, targets)

    found = squared_gradients(model, {"a": (heads["a"], a), "b": (heads["b"], iter(b))}, loss=loss)
    first = by_hand(model, heads["a"][1], x[:7], TARGETS)
    second = by_hand(model, heads["b"], x[7:], y[7:], mse_loss)
    for key in found:
        assert found[key] == pytest.approx((first[key] + second[key]) / 2, rel=1e-12)


@pytest.mark.parametrize("name", ["batch norm", "steered"])
def test_gradients_where_they_are_switched_off(name):
    model, inputs = double(name)
    want = squared_gradients(model, [(inputs, TARGETS)])
    with torch.no_grad():
        assert squared_gradients(model, [(inputs, TARGETS)]) == want
    assert max(want.values()) > 0


def test_the_mean_square_of_what_noise_does_to_a_loss():
    """sigma^2 |k| F_k: the mean over samples and 400 draws, within 4 standard errors and 2 % for curvature."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    x = normal(7, 6, seed=1)
    found = squared_gradients(model, [(x, TARGETS)])
    draw = torch.Generator().manual_seed(0)
    for key, p in model.state_dict().items():
        changes = []
        kept = p.clone()
        start = cross_entropy(model(x), TARGETS, reduction="none").detach()
        for _ in range(400):
            p.copy_(kept + 1e-3 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
            changes.append(float((cross_entropy(model(x), TARGETS, reduction="none") - start).detach().square().mean()))
        p.copy_(kept)
        bar = 4 * np.std(changes) / 20 + 0.02 * np.mean(changes)
        assert abs(np.mean(changes) - 1e-6 * p.numel() * found[key]) <= bar


def test_no_warning_reaches_the_caller():
    model, inputs = double("attention")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        squared_gradients(model, [(inputs, TARGETS)])
    assert seen == []


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


LINEAR, X, Y = nn.Linear(3, 2), torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
BAD_GRADIENTS = {
    "no model": ((torch.tanh, [(X, Y)]), {}, TypeError, "model: expected a torch.nn.Module, got builtin"),
    "no parameters": ((nn.Tanh(), [(X, Y)]), {}, InputError, "model: expected floating-point parameters"),
    "no function": ((LINEAR, [(X, Y)]), {"loss": "l2"}, TypeError, "loss: expected a function .* got str"),
    "no batches": ((LINEAR, []), {}, InputError, "tasks_or_batches: expected at least one batch"),
    "no tasks": ((LINEAR, {}), {}, InputError, "tasks_or_batches: expected at least one task"),
    "used up": ((LINEAR, {"t": iter([])}), {}, InputError, r"tasks_or_batches\['t'\]: expected at least one batch"),
    "no samples": ((LINEAR, {"t": [(X[:0], Y[:0])]}), {}, InputError, r"\['t'\]: expected at least one sample"),
    "no pairs": ((LINEAR, [X]), {}, TypeError, r"expected batches \(inputs, targets\), got a bare tensor"),
    "lengths": ((LINEAR, [(X, Y[:3])]), {}, ShapeError, r"one sample in each row, got shapes \(4, 3\), \(3,\)"),
    "no tensors": ((LINEAR, [("x", "y")]), {}, ShapeError, "one sample in each row, got shapes no tensors"),
    "many losses": (
        (LINEAR, [(X, Y)]),
        {"loss": lambda logits, targets: logits},
        ShapeError,
        r"loss: expected one number, got shape \(1, 2\)",
    ),
    "no loss": ((LINEAR, [(X, Y)]), {"loss": lambda logits, targets: 1.0}, TypeError, "loss: expected a tensor, got"),
    "classes": ((LINEAR, [(X, Y + 5)]), {}, InputError, "indices from 0 to 1, .*got 5 to"),
    "widths": ((LINEAR, [(X[:, :2], Y)]), {}, RuntimeError, "shapes cannot be multiplied"),
    "pair": ((Pair(3, 2), [(X, Y)]), {}, TypeError, "expected logits as a tensor .*, got tuple"),
    "infinite": ((LINEAR, [(X * math.inf, Y)]), {}, NonFiniteError, "the gradient of 'weight' is not finite"),
}


@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_bad_input_of_squared_gradients(case):
    arguments, options, kind, message = BAD_GRADIENTS[case]
    with pytest.raises(kind, match=message):
        squared_gradients(*arguments, **options)
