"""The true min-max attack against a convex solver, and against everything that might be worse; imperfect knowledge."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from helpers.oracles import complex_normal, min_max_rate_by_cvxpy, random_covariance
from rmtllmf.channel import (
    UplinkScenario,
    imperfect_channel,
    min_max_rate_covariance,
    sic,
    strongest_user_covariance,
    sum_rate,
    worst_case,
    worst_case_covariance,
)
from rmtllmf.errors import ConvergenceError


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (2, 2), (4, 1), (1, 3)], ids=str)
def test_the_largest_rate_agrees_with_a_convex_solver(shape, noise):
    rng = np.random.default_rng(sum(shape))
    H, P = complex_normal(rng, *shape), rng.uniform(0.2, 2.0, shape[1])
    C = min_max_rate_covariance(H, P, 2.0, noise=noise)
    rx = sic(H, P, C + noise * np.eye(shape[0]))
    assert np.trace(C).real == pytest.approx(2.0, rel=1e-12)
    assert rx.rate.max() == pytest.approx(min_max_rate_by_cvxpy(H, P, 2.0, noise, rx.order), rel=1e-6)


def test_no_covariance_does_more_harm_to_the_best_served_user():
    rng = np.random.default_rng(1)
    H, P, floor = complex_normal(rng, 4, 3), np.array([1.0, 0.6, 0.8]), 0.1 * np.eye(4)
    best = min_max_rate_covariance(H, P, 2.0, noise=0.1)
    largest = sic(H, P, best + floor).rate.max()
    share = np.where(np.arange(2000) % 2, 10 ** rng.uniform(-6, 0, 2000), 1.0)[:, None, None]
    others = np.stack([random_covariance(rng, 4) for _ in share])
    rates = sic(H, P, (1 - share) * best + share * 2.0 * others + floor).rate.max(-1)
    assert rates.min() >= largest - 1e-9
    assert rates.min() < largest + 1e-3


def test_it_equalises_rates_where_the_papers_attack_does_not():
    """The paper's set-up: eight equal rates, below the largest rate under both other jammers; in a batch."""
    up = UplinkScenario(num_users=4, num_antennas=6).draw(3, seed=0, numpy=True)
    P_N, thermal = 124 * up.noise, up.noise_covariance
    rates = {
        name: sic(up.H, up.P, C + thermal).rate
        for name, C in {
            "min-max": min_max_rate_covariance(up.H, up.P, P_N, noise=up.noise),
            "strongest": strongest_user_covariance(up.H, up.P, P_N),
            "sum": worst_case_covariance(up.H, up.P, P_N, noise=up.noise),
        }.items()
    }
    assert np.ptp(rates["min-max"], axis=-1).max() < 1e-6
    assert np.all(rates["min-max"].max(-1) < rates["strongest"].max(-1))
    assert np.all(rates["min-max"].max(-1) < rates["sum"].max(-1))
    # but the sum is lowest under the worst case for the sum
    assert np.all(rates["sum"].sum(-1) < rates["min-max"].sum(-1))


