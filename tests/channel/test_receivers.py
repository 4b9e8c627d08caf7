"""Receivers against explicit filters, against a simulation of the link, and against what theory says of them."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import assert_covariance, complex_normal, log_det_rate, random_covariance, receive, simulate
from helpers.receiver_cases import ANTENNAS, KINDS, USERS, call, covariance
from rmtllmf.channel import (
    UplinkScenario,
    barrage_covariance,
    lmmse,
    sic,
    strongest_user_covariance,
    sum_rate,
    worst_case_covariance,
)


@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (2, 1)], ids=str)
@pytest.mark.parametrize("design", [None, *KINDS], ids=lambda kind: f"design-{kind}")
@pytest.mark.parametrize("noise", KINDS, ids=lambda kind: f"noise-{kind}")
@pytest.mark.parametrize("receiver", ["sic", "lmmse"])
def test_against_explicit_filters(receiver, noise, design, shape):
    """E, N, gain, mse and sinr of every kind of noise and design, singular ones included."""
    rng = np.random.default_rng(17)
    antennas, users = shape
    kinds = [min(kind, antennas) if isinstance(kind, int) else kind for kind in (noise, design)]
    for _ in range(3):
        H, P = complex_normal(rng, antennas, users), rng.uniform(0.2, 2.0, users)
        C = covariance(kinds[0], rng, antennas)
        C_design = None if design is None else covariance(kinds[1], rng, antennas)
        order = rng.permutation(users)
        rx = call(receiver, H, P, C, C_design, order)
        used = C if C_design is None else C_design
        E, N, gain = receive(H, P, C, used, None if receiver == "lmmse" else order)
        np.testing.assert_allclose(rx.error_covariance, E, atol=1e-9)
        np.testing.assert_allclose(rx.noise_covariance, N, atol=1e-9)
        np.testing.assert_allclose(rx.gain, gain, atol=1e-9)
        np.testing.assert_allclose(rx.mse, np.diag(E).real, atol=1e-9)
        noisy = np.diag(N).real > 1e-9
        np.testing.assert_allclose(rx.sinr[noisy], gain[noisy] ** 2 / np.diag(N).real[noisy], rtol=1e-6)
        np.testing.assert_allclose(rx.rate, np.log1p(rx.sinr))


@pytest.mark.parametrize("design", [None, "unaware", "other", 2], ids=lambda kind: f"design-{kind}")
@pytest.mark.parametrize("noise", ["regular", 2, 1], ids=lambda kind: f"noise-{kind}")
@pytest.mark.parametrize("receiver", ["sic", "lmmse"])
def test_against_a_simulation_of_the_link(receiver, noise, design):
    """Mean, covariance and cross-covariance of the errors of 200,000 channel uses, within 5 standard errors."""
    rng = np.random.default_rng(5)
    H, P = complex_normal(rng, ANTENNAS, USERS), np.array([1.0, 0.5, 0.2])
    C = covariance(noise, rng)
    C_design = {None: None, "unaware": 0.05 * np.eye(ANTENNAS), "other": covariance("regular", rng)}.get(
        design, covariance(2, rng)
    )
    order = np.array([2, 0, 1])
    rx = call(receiver, H, P, C, C_design, order)
    used = C if C_design is None else C_design
    estimate, sent = simulate(rng, H, P, C, used, None if receiver == "lmmse" else order, 200_000)
    error = estimate - sent
    assert_covariance(error, np.ones((1, error.shape[1])), 0)
    assert_covariance(error, error, rx.error_covariance)
    assert_covariance(error, error.conj(), 0)  # circular
    if (receiver == "lmmse" and noise != 1) or design is not None:
        assert np.abs(rx.error_covariance - np.diag(rx.mse)).max() > 0.01  # correlated: the test has something to see
    rest = estimate - rx.gain[:, None] * sent
    assert_covariance(rest, rest, rx.noise_covariance)
    assert_covariance(rest[:1], sent[:1], 0)  # nothing of the wanted symbol is left: the gain is right


def test_rates_add_up_to_the_sum_rate_in_every_order():
    rng = np.random.default_rng(3)
    H, P = 1e-7 * complex_normal(rng, 16, 4), rng.uniform(0.1, 1, 4) * 1e-4
    C = worst_case_covariance(H, P, 1e-17) + 1e-19 * np.eye(16)
    orders = list(permutations(range(4)))
    rates = sic(H, P, C, order=np.array(orders)).rate
    assert rates.shape == (24, 4)
    total = sum_rate(H, P, C)
    np.testing.assert_allclose(rates.sum(-1), total, rtol=1e-12)
    assert total == pytest.approx(log_det_rate(1e7 * H, P / 1e-4, C / (1e-14 * 1e-4)), rel=1e-9)
    assert np.ptp(rates[:, 0]) > 0.01  # the order does matter for each


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_matched_relations(seed, antennas, users):
    """mse = 1/(1 + sinr) = exp(-rate), gain = 1 - mse, SIC no worse than linear, uncorrelated SIC errors."""
    rng = np.random.default_rng(seed)
    H, P = complex_normal(rng, antennas, users), 10 ** rng.uniform(-3, 3, users)
    C = random_covariance(rng, antennas) + 1e-3 * np.eye(antennas)
    linear, cancelling = lmmse(H, P, C), sic(H, P, C)
    for rx in (linear, cancelling):
        np.testing.assert_allclose(rx.mse, 1 / (1 + rx.sinr), rtol=1e-9)
        np.testing.assert_allclose(rx.mse, np.exp(-rx.rate), rtol=1e-9)
        np.testing.assert_allclose(rx.gain, 1 - rx.mse, atol=1e-12)
    assert np.all(cancelling.mse <= linear.mse * (1 + 1e-9))
    np.testing.assert_array_equal(cancelling.error_covariance, np.diag(cancelling.mse))
    B = H * np.sqrt(P)
    E = np.linalg.inv(np.eye(users) + B.conj().T @ np.linalg.inv(C) @ B)
    np.testing.assert_allclose(linear.error_covariance, E, atol=1e-9)


def test_no_other_filter_has_a_smaller_error():
    """The matched filters are optimal: a design for anything else does worse for every user."""
    rng = np.random.default_rng(4)
    H, C = complex_normal(rng, 4, 3), covariance("regular", rng)
    for receiver in (sic, lmmse):
        best = receiver(H, 1.0, C).mse
        for _ in range(50):
            assert np.all(receiver(H, 1.0, C, designed_for=covariance("regular", rng)).mse > best)
        np.testing.assert_allclose(receiver(H, 1.0, C, designed_for=C).mse, best, rtol=1e-12)


def test_silent_users():
    rng = np.random.default_rng(9)
    H, P, C = complex_normal(rng, 4, 3), np.array([1.0, 0.0, 0.5]), covariance("regular", rng)
    for design in (None, 0.1 * np.eye(4)):
        for receiver in (sic, lmmse):
            rx = receiver(H, P, C, designed_for=design)
            assert (rx.mse[1], rx.sinr[1], rx.rate[1], rx.gain[1]) == (1, 0, 0, 0)
            others = receiver(H[:, [0, 2]], P[[0, 2]], C, designed_for=design)
            np.testing.assert_allclose(rx.mse[[0, 2]], others.mse, rtol=1e-12)


def test_orders():
    H, P = np.diag([3.0, 1.0, 2.0]) + 0.1 + 0j, np.array([0.1, 1.0, 1.0])  # received: about 0.9, 1.0, 4.0
    weakest, strongest = sic(H, P, np.eye(3)), sic(H, P, np.eye(3), order="strongest_first")
    assert weakest.order.tolist() == [0, 1, 2]
    assert strongest.order.tolist() == [2, 1, 0]
    np.testing.assert_array_equal(sic(H, P, np.eye(3), order=[2, 1, 0]).mse, strongest.mse)
    assert lmmse(H, P, np.eye(3)).order is None


@pytest.fixture(scope="module")
def paper_draws():
    return UplinkScenario().draw(1500, seed=0, numpy=True)


@pytest.mark.parametrize(("jammer", "expected"), [("ideal", 0.0132), ("su", 0.146), ("sr", 0.210), ("barrage", 0.113)])
def test_the_papers_mean_squared_errors(paper_draws, jammer, expected):
    """The set-up that reproduces the paper's .013 / .16 / .21: an unaware receiver, strongest user first."""
    up = paper_draws
    P_N = 124 * up.noise
    C = {
        "ideal": lambda: 0.0,
        "su": lambda: strongest_user_covariance(up.H, up.P, P_N),
        "sr": lambda: worst_case_covariance(up.H, up.P, P_N, noise=up.noise),
        "barrage": lambda: barrage_covariance(up.H, P_N),
    }[jammer]()
    thermal = up.noise_covariance
    rx = sic(up.H, up.P, C + thermal, designed_for=thermal, order="strongest_first")
    assert rx.mse.mean() == pytest.approx(expected, rel=0.1)


