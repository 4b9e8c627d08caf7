"""Metrics-weighted averaging: the weights, their limits, gradients and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtllmf.errors import InputError, ShapeError
from rmtllmf.taskvec import metric_weights, metrics_weighted_average, weighted_average

losses = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def vectors(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(7, generator=draw, dtype=torch.float64)} for _ in range(count)]


@settings(deadline=None, max_examples=25)
@given(values=losses, penalty=st.floats(0, 5))
def test_the_formula(values, penalty):
    for larger_is_better, sign in ((False, -1), (True, 1)):
        powers = [value ** (sign * penalty) for value in values]
        expected = [power / sum(powers) for power in powers]
        assert metric_weights(values, penalty, larger_is_better=larger_is_better) == pytest.approx(expected, rel=1e-9)
    made = vectors(len(values))
    fused = metrics_weighted_average(made, values, penalty)["w"]
    torch.testing.assert_close(fused, weighted_average(made, weights=metric_weights(values, penalty))["w"])


def test_better_ones_count_for_more_and_the_penalty_says_how_much():
    values = [0.5, 0.4, 0.9]
    assert metric_weights(values, 0.0) == pytest.approx([1 / 3] * 3)
    best = [metric_weights(values, penalty)[1] for penalty in (0.0, 1.0, 2.0, 8.0, 1e6)]
    assert best == sorted(best)
    assert best[-1] == 1
    assert metric_weights([100, 200, 300], larger_is_better=True) == pytest.approx([1 / 6, 1 / 3, 1 / 2])  # steps
    assert metric_weights([1e-300, 1e300], 3.0) == [1, 0]  # no overflow on the way


def test_scale_and_weights():
    made = vectors(2)
    plain = metrics_weighted_average(made, [1.0, 3.0])["w"]
    torch.testing.assert_close(plain, 0.75 * made[0]["w"] + 0.25 * made[1]["w"])
    torch.testing.assert_close(metrics_weighted_average(made, [1.0, 3.0], scale=2.0)["w"], 2 * plain)
    weighted = metrics_weighted_average(made, torch.tensor([1.0, 3.0]), weights=[0.0, 4.0])["w"]
    torch.testing.assert_close(weighted, made[1]["w"])


def test_gradients():
    x, y = (vector["w"].requires_grad_() for vector in vectors(2))

    def fused(x, y):
        return metrics_weighted_average([{"w": x}, {"w": y}], [0.3, 0.5], 2.0)["w"]

    assert torch.autograd.gradcheck(fused, (x, y))


@pytest.mark.parametrize(
    ("metrics", "arguments", "error", "message"),
    [
        ([1.0], {}, ShapeError, "metrics: expected 2 numbers, one for each vector, got 1"),
        ([], {}, InputError, "metrics: expected at least one number, got none"),
        ([1.0, 0.0], {}, InputError, r"metrics\[1\]: expected a positive finite number, got 0.0"),
        ([1.0, math.nan], {}, InputError, r"metrics\[1\]"),
        ([1.0, "a"], {}, TypeError, r"metrics\[1\]: expected a real number, got str"),
        (0.5, {}, TypeError, "metrics: expected a number for each vector, got float"),
        ([1.0, 2.0], {"penalty": -1.0}, InputError, "penalty: expected a number of at least 0, got -1"),
        ([1.0, 2.0], {"larger_is_better": "no"}, TypeError, "larger_is_better: expected True or False, got 'no'"),
        ([1.0, 2.0], {"scale": math.inf}, InputError, "scale"),
    ],
)
def test_bad_input(metrics, arguments, error, message):
    with pytest.raises(error, match=message):
        metrics_weighted_average(vectors(2), metrics, **arguments)
