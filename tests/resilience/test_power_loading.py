"""Power loading: against a generic optimiser, the conditions of Karush, Kuhn and Tucker, and transmissions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.resilience.low_rank_code import low_rank_code
from rmtllmf.resilience.power_loading import loaded, power_loading
from rmtllmf.resilience.sign_code import sign_code
from rmtllmf.taskvec import TaskVector


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_energies(sizes, energies):
    """Tensors of exactly these sizes and mean squares."""
    result = {}
    for index, (size, energy) in enumerate(zip(sizes, energies, strict=True)):
        tensor = normal(size, seed=index) + 0.1
        result[f"t{index}"] = tensor * math.sqrt(energy * size) / tensor.norm()
    return result


def powers(vector, gains):
    """(sizes, mean squares, powers in units of the mean square of the vector) as arrays."""
    sizes = np.array([tensor.numel() for tensor in vector.values()], dtype=float)
    energies = np.array([float(tensor.square().mean()) for tensor in vector.values()])
    mean = (sizes * energies).sum() / sizes.sum()
    return sizes, energies, np.array([gains[name] ** 2 for name in vector]) * energies / mean


CASES = {
    "all alike": ([5, 5], [1.0, 1.0], [1.0, 1.0]),
    "sensitive": ([5, 50, 500], [1.0, 1.0, 1.0], [100.0, 10.0, 0.1]),
    "loud": ([7, 70, 300], [1e-4, 1.0, 30.0], [1.0, 1.0, 1.0]),
    "both": ([20, 10, 300, 40], [1e-3, 2.0, 0.3, 0.01], [5.0, 0.01, 1.0, 40.0]),
}


@pytest.mark.parametrize("noise", [None, 0.05, 1.0, 20.0])
@pytest.mark.parametrize(("sizes", "energies", "weights"), CASES.values(), ids=CASES)
def test_a_generic_optimiser_finds_nothing_better(sizes, energies, weights, noise):
    vector = with_energies(sizes, energies)
    gains = power_loading(vector, dict(zip(vector, weights, strict=True)), noise=noise)
    n, v, p = powers(vector, gains)
    w = np.array(weights)
    assert (n * p).sum() == pytest.approx(n.sum(), rel=1e-6)

    def error(power):
        return float((n * w * v / (power if noise is None else power + noise)).sum() / (n * w * v).sum())

    budget = {"type": "eq", "fun": lambda power: (n * power).sum() / n.sum() - 1}
    low = 1e-9 if noise is None else 0.0
    found = min(
        (
            minimize(
                error, start, bounds=[(low, None)] * len(n), constraints=budget, method="SLSQP", options={"ftol": 1e-14}
            )
            for start in (np.ones(len(n)), n.sum() / len(n) / n)
        ),
        key=lambda result: result.fun if abs((n * result.x).sum() / n.sum() - 1) < 1e-6 else math.inf,
    )
    assert error(p) <= found.fun * (1 + 1e-5)
    assert error(p) == pytest.approx(found.fun, rel=1e-2)
    assert error(p) <= error(np.ones(len(n))) * (1 + 1e-6)


@settings(max_examples=60)
@given(
    tensors=st.lists(
        st.tuples(st.integers(1, 30), st.floats(1e-3, 1e3), st.one_of(st.just(0.0), st.floats(1e-3, 1e3))),
        min_size=1,
        max_size=6,
    ).filter(lambda rows: any(row[2] for row in rows)),
    noise=st.one_of(st.none(), st.floats(1e-3, 1e3)),
)
def test_the_conditions_of_karush_kuhn_and_tucker(tensors, noise):
    """One price of power for all that is sent, and none worth more among what is not."""
    sizes, energies, weights = zip(*tensors, strict=True)
    vector = with_energies(sizes, energies)
    gains = power_loading(vector, dict(zip(vector, weights, strict=True)), noise=noise)
    n, v, p = powers(vector, gains)
    w = np.array(weights)
    assert (n * p).sum() == pytest.approx(n.sum(), rel=1e-6)
    on = p > 0
    worth = w[on] * v[on] / (p[on] + (noise or 0.0)) ** 2
    price = worth.mean()
    np.testing.assert_allclose(worth, price, rtol=1e-5)
    if noise is None:
        assert list(on) == list(w > 0)
    else:
        assert np.all(w[~on] * v[~on] / noise**2 <= price * (1 + 1e-5))


def test_the_water_level_leaves_tensors_dry():
    vector = with_energies([10, 10, 10], [1.0, 1e-2, 1e-4])
    sent = [sum(gain > 0 for gain in power_loading(vector, noise=noise).values()) for noise in (10.0, 0.3, 0.01, 1e-4)]
    assert sent == [1, 2, 3, 3]


def test_no_noise_is_the_first_problem():
    vector = with_energies([10, 20, 30], [1.0, 3.0, 0.1])
    first, limit = power_loading(vector), power_loading(vector, noise=1e-9)
    assert first == pytest.approx(limit, rel=1e-6)


def test_equal_energies_are_loaded_by_the_root_of_the_sensitivity():
    gains = power_loading(with_energies([10, 30], [2.0, 2.0]), {"t0": 81.0, "t1": 1.0})
    assert gains["t0"] ** 2 / gains["t1"] ** 2 == pytest.approx(9.0, rel=1e-6)
    assert 10 * gains["t0"] ** 2 + 30 * gains["t1"] ** 2 == pytest.approx(40, rel=1e-6)


def after_transmission(code, mse, trials, shrink=None):
    """(trials, tensors) squared errors of what is decoded."""
    truth = code.decode(code.sent)
    found = []
    for seed in range(trials):
        (received,) = transmit([code.sent], [mse], seed=seed)
        decoded = code.decode(received if shrink is None else shrink(received))
        found.append([float((decoded[name] - truth[name]).square().sum()) for name in truth])
    return np.array(found)


def test_the_error_after_transmission_is_the_least():
    sizes, energies, weights = CASES["both"]
    vector, w, mse = with_energies(sizes, energies), np.array(weights), 0.3
    n, v, total = np.array(sizes), np.array(energies), sum(sizes)
    code = loaded(vector, power_loading(vector, dict(zip(vector, weights, strict=True))))
    harm = after_transmission(code, mse, 400) @ w
    expected = mse * (n * np.sqrt(w * v)).sum() ** 2 / total
    assert abs(harm.mean() - expected) < 5 * harm.std() / 20
    assert harm.std() / 20 < 0.03 * expected
    plain = mse * (n * w).sum() * (n * v).sum() / total
    assert expected < 0.2 * plain


def test_shrinking_what_was_received_gives_the_posterior_mean():
    """The second problem's error, for normal entries: those below the water level cost their energy."""
    sizes, energies, noise = [40, 60, 400], [4.0, 1.0, 1e-3], 0.8
    vector = with_energies(sizes, energies)
    gains = power_loading(vector, noise=noise)
    n, v, p = powers(vector, gains)
    assert list(p > 0) == [True, True, False]
    code = loaded(vector, gains)
    shares = dict(zip(vector, p / (p + noise), strict=True))

    def shrink(received):
        return {name: shares[name] * tensor for name, tensor in received.items()}

    clean = code.decode(code.sent)
    assert not clean["t2"].any()
    found = []
    for seed in range(400):
        (received,) = transmit([code.sent], [noise], seed=seed)
        decoded = code.decode(shrink(received))
        found.append(sum(float((decoded[name] - vector[name]).square().sum()) for name in vector))
    expected = (n * v * noise / (p + noise)).sum()
    assert abs(np.mean(found) - expected) < 5 * np.std(found) / 20
    assert expected < (n * v * noise / (np.ones(3) + noise)).sum()