def test_errors_of_an_unaware_receiver_are_strongly_correlated(paper_draws):
    up = paper_draws
    thermal = up.noise_covariance
    C = strongest_user_covariance(up.H, up.P, 124 * up.noise) + thermal
    E = sic(up.H, up.P, C, designed_for=thermal, order="strongest_first").error_covariance
    root = np.sqrt(np.einsum("bqq->bq", E).real)
    correlation = np.abs(E) / (root[:, :, None] * root[:, None, :])
    off = correlation[:, ~np.eye(8, dtype=bool)]
    assert off.mean() == pytest.approx(0.78, abs=0.05)


def test_gradients_pass_through_receivers_rates_and_the_simpler_jammers():
    """Against finite differences, in H, P, the jammer's power and the design; a white covariance is degenerate."""
    rng = np.random.default_rng(11)
    H = torch.from_numpy(complex_normal(rng, 3, 2)).requires_grad_()
    P = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    power = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    thermal = 0.3 * torch.eye(3, dtype=torch.float64)

    def outputs(H, P, power):
        jammed = strongest_user_covariance(H, P, power) + thermal
        white = barrage_covariance(H, power) + thermal
        unaware = sic(H, P, jammed, designed_for=white, order=[1, 0])
        linear = lmmse(H, P, white)
        return sum_rate(H, P, white), unaware.mse, unaware.rate, linear.error_covariance, sic(H, P, jammed).sinr

    assert torch.autograd.gradcheck(outputs, (H, P, power))


def test_gradients_that_do_not_exist_are_refused():
    H = torch.eye(2, dtype=torch.complex128)
    P = torch.tensor([1.0, 0.0], requires_grad=True)
    C = torch.diag(torch.tensor([1.0, 0.0])).requires_grad_()
    for receiver in (sic, lmmse, sum_rate):
        with pytest.raises(TypeError, match="P: requires a gradient, but a user is silent"):
            receiver(H, P, torch.eye(2))
        with pytest.raises(TypeError, match="C: requires a gradient, but is singular"):
            receiver(H, 1.0, C)
        with torch.no_grad():
            receiver(H, P, C)


def test_an_order_as_a_tensor_makes_the_result_one():
    rx = sic(np.eye(2) + 0j, 1.0, np.eye(2), order=torch.tensor([1, 0]))
    assert isinstance(rx.mse, torch.Tensor)
