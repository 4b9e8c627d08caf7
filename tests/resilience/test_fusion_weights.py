"""Weights by inverse variances against least squares, and what all weights refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.known_risk import covariance, reception_of
from rmtllmf.channel import lmmse
from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError, StateMismatchError
from rmtllmf.resilience.fusion_weights import inverse_variance_weights, mse_optimal_weights, select_users


class TestInverseVariance:
    @pytest.mark.parametrize("seed", range(5))
    def test_is_numpys_least_squares_for_a_common_signal(self, seed):
        """min |L^-1 (x - 1 s)|^2: the estimate is linear in x, and its coefficients are the weights."""
        E = covariance(4, seed)
        L = np.linalg.cholesky(E.real)
        white = np.linalg.lstsq(np.linalg.solve(L, np.ones((4, 1))), np.linalg.inv(L), rcond=None)[0][0]
        found = inverse_variance_weights(reception_of(E))
        np.testing.assert_allclose(found.numpy(), 4 * white, rtol=1e-10)
        assert found.sum().item() == pytest.approx(4)

    def test_bare_mses_and_their_mean_over_blocks(self):
        mse = np.array([[0.1, 0.5, 0.2], [0.3, 0.1, 0.2]])
        expected = 1 / mse.mean(0)
        found = inverse_variance_weights(mse)
        np.testing.assert_allclose(found, 3 * expected / expected.sum(), rtol=1e-12)
        assert found.dtype == torch.float64
        unbiased = mse[0] / (1 - mse[0])
        found = inverse_variance_weights(mse[0], estimator="unbiased")
        np.testing.assert_allclose(found, 3 / unbiased / (1 / unbiased).sum(), rtol=1e-12)

    def test_gains_make_the_sum_unbiased(self):
        mse = torch.tensor([0.1, 0.5, 0.8])
        weights = inverse_variance_weights(mse, estimator="mmse")
        assert (weights * (1 - mse)).sum().item() == pytest.approx(3)
        unbiased = inverse_variance_weights(mse, estimator="unbiased")
        torch.testing.assert_close(weights * (1 - mse), unbiased)  # the same estimate, divided beforehand or not

    @given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.floats(1e-3, 1e3))
    @settings(max_examples=30, deadline=None)
    def test_only_ratios_matter(self, mse, factor):
        expected = inverse_variance_weights(mse)
        torch.testing.assert_close(inverse_variance_weights([factor * m for m in mse]), expected)
        assert inverse_variance_weights([mse[0]] * len(mse)).tolist() == pytest.approx([1.0] * len(mse))

    @pytest.mark.parametrize("mse", [[0.0, 0.3, 0.0], [1e-30, 0.3, 1e-30]])
    def test_users_without_noise_are_the_limit(self, mse):
        assert inverse_variance_weights(mse).tolist() == pytest.approx([1.5, 0, 1.5], abs=1e-20)

    def test_tiny_noises_keep_their_ratio(self):
        assert inverse_variance_weights([1e-20, 3e-20, 1.0]).tolist() == pytest.approx([2.25, 0.75, 0], abs=1e-15)

    def test_errors_that_cancel_exactly(self):
        assert inverse_variance_weights(reception_of([[1, 2], [2, 4]])).tolist() == pytest.approx([4, -2])
        assert inverse_variance_weights(reception_of([[1, 1], [1, 1]])).tolist() == pytest.approx([1, 1])

    def test_noise_that_is_rounding_beside_correlated_errors_is_none(self):
        E = np.diag([1e-18, 3e-18, 1.0, 1.0])
        E[2, 3] = E[3, 2] = 0.5
        assert inverse_variance_weights(reception_of(E)).tolist() == pytest.approx([2, 2, 0, 0])

    def test_a_null_space_without_thermal_noise(self):
        """A rank-one jammer and no floor: every combination orthogonal to it is free of noise."""
        rng = np.random.default_rng(0)
        H = rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))
        rx = lmmse(H, 1.0, np.diag([1.0, 0.0]).astype(complex))
        weights = inverse_variance_weights(rx)
        assert torch.isfinite(weights).all()
        E = rx.error_covariance.real
        least = min(a @ E @ a for a in (3 * x / x.sum() for x in np.random.default_rng(1).normal(size=(2000, 3))))
        assert weights.numpy() @ E @ weights.numpy() <= least

    def test_a_silent_user_counts_nothing(self):
        assert inverse_variance_weights([0.5, 1.0], estimator="mmse").tolist() == pytest.approx([4.0, 0.0])


GOOD = [{"w": torch.ones(8)}, {"w": torch.arange(8.0)}]

BAD = [
    (lambda: inverse_variance_weights(0.1), ShapeError, "how many users"),
    (lambda: inverse_variance_weights([]), ShapeError, "how many users"),
    (lambda: inverse_variance_weights([-0.1, 1.0]), InputError, "at least 0"),
    (lambda: inverse_variance_weights([1.0, 1.0], estimator="mmse"), InputError, "gain of every user is 0"),
    (lambda: inverse_variance_weights([0.1, 1.0], estimator="unbiased"), InputError, "below 1"),
    (lambda: inverse_variance_weights([0.1], estimator="best"), InputError, "estimator.*'best'"),
    (lambda: inverse_variance_weights([0.1, float("nan")]), NonFiniteError, "reception"),
    (lambda: inverse_variance_weights("sic"), TypeError, "reception"),
    (lambda: inverse_variance_weights([reception_of(np.eye(2))] * 2), TypeError, "reception"),
    (lambda: inverse_variance_weights(reception_of([[1, 2], [2, 1]])), NotPSDError, "error_covariance"),
    (lambda: mse_optimal_weights(GOOD, [0.1]), ShapeError, "2 vectors"),
    (lambda: mse_optimal_weights(GOOD, [0.1, 0.1], target=[1.0]), ShapeError, "target: expected 2"),
    (lambda: mse_optimal_weights(GOOD, [0.1, 0.1], target=2.0), TypeError, "target: expected 2 numbers"),
    (lambda: mse_optimal_weights(GOOD, [0.1, 0.1], target=torch.tensor(1.0)), TypeError, "target: expected 2"),
    (lambda: mse_optimal_weights(GOOD, [0.1, 0.1], target="ab"), TypeError, "target"),
    (lambda: mse_optimal_weights(GOOD, [0.1, 0.1], target=[1.0, np.inf]), InputError, r"target\[1\]"),
    (lambda: mse_optimal_weights(GOOD, [0.1, 0.1], scale="peak"), InputError, "peak"),
    (lambda: mse_optimal_weights(GOOD, [0.1, 1.0], estimator="mmse"), InputError, "gain of user 1 is 0 in block 0"),
    (lambda: mse_optimal_weights([], []), InputError, "at least one"),
    (lambda: mse_optimal_weights([*GOOD[:1], {"v": torch.ones(8)}], [0.1, 0.1]), StateMismatchError, "lacks 'w'"),
    (
        lambda: mse_optimal_weights([*GOOD[:1], {"w": torch.full((8,), np.nan)}], [0.1, 0.1], scale=1.0),
        NonFiniteError,
        r"received\[1\]\['w'\]",
    ),
    (lambda: mse_optimal_weights(GOOD, np.full((5, 2), 0.1)), InputError, "5 blocks"),
    (lambda: select_users(GOOD, [0.1, 0.1], at_least=3), InputError, "at_least.*2, got 3"),
    (lambda: select_users(GOOD, [0.1, 0.1], at_least=-1), InputError, "at_least"),
    (lambda: select_users(GOOD, [0.1, 0.1], at_least=1.0), TypeError, "at_least"),
    (lambda: select_users(GOOD, [0.1, 1.0], estimator="mmse"), InputError, "gain of user 1"),
]


@pytest.mark.parametrize(("call", "error", "pattern"), BAD)
def test_bad_input(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


def test_a_silent_user_whose_vector_is_not_wanted_is_no_error():
    found = mse_optimal_weights(GOOD, [0.0, 1.0], estimator="mmse", target=[1.0, 0.0])
    assert found.tolist() == pytest.approx([1.0, 0.0])
