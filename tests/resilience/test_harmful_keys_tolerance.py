"""What is restored beyond what noise harms, until the disturbance that is left is tolerated."""

import math
from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.draws import normal, orthogonal
from helpers.known_errors import correlated
from rmtllmf.channel import transmit
from rmtllmf.resilience._energy import energy_of
from rmtllmf.resilience._noise import KnownNoise
from rmtllmf.resilience.harmful_keys import harmful_keys
from rmtllmf.taskvec import task_arithmetic


def test_the_variance_of_a_loss_that_is_linear():
    """That of 200 transmissions, within 4 standard errors (40 %), at the scale of task arithmetic or another."""
    importance = {"w0": 1.0, "w1": 9.0, "w2": 0.04}
    slope = {key: weight**0.5 * normal(20 + 9 * k, seed=k).sign() for k, (key, weight) in enumerate(importance.items())}
    sent = [{key: 100 * normal(*c.shape, seed=[q, len(c)]) for key, c in slope.items()} for q in range(3)]
    E = 0.8 + 0.2 * np.eye(3)  # the sum's noise is 2.6 times that of independent users
    reception = correlated(np.stack([E, 3 * E]))
    losses = {0.3: [], 2.0: []}
    for seed in range(200):
        received = transmit(sent, reception, seed=seed, scale=1.0)
        for scale, values in losses.items():
            fused = task_arithmetic(received, scale=scale)
            values.append(sum(float((slope[key] * fused[key]).sum()) for key in slope))
    for options, values in zip(({}, {"fusion_scale": 2.0}), losses.values(), strict=True):
        variance = np.var(values, ddof=1)
        common = {"scale": 1.0, "importance": importance, **options}
        assert harmful_keys(received, reception, tolerance=1.4 * variance, **common) == ()
        assert harmful_keys(received, reception, tolerance=variance / 1.4, **common) != ()


def test_what_is_restored_first_is_what_says_least_for_its_noise_not_what_disturbs_most():
    """Each alone would do: noise over signal is .5, .1 and .2, and importance makes the second disturb most."""
    sent = orthogonal([[2.0, 10.0, 5.0]], 4000)
    received = transmit(sent, [1.0], seed=0, scale=1.0)
    importance = {"w0": 1.0, "w1": 3.0, "w2": 1.5}
    for tolerance, restored in ((5.6, ()), (5.4, ("w0",)), (4.4, ("w0", "w2")), (2.9, ("w0", "w1", "w2"))):
        found = harmful_keys(received, [1.0], scale=1.0, importance=importance, tolerance=4000 * tolerance)
        assert found == restored


@st.composite
def problems(draw):
    tensors = draw(st.integers(1, 6))
    numbers = st.lists(st.floats(1e-2, 1e2), min_size=tensors, max_size=tensors)
    return {
        "sizes": draw(st.lists(st.integers(1, 40), min_size=tensors, max_size=tensors)),
        "energies": draw(numbers),
        "importance": draw(st.lists(st.sampled_from([0.0, 0.01, 1.0, 7.0]), min_size=tensors, max_size=tensors)),
        "kappa": draw(st.sampled_from([0.5, 1.0, 30.0])),
        "mse": draw(st.lists(st.floats(0.01, 3), min_size=2, max_size=2)),
        "tolerance": draw(st.floats(0, 30)),
        "seed": draw(st.integers(0, 1000)),
    }


@given(problems())
@settings(max_examples=30)
def test_the_tolerance_is_met_monotone_and_costs_nearly_the_least(problem):
    """Against all subsets: what is lost without the last tensor that was restored is less than any choice loses."""
    names = [f"w{k}" for k in range(len(problem["sizes"]))]
    received = [
        {
            name: energy**0.5 * normal(size, seed=[problem["seed"], q, k])
            for k, (name, size, energy) in enumerate(zip(names, problem["sizes"], problem["energies"], strict=True))
        }
        for q in range(2)
    ]
    mse, factor, tolerance = problem["mse"], 0.5, problem["tolerance"]
    importance = dict(zip(names, problem["importance"], strict=True))
    disturbance = {
        name: factor**2 * importance[name] * size * sum(mse) for name, size in zip(names, problem["sizes"], strict=True)
    }
    energy = energy_of(KnownNoise.of(received, mse, scale=1.0))
    worth = {
        name: importance[name] * problem["kappa"] * size * float(energy.of(name).sum())
        for name, size in zip(names, problem["sizes"], strict=True)
    }
    common = {"scale": 1.0, "sensitivity": problem["kappa"]}

    def chosen(level):
        return harmful_keys(
            received, mse, fusion_scale=factor, importance={**importance, "other": 1.0}, tolerance=level, **common
        )

    def left(restored):
        return math.fsum(disturbance[name] for name in names if name not in restored)

    harmful = set(harmful_keys(received, mse, **common))
    found = set(chosen(tolerance))
    assert found >= harmful
    assert left(found) <= tolerance * (1 + 1e-12)
    assert set(chosen(2 * tolerance)) <= found <= set(chosen(tolerance / 2))
    assert set(chosen(0.0)) == harmful | {name for name in names if disturbance[name] > 0}
    assert set(chosen(1e9)) == harmful
    more = found - harmful
    if more:
        last = max(more, key=lambda name: worth[name] / disturbance[name])
        assert left(found - {last}) > tolerance
        free = [name for name in names if name not in harmful]
        least = min(
            sum(worth[name] for name in some)
            for n in range(len(free) + 1)
            for some in combinations(free, n)
            if left(harmful | set(some)) <= tolerance
        )
        assert sum(worth[name] for name in more - {last}) <= least * (1 + 1e-9)
