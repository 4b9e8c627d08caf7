"""Shares of rejected inputs, against counts by hand and scipy's intervals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, t
from torch import nn

from rmtllmf.errors import InputError
from rmtllmf.metrics import DisturbanceTest, disturbance_test, rejection_rate, task_disturbance


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outcome(statistic, predicted, *, alpha=0.05, degrees=float("inf")):
    statistic = torch.as_tensor(statistic, dtype=torch.float64)
    one = torch.ones_like(statistic)
    threshold = t.isf(alpha / 2, degrees) * one
    return DisturbanceTest(
        one, statistic, one, threshold, statistic > threshold, torch.as_tensor(predicted), alpha, degrees
    )


@given(hits=st.integers(0, 30), rest=st.integers(0, 30), level=st.floats(0.5, 0.999))
def test_the_interval_of_clopper_and_pearson(hits, rest, level):
    if not hits + rest:
        return
    rate = rejection_rate(outcome([[9.0]] * hits + [[0.0]] * rest, [0] * (hits + rest)), level=level)
    known = binomtest(hits, hits + rest).proportion_ci(level, method="exact")
    assert (rate.share, rate.count, rate.expected) == (hits / (hits + rest), hits + rest, 0.05)
    assert (rate.low, rate.high) == pytest.approx((known.low, known.high), abs=1e-9)


def test_what_counts_as_a_rejected_input():
    """Three logits: alone the threshold is 1.96, with Bonferroni 2.39; only the predicted logit counts by default."""
    statistic = [[2.2, 0, 0], [0, 2.2, 0], [0, 0, 2.5], [0, 9, 0]]
    test = outcome(statistic, [0, 0, 2, 1])
    assert norm.isf(0.05 / 6) == pytest.approx(2.39, abs=0.01)
    assert rejection_rate(test).share == 0.75
    assert rejection_rate(test, per="any").share == 0.5
    # Student's quantiles for estimated deviations: 2.78 alone, 3.96 with Bonferroni
    few = outcome([[3.0, 0, 0], [4.0, 0, 0]], [0, 0], degrees=4)
    assert rejection_rate(few).share == 1
    assert rejection_rate(few, per="any").share == 0.5


def test_the_mean_rate_under_h0_is_alpha():
    """Over 100 draws of disturbance and tangents with 3 predictions each; the draws are independent, so the standard
    error is that of their shares."""
    model, x, shares = nn.Linear(5, 4).double(), gaussian(3, 5, seed=1), []
    state = {name: gaussian(*v.shape, seed=2) for name, v in model.state_dict().items()}
    for draw in range(100):
        bent = {name: v + 0.1 * gaussian(*v.shape, seed=100 + 2 * draw + len(name) % 2) for name, v in state.items()}
        test = disturbance_test(model, state, bent, 0.01, x, method="jvp", seed=draw, alpha=0.3)
        shares.append(rejection_rate(test).share)
    shares = torch.tensor(shares)
    assert float(shares.mean()) == pytest.approx(0.3, abs=4 * float(shares.std()) / 10)
    assert float(shares.std()) > 0


def setting():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, heads = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double(), [nn.Linear(4, k).double() for k in (3, 6)]
    bent = {name: v + 0.2 * gaussian(*v.shape, seed=3) for name, v in encoder.state_dict().items()}
    data = [gaussian(40, 5, seed=5), 2 * gaussian(30, 5, seed=6)]
    return encoder, bent, heads, data


@pytest.mark.parametrize("method", ["exact", "jvp"])
@pytest.mark.parametrize("per", ["prediction", "any"])
def test_a_task_is_one_test_of_all_its_inputs(method, per):
    encoder, bent, heads, data = setting()
    tasks = {
        name: (head, [(part, torch.zeros(len(part))) for part in x.split(16)])
        for name, head, x in zip("ab", heads, data, strict=True)
    }
    options = {"alpha": 0.1, "method": method, "seed": 1, "tangents": 3}
    rates = task_disturbance(encoder, encoder, bent, 0.004, tasks, per=per, level=0.8, **options)
    assert list(rates) == ["a", "b"]
    for rate, head, x in zip(rates.values(), heads, data, strict=True):
        whole = disturbance_test(encoder, encoder, bent, 0.004, x, head=head, **options)
        assert rate == rejection_rate(whole, per=per, level=0.8)
        assert 0 < rate.share < 1
        assert rate.count == len(x)


def test_the_same_tangents_for_all_batches_even_from_a_generator():
    encoder, bent, heads, data = setting()
    rates = [
        task_disturbance(
            encoder,
            encoder,
            bent,
            0.004,
            {"a": (heads[0], [(part, torch.zeros(len(part))) for part in data[0].split(size)])},
            seed=torch.Generator().manual_seed(4),
        )
        for size in (7, 40)
    ]
    assert rates[0] == rates[1]


def test_a_complete_model_and_modes_put_back():
    encoder, bent, heads, data = setting()
    model = nn.Sequential(encoder, heads[0])
    state = model.state_dict() | {f"0.{name}": v for name, v in bent.items()}
    tolerated = {f"0.{name}": 0.004 for name in bent}
    batches = [(data[0], torch.zeros(40))]
    heads[0].eval()
    complete = task_disturbance(model, model, state, tolerated, {"a": batches}, method="exact")
    assert complete == task_disturbance(encoder, encoder, bent, 0.004, {"a": (heads[0], batches)}, method="exact")
    assert encoder.training
    assert not heads[0].training


def test_bad_input():
    encoder, bent, _, data = setting()
    batches = [(data[0], torch.zeros(40))]

    def call(tasks, **options):
        return task_disturbance(encoder, encoder, bent, 0.004, tasks, **{"seed": 0, **options})

    for tasks, options, error, pattern in (
        (batches, {}, TypeError, "tasks: expected a mapping.*list"),
        ({}, {}, InputError, "tasks.*at least one"),
        ({"a": iter([])}, {}, InputError, r"tasks\['a'\].*at least one batch"),
        ({"a": [(data[0][:0], torch.zeros(0))]}, {}, InputError, "empty batch"),
        ({"a": batches}, {"per": "logit"}, InputError, "per: expected one of 'prediction', 'any', got 'logit'"),
        ({"a": batches}, {"level": 95}, InputError, "level.*between 0 and 1.*95"),
        ({"a": batches}, {"seed": None}, InputError, "seed.*'jvp'"),
    ):
        with pytest.raises(error, match=pattern):
            call(tasks, **options)
    with pytest.raises(TypeError, match="test: expected a DisturbanceTest, got list"):
        rejection_rate([])
