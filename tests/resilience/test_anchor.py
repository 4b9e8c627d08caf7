"""A realignment that is pulled towards an anchor ends where the penalised problem has its closed-form minimum."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.resilience import realign

N, D = 12, 4


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def half_mse(prediction, target):
    return mse_loss(prediction, target) / 2


def ridge(dtype=torch.float64):
    """A linear model, its only batch, an anchor, and weights of very different size, one of them 0."""
    model = nn.Linear(D, 1, bias=False, dtype=dtype)
    model.weight.data = gaussian(1, D, seed=1, dtype=dtype)
    batch = gaussian(N, D, seed=2, dtype=dtype), gaussian(N, 1, seed=3, dtype=dtype)
    return model, batch, gaussian(1, D, seed=4, dtype=dtype), torch.tensor([[0.0, 0.3, 2.0, 50.0]], dtype=dtype)


def minimum(batch, anchor, weight):
    """``argmin 1/(2n) |X theta - y|^2 + 1/2 sum w (theta - anchor)^2``."""
    x, y = (part.double() for part in batch)
    w = torch.diag(weight.double().expand(1, D)[0])
    return torch.linalg.solve(x.T @ x / N + w, x.T @ y / N + w @ anchor.double().T).T


class Unknown(torch.optim.SGD):
    """An optimizer whose metric is not known, so that the gradient of the penalty is used."""


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.2),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.5),
        lambda p: Unknown(p, lr=0.02),
    ],
    ids=["SGD", "momentum", "Nesterov", "dampening", "by gradient"],
)
def test_ridge_regression_towards_an_anchor(optimizer):
    model, batch, anchor, weight = ridge()
    expected = minimum(batch, anchor, weight)
    realign(
        model,
        [batch],
        steps=1500,
        loss=half_mse,
        anchor={"weight": anchor},
        anchor_weight={"weight": weight},
        optimizer=optimizer,
    )
    torch.testing.assert_close(model.weight.data, expected, rtol=1e-8, atol=1e-8)
    assert (expected - anchor).abs().max() > 0.1  # neither the anchor
    assert (expected - minimum(batch, anchor, torch.zeros(1, D))).abs().max() > 0.1  # nor least squares


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("weight", [0.05, 1.0, 20.0, 1e4, 1e9])
def test_adamw_too_comes_to_rest_in_the_minimum(weight, amsgrad):
    """A decoupled pull that is not in the metric of the second moment would come to rest somewhere else."""
    model, batch, anchor, _ = ridge()
    expected = minimum(batch, anchor, torch.full((1, D), weight))
    options = {"loss": half_mse, "anchor": {"weight": anchor}, "anchor_weight": weight}
    if amsgrad:
        rates = iter([0.05] * 300 + [0.005] * 300 + [0.0005] * 300)

        made = []

        def optimizer(parameters):
            made.append(torch.optim.AdamW(parameters, lr=0.05, amsgrad=True, weight_decay=0.0))
            return made[0]

        def loss(prediction, target):
            made[0].param_groups[0]["lr"] = next(rates)
            return half_mse(prediction, target)

        realign(model, [batch], steps=900, **{**options, "loss": loss}, optimizer=optimizer)
    else:
        realign(model, [batch], steps=900, lr=0.05, **options)
    torch.testing.assert_close(model.weight.data, expected, rtol=0, atol=2e-4)


def encoder(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


BATCHES = [(gaussian(6, 4, seed=k, dtype=torch.float32), torch.arange(6) % 3) for k in range(2)]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("weight", [0, 0.0, {"*": 0}, {"0.weight": torch.zeros(8, 4), "*": 0.0}, {}])
@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.SGD(p, lr=0.1), lambda p: Unknown(p, lr=0.1)])
def test_weight_zero_is_realignment_without_an_anchor_to_the_bit(weight, optimizer):
    free, pulled = encoder(), encoder()
    far = {name: tensor + 100 for name, tensor in state(free).items()}
    plain = realign(free, BATCHES, steps=5, optimizer=optimizer)
    done = realign(pulled, BATCHES, steps=5, optimizer=optimizer, anchor=far, anchor_weight=weight)
    assert same(state(free), state(pulled))
    assert done.losses == plain.losses
    assert plain.penalties == ()
    assert done.penalties == (0.0,) * 5


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("weight", [1e12, 1e300])
def test_a_huge_weight_keeps_the_anchor_at_every_step(weight, optimizer):
    model = encoder()
    before = state(model)
    seen = []

    def loss(logits, targets):
        seen.append(state(model))
        return cross_entropy(logits, targets)

    realign(model, BATCHES, steps=20, anchor="start", anchor_weight=weight, loss=loss, optimizer=optimizer)
    for found in [*seen, state(model)]:
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-8)


def test_a_huge_weight_leads_to_the_anchor_in_one_step_and_a_gradient_would_explode():
    for make in (None, lambda p: torch.optim.SGD(p, lr=0.1)):
        model = encoder()
        far = {name: tensor + 3 for name, tensor in state(model).items()}
        realign(model, BATCHES, steps=1, anchor=far, anchor_weight=1e12, optimizer=make)
        for name, tensor in state(model).items():
            torch.testing.assert_close(tensor, far[name], rtol=1e-6, atol=1e-6)
    with pytest.raises(NonFiniteError):
        realign(encoder(), BATCHES, steps=30, anchor=far, anchor_weight=1e12, optimizer=lambda p: Unknown(p, lr=0.1))


def test_losses_are_the_tasks_and_penalties_are_reported_beside_them():
    """Against the proximal gradient method written by hand."""
    model, batch, anchor, weight = ridge()
    theta, losses, penalties = model.weight.data.clone(), [], []
    for _ in range(6):
        residual = batch[0] @ theta.T - batch[1]
        losses.append(float((residual**2).mean() / 2))
        penalties.append(float(0.5 * (weight * (theta - anchor) ** 2).sum()))
        theta = theta - 0.2 * residual.T @ batch[0] / N
        theta = (theta + 0.2 * weight * anchor) / (1 + 0.2 * weight)
    done = realign(
        model,
        [batch],
        steps=6,
        loss=half_mse,
        anchor={"weight": anchor},
        anchor_weight={"w*": weight},
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2),
    )
    assert done.losses == pytest.approx(losses, rel=1e-12)
    assert done.penalties == pytest.approx(penalties, rel=1e-12)
    torch.testing.assert_close(model.weight.data, theta, rtol=1e-12, atol=1e-12)


def test_the_first_pattern_counts_and_what_none_matches_is_free():
    model = encoder()
    before = state(model)
    weight = {"0.bias": 0.0, "0.*": torch.tensor([1e12]), "2.bias": 1e12}
    realign(model, BATCHES, steps=10, lr=0.1, anchor="start", anchor_weight=weight)
    after = state(model)
    moved = {name for name in after if (after[name] - before[name]).abs().max() > 1e-4}
    assert moved == {"0.bias", "2.weight"}


def test_a_weight_for_each_row():
    model = encoder()
    before = state(model)["0.weight"]
    rows = torch.tensor([1e12, 0.0] * 4)[:, None]
    realign(model, BATCHES, steps=10, lr=0.1, anchor="start", anchor_weight={"0.weight": rows})
    change = (model[0].weight.data - before).abs().amax(1)
    assert change[::2].max() < 1e-5
    assert change[1::2].min() > 1e-3


def test_an_anchor_that_is_a_view_of_the_model_does_not_move_with_it():
    results = []
    for anchor in (lambda model: "start", lambda model: model, lambda model: model.state_dict(), copy.deepcopy):
        model = encoder()
        done = realign(model, BATCHES, steps=5, lr=0.1, anchor=anchor(model), anchor_weight=0.5)
        results.append((done.losses, done.penalties))
    assert results.count(results[0]) == 4
    assert results[0][1][0] == 0 < results[0][1][1]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.norm(self.embed(x)))


TOKENS = [(torch.arange(6), torch.arange(6).roll(1))]


@pytest.mark.parametrize("name", ["embed.weight", "out.weight"])
def test_a_tied_parameter_is_meant_under_any_of_its_names(name):
    model = Tied()
    far = model.embed.weight.detach() + 1
    realign(model, TOKENS, steps=1, anchor={name: far}, anchor_weight={name: 1e12, "norm.running_*": 1.0})
    torch.testing.assert_close(model.out.weight.data, far)
    assert model.out.weight is model.embed.weight


def test_an_optimizer_of_some_of_the_parameters_pulls_only_these():
    model = encoder()
    before = state(model)
    far = {name: tensor + 1 for name, tensor in before.items()}
    realign(model, BATCHES, steps=1, anchor=far, anchor_weight=1e12, optimizer=lambda p: torch.optim.SGD(p[:1], lr=0.1))
    assert torch.equal(model[2].weight, before["2.weight"])
    torch.testing.assert_close(model[0].weight.data, far["0.weight"])


@pytest.mark.parametrize("make", [torch.optim.SGD, Unknown])
def test_half_precision_is_pulled_without_overflow(make):
    model = encoder(torch.bfloat16)
    far = {name: tensor + 1 for name, tensor in state(model).items()}
    batches = [(x.bfloat16(), y) for x, y in BATCHES]
    realign(model, batches, steps=40, anchor=far, anchor_weight=4.0, optimizer=lambda p: make(p, lr=0.1))
    for name, tensor in state(model).items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, far[name], rtol=0, atol=0.3)


def test_a_parameter_that_the_loss_does_not_reach_goes_to_its_anchor():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    for make in (None, lambda p: torch.optim.SGD(p, lr=0.5), lambda p: Unknown(p, lr=0.5)):
        model = Half()
        done = realign(model, BATCHES, steps=60, anchor=Half(), anchor_weight=1.0, optimizer=make)
        assert done.penalties[-1] < done.penalties[0]
    far = Half()
    realign(model, BATCHES, steps=60, anchor=far, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    torch.testing.assert_close(model.unused.weight, far.unused.weight)


def test_what_is_frozen_or_free_needs_no_anchor():
    model, before = encoder(), state(encoder())
    realign(model, BATCHES, steps=1, anchor={"2.weight": model[2].weight.data}, frozen=["0.*", "2.bias"])
    assert [name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])] == ["2.weight"]
    before = state(model)
    realign(model, BATCHES, steps=1, anchor={"2.weight": model[2].weight.data}, anchor_weight={"2.weight": 1})
    assert not any(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def bad(**options):
    return lambda: realign(encoder(), BATCHES, steps=1, **options)


GOOD = state(encoder())
BAD = {
    "an unknown word": (bad(anchor="begin"), InputError, "anchor: expected 'start'.*got 'begin'"),
    "no state": (bad(anchor=3), TypeError, "anchor: expected a torch.nn.Module"),
    "a name that is missing": (bad(anchor={"0.weight": GOOD["0.weight"]}), StateMismatchError, "anchor lacks '0.bias'"),
    "a shape": (bad(anchor={**GOOD, "0.bias": torch.ones(3)}), StateMismatchError, r"'0.bias'\] has shape \(3,\)"),
    "a dtype": (bad(anchor={**GOOD, "0.bias": torch.ones(8).double()}), StateMismatchError, "torch.float64"),
    "not finite": (bad(anchor={**GOOD, "0.bias": torch.full((8,), math.nan)}), NonFiniteError, "'0.bias'"),
    "a weight without an anchor": (bad(anchor_weight=2.0), InputError, "needs an `anchor`"),
    "weights without an anchor": (bad(anchor_weight=torch.ones(3)), InputError, "needs an `anchor`"),
    "a negative weight": (bad(anchor="start", anchor_weight=-1.0), InputError, "anchor_weight: .*>= 0, got -1.0"),
    "an infinite weight": (bad(anchor="start", anchor_weight=math.inf), InputError, "anchor_weight: .*finite"),
    "no number": (bad(anchor="start", anchor_weight="1"), TypeError, "anchor_weight: expected a real number"),
    "a bare tensor": (bad(anchor="start", anchor_weight=torch.ones(4)), ShapeError, "anchor_weight: expected one"),
    "a pattern": (bad(anchor="start", anchor_weight={"x.*": 1.0}), InputError, "'x.\\*' matches none"),
    "a key": (bad(anchor="start", anchor_weight={1: 1.0}), TypeError, "anchor_weight: expected names"),
    "negative entries": (
        bad(anchor="start", anchor_weight={"0.bias": -torch.ones(8)}),
        InputError,
        r"anchor_weight\['0.bias'\]: expected numbers >= 0, got -1.0",
    ),
    "entries not finite": (
        bad(anchor="start", anchor_weight={"0.bias": torch.full((8,), math.inf)}),
        NonFiniteError,
        r"anchor_weight\['0.bias'\]",
    ),
    "whole numbers": (
        bad(anchor="start", anchor_weight={"0.bias": torch.ones(8, dtype=torch.int64)}),
        TypeError,
        "floating-point tensor, got torch.int64",
    ),
    "a weight's shape": (
        bad(anchor="start", anchor_weight={"0.*": torch.ones(3)}),
        ShapeError,
        r"broadcasts to \(8, 4\) of '0.weight', got \(3,\)",
    ),
    "ties that differ": (
        lambda: realign(
            Tied(),
            TOKENS,
            steps=1,
            trainable="out.weight",
            anchor={"embed.weight": torch.ones(6, 4), "out.weight": torch.zeros(6, 4)},
        ),
        StateMismatchError,
        "'embed.weight'.*'out.weight'.*one tensor",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
