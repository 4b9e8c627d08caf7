"""The sum that is drawn at once has the distribution of the sum of what `transmit` gives, and of the formula."""

import math

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal, random_covariance
from rmtllmf.channel import Reception, lmmse, transmit, transmit_sum
from rmtllmf.errors import NonFiniteError
from rmtllmf.taskvec import TaskVector, task_arithmetic

USERS = 3
WEIGHTS = [1.0, -0.5, 2.0]
MSE = np.array([0.05, 0.3, 0.9])


@pytest.fixture(scope="module")
def vectors():
    """Several chunks, odd lengths, and tensors and vectors of very different sizes of entries."""
    sent = []
    for q in range(USERS):
        source = torch.Generator().manual_seed(q)
        sizes = {"a": (1, (3,)), "b": (0.02, (301, 257)), "c": (0.3, (250_001,)), "d": (0.1, (1,)), "e": (1, (0, 3))}
        sent.append(
            {key: (q + 1) * size * torch.randn(shape, generator=source) for key, (size, shape) in sizes.items()}
        )
    return sent


def flat(vector):
    return torch.cat([vector[key].reshape(-1) for key in sorted(vector)]).double().numpy()


def scale_of(vector, scale):
    """(n,) what every coefficient is divided by."""
    whole = flat(vector)
    if isinstance(scale, float):
        return np.full_like(whole, scale)
    measure = (lambda x: np.sqrt(np.mean(x**2))) if scale.endswith("rms") else (lambda x: np.abs(x).max())
    if not scale.startswith("tensor"):
        return np.full_like(whole, measure(whole))
    parts = [vector[key].double().numpy().ravel() for key in sorted(vector) if vector[key].numel()]
    return np.concatenate([np.full(len(part), measure(part)) for part in parts])


def law(reception, estimator):
    """Gains and noise covariance."""
    one = np.ones(USERS)
    if isinstance(reception, Reception):
        if estimator == "additive":
            return one, reception.error_covariance
        if estimator == "mmse":
            return reception.gain, reception.noise_covariance
        return one, reception.noise_covariance / np.outer(reception.gain, reception.gain)
    variance = {"additive": MSE, "mmse": MSE * (1 - MSE), "unbiased": MSE / (1 - MSE)}[estimator]
    return (1 - MSE if estimator == "mmse" else one), np.diag(variance).astype(complex)


def check_white(z, bound=5.0):
    """Unit Gaussian noise: mean, variance, fourth moment, and no covariance within, across and far beyond symbols."""
    n = len(z)
    assert abs(z.mean()) < bound / math.sqrt(n)
    assert abs((z**2).mean() - 1) < bound * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < bound * math.sqrt(96 / n)
    for lag in (1, 2, 3, 1 << 16, 1 << 17):
        assert abs((z[lag:] * z[:-lag]).mean()) < bound / math.sqrt(n - lag)
    even, odd = z[0::2], z[1::2]
    assert abs((even[: len(odd)] * odd).mean()) < bound / math.sqrt(len(odd))
    assert abs((even[1:] * odd[: len(even) - 1]).mean()) < bound / math.sqrt(len(odd) - 1)


@pytest.mark.parametrize("scale", ["rms", "peak", "tensor_rms", "tensor_peak", 0.01])
@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_the_law_of_the_sum(vectors, mismatched, kind, estimator, scale):
    """Divided by its deviation by the formula, the error is white; so is that of `transmit` and adding up."""
    reception = MSE if kind == "independent" else mismatched
    gain, covariance = law(reception, estimator)
    a = np.stack([w * scale_of(v, scale) for w, v in zip(WEIGHTS, vectors, strict=True)])
    deviation = np.sqrt(np.einsum("qn,qr,rn->n", a, covariance.real, a))
    signal = sum(w * g * flat(v) for w, g, v in zip(WEIGHTS, gain, vectors, strict=True))
    options = {"estimator": estimator, "scale": scale}
    at_once = transmit_sum(vectors, reception, seed=4, weights=WEIGHTS, **options)
    check_white((flat(at_once) - signal) / deviation)
    two_steps = task_arithmetic(transmit(vectors, reception, seed=5, **options), 1.0, weights=WEIGHTS)
    check_white((flat(two_steps) - signal) / deviation)