def test_an_encoding_is_loaded_on_top():
    vector = {"a": normal(10, 2) @ normal(2, 40, seed=1), "b": normal(40, 2, seed=2) @ normal(2, 10, seed=3)}
    code = low_rank_code(vector, rank=2)
    louder = loaded(code, {"a/A": 3.0, "a/B": 3.0, "b/A": 0.5, "b/B": 0.5})
    assert louder.bits == 4 * 32
    assert loaded(sign_code(vector), {"a": 1.0, "b": 2.0}).bits == 2 * 32 + 2 * 32
    for name, tensor in louder.decode(louder.sent).items():
        torch.testing.assert_close(tensor, vector[name], rtol=1e-9, atol=1e-9)
    before, after = (after_transmission(one, 1e-3, 100).mean(0) for one in (code, louder))
    assert after[0] < 0.7 * before[0]
    assert after[1] > 1.5 * before[1]


def test_a_round_trip_changes_nothing_that_is_sent():
    shared = normal(4, 4)
    vector = TaskVector({"a": shared, "tied": shared, "b": normal(5).float(), "zero": torch.zeros(2)})
    gains = power_loading(vector, {"a": 1.0, "tied": 3.0, "b": 1.0, "zero": 1.0})
    assert sorted(gains) == ["a", "b", "zero"]
    assert gains["zero"] == 0.0
    code = loaded(vector, gains)
    assert code.bits == 3 * 32
    assert loaded(vector, gains, gain_bits=0).bits == 0
    sent = sum(float(tensor.double().square().sum()) for tensor in code.sent.values())
    assert sent == pytest.approx(float(shared.square().sum() + vector["b"].double().square().sum()), rel=1e-6)
    decoded = code.decode(code.sent)
    assert type(decoded) is TaskVector
    assert decoded["tied"] is decoded["a"]
    for name in vector:
        torch.testing.assert_close(decoded[name], vector[name], rtol=1e-6, atol=0)


