"""Weights against least squares, against risks that are known exactly, and against every other choice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from helpers.known_risk import covariance, noise_of, reception_of, stacked, true_risk, vectors
from rmtllmf.channel import UplinkScenario, sic, transmit, worst_case_covariance
from rmtllmf.resilience._moments import Moments
from rmtllmf.resilience._noise import KnownNoise
from rmtllmf.resilience.fusion_weights import mse_optimal_weights
from rmtllmf.taskvec import TaskVector, task_arithmetic


class TestOptimal:
    @pytest.mark.parametrize("correlated", [False, True])
    def test_is_least_squares_on_simulated_receptions(self, correlated):
        """numpy regresses the true sum on what 400 simulated receptions of it brought, without knowing any formula.

        The regression stacks 400 x 300 rows; its coefficients scatter by less than .012 (from their residuals), and
        so do those from single receptions of 120,000 coefficients.
        """
        E = covariance(3, 1) if correlated else np.diag([0.05, 0.8, 2.5])
        sent = vectors(3, 120_000, seed=2, norms=[1.0, 2.0, 0.5])
        target = np.array([1.0, 1.0, -0.5])
        received = transmit(sent, reception_of(E), seed=3)
        found = mse_optimal_weights(received, reception_of(E), target=target).numpy()
        X, rows = stacked(sent), []
        for draw in range(4):
            rows.append(stacked(transmit(sent, reception_of(E), seed=100 + draw)))
        Y = np.concatenate(rows, axis=1)
        oracle = np.linalg.lstsq(Y.T, np.tile(target @ X, 4), rcond=None)[0]
        np.testing.assert_allclose(found, oracle, atol=0.02)
        assert np.abs(oracle - target).max() > 0.1  # and it is not the plain sum

    def test_closed_form_with_known_moments(self):
        E, sent = covariance(4, 5), vectors(4, 200_000, seed=4, norms=[1, 0.3, 2, 1])
        S, V = stacked(sent) @ stacked(sent).T, noise_of(E, sent)
        found = mse_optimal_weights(transmit(sent, reception_of(E), seed=1), reception_of(E)).numpy()
        np.testing.assert_allclose(found, np.linalg.solve(S + V, S @ np.ones(4)), atol=0.02)

    def test_without_noise_it_is_the_target(self):
        sent = vectors(3, 500, seed=0)
        assert mse_optimal_weights(sent, [0.0] * 3).tolist() == pytest.approx([1, 1, 1], abs=1e-9)
        found = mse_optimal_weights(sent, [0.0] * 3, target=[0.2, -1, 3.0])
        assert found.tolist() == pytest.approx([0.2, -1, 3], abs=1e-9)

    def test_a_user_without_noise_beside_noisy_ones(self):
        sent = vectors(3, 100_000, seed=0, common=0.0)
        mse = [0.0, 1.0, 3.0]
        found = mse_optimal_weights(transmit(sent, mse, seed=1), mse)
        assert found.tolist() == pytest.approx([1, 0.5, 0.25], abs=0.02)

    def test_the_same_vector_twice_and_a_vector_of_zeros(self):
        one = {"w": torch.arange(1.0, 5.0)}
        same = mse_optimal_weights([one, one, {"w": torch.zeros(4)}], [0.0, 0.0, 0.0], scale=1.0)
        assert same.tolist() == pytest.approx([1, 1, 0])

    def test_nothing_but_noise_gets_no_weight(self):
        """Sent: zeros. In half of the cases less noise than average arrives, and then all weights are exactly 0."""
        sent = [{"w": torch.zeros(1000, dtype=torch.float64)}] * 2
        found = [
            mse_optimal_weights(transmit(sent, [1.0, 2.0], seed=seed, scale=1.0), [1.0, 2.0], scale=1.0)
            for seed in range(30)
        ]
        assert all((weights.abs() < 0.3).all() for weights in found)
        assert sum(not weights.any() for weights in found) >= 3

    @pytest.mark.parametrize("seed", range(4))
    def test_the_moments_are_the_most_likely_ones(self, seed):
        """scipy maximises the likelihood of few coefficients over all S = L L^T; the weights are then (S + V)^-1 S 1.

        In these draws R - V is indefinite, which is asserted, and L loses rank.
        """
        E, sent = covariance(3, seed), vectors(3, 60, seed, norms=[0.3] * 3)
        V, received = E.real, transmit(sent, reception_of(E), seed=seed, scale=1.0)
        R = stacked(received) @ stacked(received).T / 60

        def surprise(entries):
            total = V + entries.reshape(3, 3) @ entries.reshape(3, 3).T
            return np.linalg.slogdet(total)[1] + np.trace(np.linalg.solve(total, R))

        starts = np.random.default_rng(seed).normal(size=(3, 9))
        best = min((minimize(surprise, start, tol=1e-12) for start in starts), key=lambda done: done.fun)
        S = best.x.reshape(3, 3) @ best.x.reshape(3, 3).T
        assert np.linalg.eigvalsh(R - V)[0] < 0
        moments = Moments.of(KnownNoise.of(received, reception_of(E), scale=1.0))
        np.testing.assert_allclose(moments.received.numpy() / 60, S + V, atol=1e-4)
        np.testing.assert_allclose(moments.cross.numpy() / 60, S, atol=1e-4)
        found = mse_optimal_weights(received, reception_of(E), scale=1.0)
        np.testing.assert_allclose(found.numpy(), np.linalg.solve(S + V, S @ np.ones(3)), atol=1e-3)

    def test_mmse_estimates_of_independent_vectors_are_optimal_already(self):
        sent, mse = vectors(3, 200_000, seed=0, common=0.0), [0.1, 0.5, 0.9]
        received = transmit(sent, mse, seed=1, estimator="mmse")
        found = mse_optimal_weights(received, mse, estimator="mmse")
        assert found.tolist() == pytest.approx([1, 1, 1], abs=0.03)

    @pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
    def test_block_fading_against_sums_over_the_blocks(self, estimator):
        """Moments of every block are summed by hand, from the vectors as they were sent."""
        sent = vectors(2, 300_000, seed=3)
        mse = np.array([[0.05, 0.6], [0.7, 0.3], [0.4, 0.9]])
        X, rms = stacked(sent), np.sqrt((stacked(sent) ** 2).mean(1))
        total, cross = np.zeros((2, 2)), np.zeros((2, 2))
        for b, mu in enumerate(mse):
            part = X[:, b * 100_000 : (b + 1) * 100_000]
            g = 1 - mu if estimator == "mmse" else np.ones(2)
            v = {"additive": mu, "mmse": mu * (1 - mu), "unbiased": mu / (1 - mu)}[estimator]
            S = part @ part.T
            total += np.outer(g, g) * S + np.diag(part.shape[1] * v * rms**2)
            cross += g[:, None] * S
        received = transmit(sent, mse, seed=4, estimator=estimator)
        found = mse_optimal_weights(received, mse, estimator=estimator).numpy()
        np.testing.assert_allclose(found, np.linalg.solve(total, cross @ np.ones(2)), atol=0.02)

    @given(st.integers(0, 10_000), st.floats(0.02, 1.0))
    @settings(max_examples=25, deadline=None)
    def test_no_other_weights_have_a_lower_risk(self, seed, size):
        """Neither the sum itself nor any deviation, on the exact risk; to the slack of estimating from n = 60,000.

        The estimated moments are off by at most 5/sqrt(n) of the largest risk involved; at the minimum that costs the
        square of it.
        """
        rng = np.random.default_rng(seed)
        users = int(rng.integers(1, 6))
        E, sent = covariance(users, seed, floor=0.2), vectors(users, 60_000, seed, norms=rng.uniform(0.3, 3, users))
        V = noise_of(E, sent)
        found = mse_optimal_weights(transmit(sent, reception_of(E), seed=seed), reception_of(E)).numpy()
        ones, least = np.ones(users), true_risk(found, 1.0, sent, V)
        slack = 2e-3 * true_risk(ones, 1.0, sent, V)
        assert least <= true_risk(ones, 1.0, sent, V) + slack
        for step in size * rng.normal(size=(10, users)):
            assert least <= true_risk(found + step, 1.0, sent, V) + slack

    def test_the_fused_update_is_as_far_off_as_the_formula_says(self):
        """Through `task_arithmetic`, over 40 receptions; the mean squared error has a standard error below 1 %."""
        E, sent = covariance(3, 9), vectors(3, 20_000, seed=6)
        V, rx = noise_of(E, sent), reception_of(E)
        exact = stacked(sent).sum(0)
        optimal, plain = [], []
        for seed in range(40):
            received = transmit(sent, rx, seed=seed)
            weights = mse_optimal_weights(received, rx)
            optimal.append(((stacked([task_arithmetic(received, 1.0, weights=weights)])[0] - exact) ** 2).sum())
            plain.append(((stacked([task_arithmetic(received, 1.0)])[0] - exact) ** 2).sum())
        S = stacked(sent) @ stacked(sent).T
        best = np.linalg.solve(S + V, S.sum(1))
        assert np.mean(optimal) == pytest.approx(true_risk(best, 1.0, sent, V), rel=0.03)
        assert np.mean(plain) == pytest.approx(true_risk(np.ones(3), 1.0, sent, V), rel=0.03)
        assert np.mean(optimal) < 0.9 * np.mean(plain)

    def test_a_strong_jammer_that_all_users_share_is_subtracted(self):
        """Unaware receivers under a worst-case jammer have nearly equal errors: E, not diag(mse), must be used."""
        up = UplinkScenario().draw(seed=0)
        C = worst_case_covariance(up.H, up.P, 124 * up.noise, noise=up.noise) + up.noise_covariance
        rx = sic(up.H, up.P, C, designed_for=up.noise_covariance, order="strongest_first")
        sent = vectors(8, 50_000, seed=1)
        received, V = transmit(sent, rx, seed=2), noise_of(rx.error_covariance, sent)
        known = true_risk(mse_optimal_weights(received, rx).numpy(), 1.0, sent, V)
        blind = true_risk(mse_optimal_weights(received, rx.mse).numpy(), 1.0, sent, V)
        assert known < blind
        assert known < true_risk(np.ones(8), 1.0, sent, V)

    def test_equivariance_under_permutation_and_rescaling_of_the_users(self):
        E, sent = covariance(4, 3), vectors(4, 3000, seed=7)
        received, order = transmit(sent, reception_of(E), seed=1), [2, 0, 3, 1]
        found = mse_optimal_weights(received, reception_of(E))
        turned = mse_optimal_weights([received[q] for q in order], reception_of(E[np.ix_(order, order)]))
        torch.testing.assert_close(turned, found[order])
        factors = [1.0, 1e-4, 1e5, 3.0]
        scaled = [{k: f * v for k, v in m.items()} for f, m in zip(factors, received, strict=True)]
        target = [1 / f for f in factors]
        rescaled = mse_optimal_weights(scaled, reception_of(E), target=target)
        torch.testing.assert_close(rescaled * torch.tensor(factors, dtype=torch.float64), found)

    def test_forms_and_precisions_give_the_same(self):
        mse = [0.1, 0.7]
        received = transmit(vectors(2, 70_001, seed=0), mse, seed=1)
        found = mse_optimal_weights(received, mse)
        strided = [{k: v.repeat_interleave(2, -1)[..., ::2] for k, v in m.items()} for m in received]
        torch.testing.assert_close(mse_optimal_weights(strided, mse), found, rtol=1e-12, atol=0)
        single = [TaskVector({k: v.float() for k, v in m.items()}) for m in received]
        torch.testing.assert_close(mse_optimal_weights(single, torch.tensor(mse)), found, rtol=1e-6, atol=0)
        carried = [{**m, "steps": torch.tensor(3)} for m in received]
        assert mse_optimal_weights(iter(carried), mse).tolist() == found.tolist()
        assert mse_optimal_weights(received, mse, target=torch.ones(2)).tolist() == found.tolist()

    def test_the_same_bits_for_any_number_of_threads(self):
        mse, threads = [0.1, 0.7, 0.4], torch.get_num_threads()
        received = transmit(vectors(3, 400_000, seed=0), mse, seed=1)
        try:
            results = []
            for number in (1, 3):
                torch.set_num_threads(number)
                results.append(mse_optimal_weights(received, mse).tolist())
        finally:
            torch.set_num_threads(threads)
        assert results[0] == results[1]