@pytest.mark.parametrize("draw", ["at once", "in two steps"])
def test_symbols_that_lie_in_two_tensors(draw):
    """Where the scale changes within a symbol, its parts are correlated by Im(E): 20,000 tensors of one coefficient."""
    rng = np.random.default_rng(0)
    phases = np.exp(1j * np.array([0.0, 1.3, 2.5]))
    E = 0.8 * np.outer(phases, phases.conj()) + 0.2 * random_covariance(rng, 3, 3) / 3
    rx = Reception(None, None, None, None, None, E, None)
    a, b = np.array([1.0, 0.25, 0.5]), np.array([0.125, 2.0, -0.5])
    sizes = np.tile(np.stack([a, np.abs(b)], 1), 10_000)  # of coefficients: "tensor_peak" is their magnitude
    sent = [{f"{i:05d}": torch.tensor([size], dtype=torch.float64) for i, size in enumerate(row)} for row in sizes]
    expected = np.array([[a @ E.real @ a, abs(b) @ E.imag @ a], [abs(b) @ E.imag @ a, abs(b) @ E.real @ abs(b)]])
    assert abs(expected[0, 1]) > 0.3 * math.sqrt(expected[0, 0] * expected[1, 1])
    if draw == "at once":
        heard = transmit_sum(sent, rx, seed=0, scale="tensor_peak")
    else:
        heard = task_arithmetic(transmit(sent, rx, seed=1, scale="tensor_peak"), 1.0)
    error = (flat(heard) - sizes.sum(0)).reshape(-1, 2)
    n = len(error)
    power = np.diag(expected)
    standard = np.sqrt((np.outer(power, power) + expected**2) / n)
    assert np.all(np.abs(error.T @ error / n - expected) < 5 * standard), (error.T @ error / n, expected)
    z = error / np.sqrt(power)
    assert np.all(np.abs(z[1:].T @ z[:-1]) < 5 * math.sqrt(n))  # and nothing across symbols