def test_tied_sensitivities_add_up():
    shared = normal(6)
    apart = power_loading({"a": shared, "b": normal(6, seed=1)}, {"a": 4.0, "b": 1.0})
    tied = power_loading({"a": shared, "z": shared, "b": normal(6, seed=1)}, {"a": 1.0, "z": 3.0, "b": 1.0})
    assert apart == tied


def test_gains_are_those_that_float32_can_tell():
    for gain in power_loading({"a": normal(7), "b": normal(9, seed=1) ** 3}).values():
        assert gain == float(np.float32(gain))
    code = loaded({"a": torch.ones(2, dtype=torch.float64)}, {"a": 0.1})
    assert code.sent["a"][0].item() == float(np.float32(0.1))


W = {"w": torch.ones(3), "v": torch.ones(2)}
BAD = {
    "all zero": (lambda: power_loading({"w": torch.zeros(3)}), InputError, "vector: is all zero"),
    "no sensitivity": (lambda: power_loading(W, {"w": 0, "v": 0}), InputError, "sensitivity: is 0 wherever"),
    "missing": (lambda: power_loading(W, {"w": 1.0}), StateMismatchError, "sensitivity lacks 'v'"),
    "unknown": (lambda: power_loading(W, {"w": 1.0, "v": 1.0, "x": 1.0}), StateMismatchError, "unexpected 'x'"),
    "negative": (
        lambda: power_loading(W, {"w": -1.0, "v": 1.0}),
        InputError,
        "sensitivity.'w'.: .* at least 0, got -1",
    ),
    "nan": (lambda: power_loading(W, {"w": math.nan, "v": 1.0}), InputError, "sensitivity.'w'."),
    "a list": (lambda: power_loading(W, [1.0, 1.0]), TypeError, "sensitivity: expected a mapping"),
    "no noise": (lambda: power_loading(W, noise=0.0), InputError, "noise: expected a positive"),
    "no vector": (lambda: power_loading([1.0]), TypeError, "vector: expected a mapping"),
    "infinite": (lambda: power_loading({"w": torch.tensor([math.inf])}), NonFiniteError, "vector.'w'."),
    "other names": (lambda: loaded(W, {"w": 1.0}), StateMismatchError, "gains lacks 'v'"),
    "negative gain": (lambda: loaded(W, {"w": -1.0, "v": 1.0}), InputError, "gains.'w'.: .* at least 0"),
    "silence": (lambda: loaded(W, {"w": 0.0, "v": 0.0}), InputError, "gains: expected at least one above 0"),
    "list of gains": (lambda: loaded(W, [1.0, 1.0]), TypeError, "gains: expected a mapping"),
    "too large": (lambda: loaded(W, {"w": 1e60, "v": 1.0}), InputError, "does not fit into float32"),
    "overflow": (lambda: loaded({"w": torch.full((2,), 1e38)}, {"w": 1e9}), NonFiniteError, "overflows"),
    "bits": (lambda: loaded(W, {"w": 1.0, "v": 1.0}, gain_bits=-1), InputError, "gain_bits: expected a whole number"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
