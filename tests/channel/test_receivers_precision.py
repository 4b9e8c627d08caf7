"""Receivers where noise is singular, far apart from the signal, or known to few digits."""

import numpy as np
import pytest

from helpers.oracles import complex_normal, random_covariance
from helpers.receiver_cases import covariance
from rmtllmf.channel import lmmse, sic, strongest_user_covariance, sum_rate, worst_case, worst_case_covariance
from rmtllmf.errors import RmtllmfWarning


def test_singular_noise_is_the_limit_of_a_vanishing_floor():
    rng = np.random.default_rng(6)
    H, P = complex_normal(rng, 4, 3), np.array([1.0, 0.5, 0.2])
    for rank in (1, 2, 3):
        C = random_covariance(rng, 4, rank)
        for receiver in (sic, lmmse):
            limit, close = receiver(H, P, C), receiver(H, P, C + 1e-9 * np.eye(4))
            np.testing.assert_allclose(limit.mse, close.mse, atol=1e-6)
            np.testing.assert_array_equal(limit.mse == 0, np.isinf(limit.rate))
            np.testing.assert_array_equal(limit.mse == 0, close.mse < 1e-7)


def test_a_rank_one_jammer_without_a_floor_is_nulled():
    """The others escape exactly, and so does the attacked user once somebody else is gone; never garbage."""
    rng = np.random.default_rng(7)
    H = 1e-6 * complex_normal(rng, 16, 8)
    C = strongest_user_covariance(H, 1e-4, 1e-17)
    rx = sic(H, 1e-4, C, order="weakest_first")
    attacked = rx.order[-1]
    assert np.all(np.delete(rx.mse, attacked) == 0)
    assert np.all(np.isinf(np.delete(rx.rate, attacked)))
    signal = 1e-4 * np.sum(np.abs(H[:, attacked]) ** 2)
    assert rx.mse[attacked] == pytest.approx(1 / (1 + signal / 1e-17), rel=1e-9)
    assert sum_rate(H, 1e-4, C) == np.inf
    # a jammer in the whole signal space leaves nobody a clear direction
    full = worst_case_covariance(H, 1e-4, 1e-17)
    assert np.linalg.matrix_rank(full) == 8
    assert sum_rate(H, 1e-4, full) == pytest.approx(sic(H, 1e-4, full).rate.sum(), rel=1e-9)
    assert np.isfinite(sum_rate(H, 1e-4, full))


def test_single_precision_covariances_are_judged_by_their_own_digits():
    """A rank-one covariance in complex64 has eigenvalues of 1e-8 that mean nothing."""
    rng = np.random.default_rng(8)
    H = complex_normal(rng, 6, 3).astype(np.complex64)
    C = strongest_user_covariance(H, 1.0, 2.0)
    with pytest.warns(RmtllmfWarning, match="singular to the precision of complex64"):
        rx = sic(H, 1.0, C)
    assert rx.mse.dtype == np.float32
    assert np.count_nonzero(rx.mse == 0) == 2


@pytest.mark.parametrize("weakness", [1e-3, 1e-8, 1e-14])
def test_small_rates_keep_their_digits(weakness):
    """Powers far below the noise: against the first-order expansion, whose error is the square of the SINR."""
    rng = np.random.default_rng(12)
    H, C = complex_normal(rng, 4, 3), covariance("regular", rng)
    exact = weakness * np.einsum("iq,ij,jq->q", H.conj(), np.linalg.inv(C), H).real
    for receiver in (sic, lmmse):
        rx = receiver(H, weakness, C)
        np.testing.assert_allclose(rx.sinr, exact, rtol=100 * weakness + 1e-12)
        np.testing.assert_allclose(rx.gain, exact, rtol=200 * weakness + 1e-12)
        np.testing.assert_allclose(np.diag(rx.noise_covariance).real, exact, rtol=200 * weakness + 1e-12)
        other = receiver(H, weakness, C, designed_for=2 * C)
        np.testing.assert_allclose(other.sinr, exact, rtol=200 * weakness + 1e-12)
    assert sum_rate(H, weakness, C) == pytest.approx(exact.sum(), rel=100 * weakness + 1e-12)
    assert sic(H, weakness, C).rate.sum() == pytest.approx(float(sum_rate(H, weakness, C)), rel=1e-12)


def test_a_loud_jammer_leaves_a_rate_that_three_functions_agree_on():
    rng = np.random.default_rng(13)
    H = complex_normal(rng, 6, 3)
    for P_N in 10.0 ** np.arange(3, 13, 3):
        found = worst_case(H, 1.0, P_N)
        total = sum_rate(H, 1.0, found.covariance)
        assert total == pytest.approx(sic(H, 1.0, found.covariance).rate.sum(), rel=1e-11)
        assert total == pytest.approx(float(found.sum_rate), rel=1e-11)


def test_the_precision_of_the_channel_does_not_decide_the_rank_of_the_noise():
    """60 dB between jammer and floor: in double precision nobody's noise is zero, whatever the channel's precision."""
    rng = np.random.default_rng(14)
    H = complex_normal(rng, 16, 8)
    C = strongest_user_covariance(H, 1.0, 1e6) + np.eye(16)
    coarse, fine = sic(H.astype(np.complex64), 1.0, C), sic(H, 1.0, C)
    np.testing.assert_allclose(coarse.rate, fine.rate, rtol=1e-4)
    assert np.isfinite(fine.rate).all()
    # a design in single precision is judged by its own digits, too
    design = strongest_user_covariance(H.astype(np.complex64), 1.0, 1.0)
    assert np.count_nonzero(np.abs(sic(H, 1.0, np.eye(16), designed_for=design).gain - 1) < 1e-12) == 7


def test_equally_strong_users_are_ordered_alike_by_jammer_and_receiver():
    rng = np.random.default_rng(16)
    h = complex_normal(rng, 500, 4, 1)
    # the same channel up to a unitary change: equal in exact arithmetic, with powers that make roundings differ
    H = np.concatenate([h, h[:, ::-1] * np.exp(1j), 2 * h], axis=-1) * 0.1
    P = np.array([0.3, 0.3, 0.075])
    C = strongest_user_covariance(H, P, 1.0)
    last = sic(H, P, np.eye(4)).order[:, -1]
    attacked = np.take_along_axis(H, last[:, None, None], axis=-1)[..., 0]
    aligned = np.einsum("bi,bij,bj->b", attacked.conj(), C, attacked).real / (np.abs(attacked) ** 2).sum(-1)
    np.testing.assert_allclose(aligned, 1.0)
