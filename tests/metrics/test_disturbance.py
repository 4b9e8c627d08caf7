"""The disturbance test: its standard deviation against other ways to get it, and its three rates by simulation."""

import pytest
import torch
from scipy.stats import binom, norm
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.checkpoint import checkpoint

from helpers.two_inputs import Sum
from rmtllmf.errors import InputError
from rmtllmf.metrics import disturbance_test


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * gaussian(*parameter.shape, seed=parameter.numel())
    return model


VARIANCES = {"0.weight": 1e-4, "0.bias": 2e-4, "2.weight": 0.0, "2.bias": 3e-4, "3.weight": 5e-4, "3.bias": 1e-3}


def test_the_closed_form_of_a_linear_model():
    model = nn.Linear(5, 3).double()
    undisturbed = {name: gaussian(*tensor.shape, seed=1) for name, tensor in model.state_dict().items()}
    disturbed = {name: tensor + 0.1 * gaussian(*tensor.shape, seed=2) for name, tensor in undisturbed.items()}
    x = gaussian(7, 5, seed=3)
    found = disturbance_test(model, undisturbed, disturbed, {"weight": 0.3, "bias": 0.2}, x, alpha=0.1)
    sd = (0.3 * x.square().sum(-1, keepdim=True) + 0.2).sqrt().expand(7, 3)
    before = x @ undisturbed["weight"].T + undisturbed["bias"]
    after = x @ disturbed["weight"].T + disturbed["bias"]
    torch.testing.assert_close(found.sd, sd)
    torch.testing.assert_close(found.threshold, norm.ppf(0.95) * sd)
    torch.testing.assert_close(found.statistic, (after - before).abs())
    torch.testing.assert_close(found.ratio, before / after)
    assert torch.equal(found.rejected, found.statistic > found.threshold)


@pytest.mark.parametrize("tolerated", [3e-4, VARIANCES], ids=["one number", "by name"])
def test_the_sd_of_an_mlp_against_jacobians_and_finite_differences(tolerated):
    model = mlp()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = gaussian(3, 4, seed=9)
    found = disturbance_test(model, state, state, tolerated, x)
    variances = tolerated if isinstance(tolerated, dict) else dict.fromkeys(state, tolerated)
    jacobians = [jacrev(lambda p, one=one: functional_call(model, p, (one,)))(state) for one in x]
    for index, jacobian in enumerate(jacobians):
        variance = sum(variances[name] * j.flatten(1).square().sum(-1) for name, j in jacobian.items())
        torch.testing.assert_close(found.sd[index], variance.sqrt())
    # finite differences, entry by entry
    total = torch.zeros(3, 3, dtype=torch.float64)
    for name, tensor in state.items():
        for entry in range(tensor.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                bent = tensor.clone()
                bent.view(-1)[entry] += step
                ends.append(functional_call(model, {**state, name: bent}, (x,)))
            total += variances[name] * ((ends[0] - ends[1]) / 2e-6).square()
    torch.testing.assert_close(found.sd, total.sqrt().detach(), rtol=1e-6, atol=1e-9)


LOGITS, DRAWS, ALPHA = 1000, 4, 0.05


def rate(factor, seed):
    """Share of rejections over independent logits of a linear model, whose weights have `factor` times the variance."""
    model = nn.Linear(6, LOGITS)
    before = {
        name: gaussian(*tensor.shape, seed=seed, dtype=torch.float32) for name, tensor in model.state_dict().items()
    }
    tolerated = {"weight": 0.04, "bias": 0.01}
    count = 0
    for draw in range(DRAWS):
        after = {
            name: tensor
            + (factor * tolerated[name]) ** 0.5 * gaussian(*tensor.shape, seed=seed + 10 * draw + k).float()
            for k, (name, tensor) in enumerate(before.items(), 1)
        }
        x = gaussian(1, 6, seed=seed + 1000 * draw, dtype=torch.float32)
        count += int(disturbance_test(model, before, after, tolerated, x, alpha=ALPHA).rejected.sum())
    return count


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0, 4.0, 25.0])
def test_the_rates_of_a_linear_model(factor):
    """0 without noise, alpha at the tolerated variance, 2 (1 - Phi(z/sqrt r)) at r times it.

    The logits' noises are independent, so the count is binomial; it must lie within the central interval of
    probability 1 - 1e-6 (at r = 1: .05 of 4,000 with standard deviation .0034).
    """
    expected = 0.0 if factor == 0 else 2 * norm.sf(norm.ppf(1 - ALPHA / 2) / factor**0.5)
    low, high = binom.interval(1 - 1e-6, LOGITS * DRAWS, expected) if factor else (0, 0)
    assert low <= rate(factor, seed=5) <= high
    if factor == 1:
        assert expected == pytest.approx(ALPHA)