def test_every_draw_has_its_own_powers_noise_and_order():
    """In one batch, broadcast over another dimension; silent users and jammers in it; against the convex solver."""
    rng = np.random.default_rng(4)
    H, P = complex_normal(rng, 3, 3, 2), rng.uniform(0.2, 2.0, (3, 2))
    P[0, 1] = 0.0
    P_N, noise = np.array([[1.0], [0.0]]), rng.uniform(0.1, 1.0, 3)
    order = np.array([[0, 1], [1, 0], [1, 0]])
    C = min_max_rate_covariance(H, P, P_N, noise=noise, order=order)
    assert C.shape == (2, 3, 3, 3)
    assert not C[1].any()
    rates = sic(H, P, C[0] + noise[:, None, None] * np.eye(3), order=order).rate.max(-1)
    expected = [min_max_rate_by_cvxpy(H[k], P[k], 1.0, noise[k], order[k]) for k in range(3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_users_far_apart_need_a_floor(floor):
    """Without one, the optimum is singular to rounding: an error that says so; with very little, there is none."""
    rng = np.random.default_rng(5)
    H = complex_normal(rng, 8, 6, 6)
    if floor == 0.0:
        with pytest.raises(ConvergenceError, match="50 dB apart without a floor"):
            min_max_rate_covariance(H, np.logspace(-9, 0, 6), 1.0)
    else:
        C = min_max_rate_covariance(H, np.logspace(-9, 0, 6), 1.0, noise=floor)
        rates = sic(H, np.logspace(-9, 0, 6), C + floor * np.eye(6)).rate
        assert np.isfinite(rates).all()


def test_single_precision_and_tensors():
    H = complex_normal(np.random.default_rng(6), 2, 3, 2)
    C = min_max_rate_covariance(H, 1.0, 2.0, noise=0.1)
    single = min_max_rate_covariance(H.astype(np.complex64), 1.0, 2.0, noise=0.1)
    assert single.dtype == np.complex64
    np.testing.assert_allclose(single, C, atol=1e-6)
    leaf = torch.from_numpy(H).requires_grad_()
    tensor = min_max_rate_covariance(leaf, 1.0, 2.0, noise=0.1)
    assert not tensor.requires_grad  # as documented
    np.testing.assert_allclose(tensor, C, atol=1e-12)


def test_limits_scales_and_order():
    rng = np.random.default_rng(2)
    H = complex_normal(rng, 3, 2)
    assert not min_max_rate_covariance(H, 1.0, 0.0).any()
    np.testing.assert_allclose(min_max_rate_covariance(H, 0.0, 3.0), np.eye(3))
    one = min_max_rate_covariance(H[:, :1], 1.0, 2.0, noise=0.1)
    np.testing.assert_allclose(one, worst_case_covariance(H[:, :1], 1.0, 2.0, noise=0.1), atol=1e-8)
    plain = min_max_rate_covariance(H, 1.0, 2.0, noise=0.1, order=[1, 0])
    tiny = min_max_rate_covariance(1e-6 * H, 1e-5, 2e-17, noise=1e-18, order=[1, 0])
    np.testing.assert_allclose(tiny / 1e-17, plain, atol=1e-7)
    other = min_max_rate_covariance(H, 1.0, 2.0, noise=0.1, order=[0, 1])
    assert np.abs(other - plain).max() > 1e-3


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_imperfect_knowledge_has_the_stated_error(seed, error):
    """Correlation 1 - error in power, the same mean power; per user, whatever its strength."""
    rng = np.random.default_rng(seed)
    H = complex_normal(rng, 500, 8, 2) * np.array([1.0, 1e-6])
    guess = imperfect_channel(H, error, seed=seed)
    power = (np.abs(H) ** 2).mean((0, 1))
    bound = 6 / np.sqrt(4000)
    np.testing.assert_allclose((np.abs(guess) ** 2).mean((0, 1)) / power, 1, atol=2 * bound)
    np.testing.assert_allclose((H.conj() * guess).mean((0, 1)) / power, np.sqrt(1 - error), atol=bound)


def test_a_jammer_with_a_wrong_channel_does_less_harm():
    rng = np.random.default_rng(3)
    H, floor = complex_normal(rng, 300, 6, 3), 0.05 * np.eye(6)
    rates = [
        sum_rate(H, 1.0, worst_case_covariance(imperfect_channel(H, error, seed=0), 1.0, 3.0, noise=0.05) + floor)
        for error in (0.0, 0.1, 0.5, 1.0)
    ]
    np.testing.assert_allclose(rates[0], worst_case(H, 1.0, 3.0, noise=0.05).sum_rate, rtol=1e-9)
    means = [rate.mean() for rate in rates]
    assert means == sorted(means)
    assert np.all(rates[1] >= rates[0] * (1 - 1e-12))


def test_the_papers_uplink_with_a_weak_jammer():
    up = UplinkScenario().draw(4, seed=0, numpy=True)
    C = min_max_rate_covariance(up.H, up.P, up.noise, noise=up.noise)
    rates = sic(up.H, up.P, C + up.noise_covariance).rate
    other = sic(up.H, up.P, strongest_user_covariance(up.H, up.P, up.noise) + up.noise_covariance).rate
    assert np.all(rates.max(-1) <= other.max(-1) + 1e-8)  # a weak jammer does best against the strongest user alone


def optimality(H, P, P_N, noise, C):
    """How far the largest SINR may be above the optimum, relatively: a dual bound, from 60 digits and other formulas.

    1/SINR is concave in C, so for any weights that add up to 1 its tangents at C bound what any C reaches. The weights
    are those that make C stationary, fitted to ``sum w_q dC(1/SINR_q) C = level C`` without negative ones.
    """
    order = np.argsort((np.abs(H) ** 2).sum(0) * P, kind="stable")
    U, s, _ = np.linalg.svd(H, full_matrices=False)
    U = U[:, s > 1e-12 * s[0]]  # elsewhere nobody is heard
    B, C = U.conj().T @ H * np.sqrt(P), U.conj().T @ C @ U
    inverse, gradients = [], []
    with mpmath.workdps(60):
        X = mpmath.matrix(C.tolist()) + float(noise) * mpmath.eye(len(C))
        for q in order[::-1]:
            b = mpmath.matrix(B[:, q].tolist())
            v = mpmath.lu_solve(X, b)
            sinr = mpmath.re((b.H * v)[0])
            outer = v * v.H / sinr**2
            gradients.append(P_N * np.array(outer.tolist(), complex))
            inverse.append(float(1 / sinr))
            X = X + b * b.H
    inverse, gradients = np.array(inverse), np.array(gradients)
    least = inverse.min()
    inverse, gradients = inverse / least, gradients / least
    active = inverse < 1 + 1e-6
    columns = [(part @ C).ravel() / P_N for part in (*gradients[active], -np.eye(len(C)))]
    system = np.array([[*column.real, *column.imag, 1.0] for column in columns])
    system[-1, -1] = 0.0  # the weights add up to 1
    found, _ = nnls(system.T, np.eye(system.shape[1])[-1])
    weights = found[:-1] / found[:-1].sum()
    mean = np.einsum("q,qij->ij", weights, gradients[active])
    bound = weights @ inverse[active] + np.linalg.eigvalsh(mean)[-1] - np.trace(mean @ C).real / P_N
    return bound - 1


@pytest.mark.parametrize("shape", [(16, 8), (4, 2), (3, 4), (4, 1), "orthogonal", "identical"], ids=str)
@pytest.mark.parametrize("snr_db", [0, 40, 80, 100])
def test_it_is_optimal_however_far_users_are_above_jammer_and_floor(snr_db, shape):
    """The saddle point: equal SINRs of those whose weight is positive, weights that sum to 1, stationarity in C."""
    antennas, users = (8, 4) if isinstance(shape, str) else shape
    draws = 1 if users > 4 else 2
    up = UplinkScenario(num_users=users, num_antennas=antennas).draw(draws, seed=snr_db, numpy=True)
    H = up.H
    if shape == "orthogonal":
        H = np.linalg.qr(H)[0] * np.linalg.norm(H, axis=-2, keepdims=True)
    if shape == "identical":
        H = np.repeat(H[..., :1], users, axis=-1)
    thermal = 10 ** (-snr_db / 10) * (np.abs(H) ** 2 * up.P[:, None, :]).mean((-2, -1))
    jammer, floor = np.broadcast_arrays(np.array([[1.0], [124.0]]), np.array([0.0, 1.0]))
    P_N, noise = (factor[..., None] * thermal for factor in (jammer, floor))
    C = min_max_rate_covariance(H, up.P, P_N, noise=noise)
    np.testing.assert_allclose(np.trace(C, axis1=-2, axis2=-1).real, P_N, rtol=1e-12)
    for index in np.ndindex(P_N.shape):
        gap = optimality(H[index[-1]], up.P[index[-1]], P_N[index], noise[index], C[index])
        assert -1e-9 < gap < 2e-8  # the weights, fitted in single steps, are good to less than the covariance is


@given(st.integers(0, 10**6))
def test_it_converges_for_all_shapes_powers_and_noises(seed):
    """Silent and identical users, powers six orders of magnitude apart, two without a floor: never an error."""
    rng = np.random.default_rng(seed)
    antennas, users = rng.integers(1, 7, 2)
    floor = rng.choice([0.0, 1e-6, 1.0])
    spread = 3 if floor else 1
    H, P = complex_normal(rng, antennas, users), 10 ** rng.uniform(-spread, spread, users)
    if users > 1:
        H[:, 0], P[1] = rng.choice([H[:, 0], H[:, 1]]), rng.choice([0.0, 1.0])
    noise = 10 ** rng.uniform(-8, 2)
    C = min_max_rate_covariance(H, P, noise * 10 ** rng.uniform(-2, 2), noise=noise * floor)
    assert np.linalg.eigvalsh(C)[0] > -1e-15 * np.trace(C).real


def test_a_result_that_is_not_certain_is_an_error(monkeypatch):
    monkeypatch.setattr("rmtllmf.channel._interior_point._MAX_STEPS", 3)
    H = complex_normal(np.random.default_rng(0), 5, 4, 3)
    with pytest.raises(ConvergenceError, match="5 of 5 batch items"):
        min_max_rate_covariance(H, 1.0, 1.0, noise=0.1)


def test_parts_of_a_batch_do_not_matter(monkeypatch):
    H = complex_normal(np.random.default_rng(0), 7, 4, 3)
    whole = min_max_rate_covariance(H, 1.0, 1.0, noise=0.1)
    monkeypatch.setattr("rmtllmf.channel._interior_point._MEMORY", 2 * 3 * 3**3)
    np.testing.assert_allclose(min_max_rate_covariance(H, 1.0, 1.0, noise=0.1), whole, atol=1e-9)
