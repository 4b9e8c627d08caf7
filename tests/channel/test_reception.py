"""A reception of a receiver of one's own: what follows from its errors, what is refused, and how it looks."""

import warnings

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal
from rmtllmf.channel import Reception, lmmse, scheduled, sic, transmit
from rmtllmf.errors import InputError, NotPSDError, ShapeError

NAMES = ("mse", "sinr", "rate", "gain", "error_covariance", "noise_covariance")


@pytest.fixture
def uplink():
    rng = np.random.default_rng(0)
    H = complex_normal(rng, 5, 4, 3)
    G = complex_normal(rng, 4, 4)
    return H, np.array([1.0, 0.5, 2.0]), G @ G.conj().T / 4 + 0.1 * np.eye(4)


def same(a, b):
    for name in NAMES:
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-12)


def test_the_errors_of_a_matched_receiver_say_all(uplink):
    for rx in (lmmse(*uplink), scheduled(*uplink)):
        same(Reception.from_errors(rx.error_covariance), rx)


def test_other_receivers_need_their_gain_and_noise(uplink):
    H, P, C = uplink
    rx = sic(H, P, C, designed_for=0.1 * np.eye(4), order="strongest_first")
    same(Reception.from_errors(rx.error_covariance, gain=rx.gain, noise_covariance=rx.noise_covariance), rx)
    rx = sic(H, P, 10 * C, designed_for=0.1 * np.eye(4), order="strongest_first")
    with pytest.raises(InputError, match=r"error_covariance: has an eigenvalue of .* pass its gain and noise_covar"):
        Reception.from_errors(rx.error_covariance)


def test_a_conditional_mean_need_not_be_linear():
    """Of a sign through noise: E, g and N of 400,000 channel uses, by definition and by `from_errors`."""
    rng = np.random.default_rng(1)
    s = rng.choice([-1.0, 1.0], (2, 400_000))
    y = s + 0.9 * rng.standard_normal(s.shape)
    estimate = np.tanh(y / 0.81)
    errors = estimate - s
    rx = Reception.from_errors(errors @ errors.T / s.shape[1])
    gain = np.mean(estimate * s, axis=1)
    np.testing.assert_allclose(rx.gain, gain, atol=5e-3)
    noise = estimate - gain[:, None] * s
    np.testing.assert_allclose(rx.noise_covariance, noise @ noise.T / s.shape[1], atol=5e-3)


@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
def test_transmit_takes_it(uplink, estimator):
    H, P, C = uplink
    rx = lmmse(H[0], P, C)
    sent = [{"w": torch.linspace(-1, 1, 1000, dtype=torch.float64)}] * 3
    own = transmit(sent, Reception.from_errors(rx.error_covariance), seed=0, estimator=estimator)
    for a, b in zip(own, transmit(sent, rx, seed=0, estimator=estimator), strict=True):
        torch.testing.assert_close(a["w"], b["w"], rtol=1e-9, atol=1e-9)


def test_kind_precision_and_gradients():
    E = torch.tensor([[0.2, 0.1], [0.1, 0.5]], requires_grad=True)
    rx = Reception.from_errors(E)
    assert rx.mse.dtype == torch.float32
    assert rx.noise_covariance.dtype == torch.complex64
    rx.sinr.sum().backward()  # (1 - E_qq) / E_qq
    torch.testing.assert_close(E.grad, torch.diag(-1 / E.detach().diagonal().square()), rtol=1e-5, atol=1e-5)


def test_without_errors_and_without_a_signal():
    rx = Reception.from_errors(np.diag([0.0, 1.0]))
    assert rx.sinr.tolist() == [np.inf, 0.0]
    assert rx.gain.tolist() == [1.0, 0.0]


E = np.diag([0.1, 0.2])


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: Reception.from_errors(E[0]), ShapeError, r"error_covariance: expected shape \(\.\.\., Q, Q\)"),
        (lambda: Reception.from_errors(E[:1]), ShapeError, "error_covariance: "),
        (lambda: Reception.from_errors(-E), NotPSDError, "error_covariance: expected positive"),
        (lambda: Reception.from_errors(np.triu(np.ones((2, 2)))), NotPSDError, "error_covariance: expected Hermitian"),
        (lambda: Reception.from_errors(None), TypeError, "error_covariance: .*NoneType"),
        (lambda: Reception.from_errors(E, gain=[1.0, 1.0]), InputError, "gain, noise_covariance: .*both or neither"),
        (
            lambda: Reception.from_errors(E, gain=[1.0], noise_covariance=E),
            ShapeError,
            r"gain, noise_covariance: expected shapes \(2,\) and \(2, 2\)",
        ),
        (
            lambda: Reception.from_errors(E, gain=[0.5, 0.5], noise_covariance=E),
            InputError,
            r"the diagonal of error_covariance: expected \(1 - gain\)\^2 \+ noise, 0.35, got 0.1",
        ),
    ],
)
def test_what_is_no_reception(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


def test_transmit_refuses_errors_that_contradict_each_other():
    sent = [{"w": torch.ones(4)}] * 2
    for mse, error, pattern in (
        (np.array([5.0, 0.2]), InputError, "reception.mse: expected the diagonal of error_covariance, 0.1, got 5"),
        (np.array([0.2, 0.1]), InputError, "reception.mse: "),
        (np.ones(3), ShapeError, "reception.mse: "),
    ):
        with pytest.raises(error, match=pattern):
            transmit(sent, Reception(mse, None, None, None, None, E, None), seed=0)
    transmit(sent, Reception(np.diag(E).astype(np.float32), None, None, None, None, E, None), seed=0)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_what_a_half_filled_one_looks_like(kind):
    E = kind(np.diag([0.1, 0.2]))
    half = Reception(E.diagonal(), None, None, None, None, E, None)
    assert repr(half) == "Reception(2 users, MSE 0.1 to 0.2, linear)"
    assert half._repr_html_() == "<pre>Reception(2 users, MSE 0.1 to 0.2, linear)</pre>"
    assert repr(Reception(None, None, None, None, None, E, None)) == "Reception(2 users, linear)"
    assert repr(Reception(*[None] * 7)) == "Reception(linear)"


def test_read_only_arrays_look_like_others():
    parts = [np.array([0.5, 0.5]) for _ in range(4)]
    for part in parts:
        part.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rx = Reception(*parts, None, E, E)
        assert repr(rx) == "Reception(2 users, MSE 0.5, SINR -3.01 dB, rates 0.5 nats, linear)"
        assert "<table>" in rx._repr_html_()