def test_entries_that_a_mapping_does_not_name_have_no_variance():
    model = mlp()
    x = gaussian(2, 4, seed=1)
    some = disturbance_test(model, model, model, {"3.bias": 0.25}, x)
    torch.testing.assert_close(some.sd, torch.full((2, 3), 0.5, dtype=torch.float64))
    none = disturbance_test(model, model, model, {}, x)
    assert not none.sd.any()
    assert not none.rejected.any()
    other = {name: tensor + 0.1 for name, tensor in model.state_dict().items()}
    assert disturbance_test(model, model, other, 0.0, x).rejected.all()


def test_the_model_is_left_alone():
    model = nn.Sequential(mlp(), nn.BatchNorm1d(3).double(), nn.Dropout(0.5))
    model[1].running_var.fill_(4.0)
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    with torch.no_grad():
        found = disturbance_test(model, model, other, 1e-3, gaussian(3, 4))
    assert found.sd.shape == (3, 3)
    assert bool((found.sd > 0).all())
    assert not any(getattr(value, "requires_grad", False) for value in vars(found).values())
    assert (model.training, model[1].training, model[2].training) == (True, True, False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="running_mean"):
        disturbance_test(model, model, other, {"1.running_mean": 1.0}, gaussian(3, 4))


def test_the_callers_tensors_are_left_alone():
    model = mlp()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    disturbance_test(model, state, state, 1e-3, gaussian(2, 4))
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in state.values())


def test_tied_entries_count_once_under_either_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.last = nn.Linear(3, 3, bias=False)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(self.first(x))

    model, x = Tied().double(), gaussian(2, 3)
    everything = disturbance_test(model, model, model, 0.1, x)
    weight = model.first.weight.detach()
    for index, one in enumerate(x):
        jacobian = jacrev(lambda w, one=one: w @ (w @ one))(weight)
        torch.testing.assert_close(everything.sd[index], (0.1 * jacobian.flatten(1).square().sum(-1)).sqrt())
    for name in ("first.weight", "last.weight"):
        assert torch.equal(disturbance_test(model, model, model, {name: 0.1}, x).sd, everything.sd)
    with pytest.raises(ValueError, match="tied twin"):
        disturbance_test(model, model, model, {"first.weight": 0.1, "last.weight": 0.2}, x)


def test_inputs_of_several_arguments():
    model, left, right = Sum(), gaussian(3, 4).float(), gaussian(3, 4, seed=1).float()
    results = [
        disturbance_test(model, model, model, 0.1, inputs).sd
        for inputs in ((left, right), [left, right], {"left": left, "right": right})
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(
        results[0], (0.1 * ((left + right).double().square().sum(-1, keepdim=True) + 1)).sqrt().expand(3, 2)
    )


def test_small_levels_keep_their_digits():
    model, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    found = disturbance_test(model, model, model, 1.0, x, alpha=1e-12)
    assert float(found.threshold) == pytest.approx(norm.isf(5e-13), rel=1e-12)


class Checkpointed(nn.Module):
    """Recomputes its forward pass in the backward pass, as large models do to save memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(torch.tanh(checkpoint(self.first, x, use_reentrant=False)).square())


def test_checkpointing_recomputes_with_the_given_parameters():
    """Not with those that the model happens to hold."""
    model = Checkpointed()
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    other = {name: 100 * tensor for name, tensor in state.items()}
    x = torch.randn(4, 3)
    model.load_state_dict(other)
    found = disturbance_test(model, state, other, 1e-4, x).sd
    model.load_state_dict(state)
    torch.testing.assert_close(found, disturbance_test(model, state, other, 1e-4, x).sd)


def test_no_gradient_is_an_error_and_not_a_rejection():
    class Locked(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    model = Locked(3, 2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="no_grad"):
        disturbance_test(model, state, state, 1.0, torch.ones(1, 3))
    assert not disturbance_test(model, state, state, 0.0, torch.ones(1, 3)).rejected.any()