def test_block_fading_with_gains(vectors):
    """A block without noise is the sum, one of nothing but noise is silent under "mmse", the third has its own law."""
    blocks = np.array([[0.0, 0.0, 0.0], [0.2, 0.5, 0.9], [1.0, 1.0, 1.0]])
    heard = flat(transmit_sum(vectors, blocks, seed=3, weights=WEIGHTS, estimator="mmse"))
    plain = flat(task_arithmetic(vectors, 1.0, weights=WEIGHTS))
    symbols = -(-len(plain) // 2)
    first, second = 2 * -(-symbols // 3), 2 * -(-2 * symbols // 3)
    np.testing.assert_array_equal(heard[:first], plain[:first])
    assert not heard[second:].any()
    gain, noise = 1 - blocks[1], blocks[1] * (1 - blocks[1])
    signal = sum(w * g * flat(v) for w, g, v in zip(WEIGHTS, gain, vectors, strict=True))
    a = np.array([w * scale_of(v, "rms")[0] for w, v in zip(WEIGHTS, vectors, strict=True)])
    z = (heard - signal)[first:second] / np.sqrt(np.sum(noise * a**2))
    assert abs(np.mean(z**2) - 1) < 5 * math.sqrt(2 / len(z))
    assert abs(np.mean(z[1:] * z[:-1])) < 5 / math.sqrt(len(z))


def test_blocks_of_correlated_users(vectors):
    fading = lmmse(complex_normal(np.random.default_rng(5), 2, 4, USERS), 0.5, np.eye(4), designed_for=0.1 * np.eye(4))
    error = flat(transmit_sum(vectors, fading, seed=3, scale=1.0)) - sum(map(flat, vectors))
    symbols = (len(error) + 1) // 2
    half = 2 * ((symbols + 1) // 2)
    for E, part in zip(fading.error_covariance, (error[:half], error[half:]), strict=True):
        assert np.mean(part**2) / E.real.sum() == pytest.approx(1, abs=5 * math.sqrt(2 / len(part)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_noise_is_the_plain_sum(vectors, dtype):
    sent = [{key: value.to(dtype) for key, value in vector.items()} for vector in vectors]
    for estimator in ("additive", "mmse", "unbiased"):
        heard = transmit_sum(sent, 0.0, seed=0, estimator=estimator)
        plain = task_arithmetic(sent, 1.0)
        assert all(torch.equal(heard[key], plain[key]) and heard[key].dtype == dtype for key in plain)


def test_errors_that_cancel_leave_no_noise(vectors):
    """All users share one error, and the weights take it out."""
    rx = Reception(None, None, None, None, None, np.ones((3, 3)) + 0j, None)
    heard = transmit_sum(vectors, rx, seed=0, weights=[1.0, -0.5, -0.5], scale=1.0)
    exact = flat(vectors[0]) - 0.5 * flat(vectors[1]) - 0.5 * flat(vectors[2])
    np.testing.assert_allclose(flat(heard), exact, atol=1e-6)


def test_the_same_bits_whatever_the_key_order_and_number_of_threads(vectors, mismatched):
    first = transmit_sum(vectors, mismatched, seed=9, scale="tensor_rms")
    backwards = [{key: vector[key] for key in reversed(list(vector))} for vector in vectors]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = transmit_sum(backwards, mismatched, seed=9, scale="tensor_rms")
            assert all(torch.equal(first[key], again[key]) for key in first)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert list(again) == list(backwards[0])
    other = transmit_sum(vectors, mismatched, seed=10, scale="tensor_rms")
    assert not any(torch.equal(first[key], other[key]) for key in first if first[key].numel())


def test_randomness_is_explicit(vectors):
    before = torch.get_rng_state()
    source = torch.Generator().manual_seed(3)
    one, two = (transmit_sum(vectors, 0.1, seed=source)["b"] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, two)
    assert torch.equal(one, transmit_sum(vectors, 0.1, seed=torch.Generator().manual_seed(3))["b"])


def test_out_is_what_the_result_is_made_of(vectors, mismatched):
    sent = [{**vector, "steps": torch.tensor(3), "n.running_mean": torch.ones(4)} for vector in vectors]
    for vector in sent:
        vector["tied"] = vector["b"]
    fresh = transmit_sum(sent, mismatched, seed=3)
    assert fresh["tied"].data_ptr() == fresh["b"].data_ptr()
    assert fresh["steps"] is not sent[0]["steps"]
    out = {key: torch.full_like(value, 77) for key, value in sent[0].items()}
    out["c"] = torch.empty(250_001, 2)[:, 1]  # not contiguous
    got = transmit_sum(sent, mismatched, seed=3, out=out)
    assert all(torch.equal(fresh[key], got[key]) and got[key].data_ptr() == out[key].data_ptr() for key in fresh)
    sent = [TaskVector(vector) for vector in vectors]
    into = sent[0] * 0.0
    got = transmit_sum(sent, mismatched, seed=3, out=into)
    assert isinstance(got, TaskVector)
    assert got["b"].data_ptr() == into["b"].data_ptr()
    assert torch.equal(got["b"], fresh["b"])


def test_the_wider_dtype_where_they_differ():
    sent = [{"w": torch.ones(1001), "x": torch.ones(3)}, {"w": torch.ones(1001).double(), "x": torch.ones(3).half()}]
    heard = transmit_sum(sent, 0.1, seed=0)
    assert (heard["w"].dtype, heard["x"].dtype) == (torch.float64, torch.float32)
    error = heard["w"] - 2
    assert not torch.equal(error, error.float().double())  # noise in double precision


def test_transposed_vectors_are_sent_in_their_own_order(vectors):
    turned = [{"b": vector["b"].T} for vector in vectors]
    straight = [{"b": vector["b"].T.contiguous()} for vector in vectors]
    assert torch.equal(transmit_sum(turned, 0.1, seed=0)["b"], transmit_sum(straight, 0.1, seed=0)["b"])


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_scales_of_extreme_vectors(size):
    """Squares that float32 does not hold."""
    sent = [{"w": torch.full((40_000,), size), "zero": torch.zeros(7)}]
    error = transmit_sum(sent, 0.25, seed=0)["w"].double() / size - 1
    rms = math.sqrt(40_000 / 40_007)
    assert float(error.square().mean()) == pytest.approx(0.25 * rms**2, rel=5 * math.sqrt(2 / 40_000))


def test_an_overflow_is_named():
    sent = [{"v": torch.ones(2), "w": torch.full((3,), 3e38)}] * 2
    with pytest.raises(NonFiniteError, match=r"the sum of 'w' overflows torch.float32"):
        transmit_sum(sent, 0.0, seed=0, scale=1.0)
    half = [{"w": torch.full((3,), 6e4, dtype=torch.float16)}] * 2
    with pytest.raises(NonFiniteError, match=r"the sum of 'w' overflows torch.float16"):
        transmit_sum(half, 0.0, seed=0, scale=1.0)


def test_without_gradients_and_in_inference_mode(vectors):
    fresh = transmit_sum(vectors, 0.1, seed=0)
    followed = [{key: value.clone().requires_grad_() for key, value in vector.items()} for vector in vectors]
    with torch.no_grad():
        assert torch.equal(transmit_sum(followed, 0.1, seed=0)["c"], fresh["c"])
    with torch.inference_mode():
        assert torch.equal(transmit_sum(vectors, 0.1, seed=0)["c"], fresh["c"])
