"""The simpler jammers: their constraints, and what they are optimal for."""

import numpy as np
import pytest

from helpers.oracles import complex_normal, log_det_rate, random_covariance
from rmtllmf.channel import barrage_covariance, sic, strongest_user_covariance, worst_case_covariance


def test_strongest_user_minimises_the_rate_of_the_strongest_user():
    """min over C of log(1 + P_Q h^H C_n^-1 h), with a floor: no covariance of the same power does more harm to Q."""
    rng = np.random.default_rng(0)
    H, P, P_N, floor = complex_normal(rng, 4, 3), np.array([0.3, 1.0, 0.5]), 2.0, 0.1
    strongest = int(np.argmax(P * (np.abs(H) ** 2).sum(0)))
    h, p = H[:, strongest : strongest + 1], P[strongest]
    C = strongest_user_covariance(H, P, P_N)
    attacked = log_det_rate(h, p, C + floor * np.eye(4))
    assert attacked == pytest.approx(np.log1p(p * np.sum(np.abs(h) ** 2) / (P_N + floor)))
    for k in range(3000):
        share = 1 if k % 2 else 10 ** rng.uniform(-6, 0)
        other = (1 - share) * C + share * P_N * random_covariance(rng, 4)
        assert log_det_rate(h, p, other + floor * np.eye(4)) >= attacked * (1 - 1e-12)


def test_strongest_user_has_rank_one_the_trace_and_the_right_direction_in_batches():
    rng = np.random.default_rng(1)
    H, P = 1e-7 * complex_normal(rng, 7, 5, 3), rng.uniform(0.1, 1, (7, 3))
    P_N = rng.uniform(1e-17, 1e-16, 7)
    C = strongest_user_covariance(H, P, P_N)
    for b in range(7):
        h = H[b][:, np.argmax(P[b] * (np.abs(H[b]) ** 2).sum(0))]
        np.testing.assert_allclose(C[b], P_N[b] * np.outer(h, h.conj()) / np.vdot(h, h).real, rtol=1e-12)


def test_strongest_user_ties_and_silence():
    C = strongest_user_covariance(np.eye(2) + 0j, 1.0, 1.0)
    np.testing.assert_array_equal(C, np.diag([0.0, 1.0]))  # the last in a stable sort, as sic decodes it
    assert sic(np.eye(2) + 0j, 1.0, np.eye(2)).order[-1] == 1
    np.testing.assert_allclose(strongest_user_covariance(np.ones((2, 3)) + 0j, 0.0, 3.0), 1.5 * np.eye(2))


@pytest.mark.parametrize("unit", [1e-308, 1e-200, 1e200])
def test_strongest_user_of_a_channel_whose_squares_leave_the_range_of_numbers(unit):
    H = complex_normal(np.random.default_rng(2), 4, 3)
    np.testing.assert_allclose(
        strongest_user_covariance(H * unit, 1.0, 2.0), strongest_user_covariance(H, 1.0, 2.0), rtol=1e-6, atol=1e-12
    )


def test_barrage_is_white_with_the_trace():
    C = barrage_covariance(np.ones((4, 3, 2), np.complex64), np.array([1.0, 2.0, 3.0, 0.0]))
    assert C.dtype == np.complex64
    np.testing.assert_allclose(C, np.array([1, 2, 3, 0])[:, None, None] / 3 * np.eye(3), rtol=1e-6)


def test_the_worst_case_is_worse_for_the_sum_rate_than_both():
    rng = np.random.default_rng(2)
    H, floor = complex_normal(rng, 6, 4), 0.05 * np.eye(6)
    worst = log_det_rate(H, 1.0, worst_case_covariance(H, 1.0, 3.0, noise=0.05) + floor)
    for C in (barrage_covariance(H, 3.0), strongest_user_covariance(H, 1.0, 3.0)):
        assert log_det_rate(H, 1.0, C + floor) > worst * 1.01
