"""Weights against least squares, against risks that are known exactly, and against every other choice."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rmtllmf.channel import Reception, UplinkScenario, lmmse, sic, transmit, worst_case_covariance
from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError, StateMismatchError
from rmtllmf.resilience._moments import Moments
from rmtllmf.resilience._noise import KnownNoise
from rmtllmf.resilience.fusion_weights import inverse_variance_weights, mse_optimal_weights, select_users
from rmtllmf.taskvec import TaskVector, task_arithmetic


def reception_of(E, gain=None):
    """A reception with these error covariances, or with these gains and noise covariances."""
    E = np.asarray(E, dtype=complex)
    mse = np.diagonal(E, axis1=-2, axis2=-1).real
    g = np.ones_like(mse) if gain is None else np.broadcast_to(gain, mse.shape)
    return Reception(mse, 1 / mse, np.log1p(1 / mse), g, None, E, E)


def covariance(users, seed, floor=0.05):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(users, users)) + 1j * rng.normal(size=(users, users))
    return A @ A.conj().T / users + floor * np.eye(users)


def vectors(users, size, seed, common=0.5, norms=None):
    """Vectors that share a part, of given rms, in two tensors."""
    rng = np.random.default_rng(seed)
    X = common * rng.normal(size=size) + rng.normal(size=(users, size))
    X *= (np.ones(users) if norms is None else np.asarray(norms))[:, None] / np.sqrt((X**2).mean(1, keepdims=True))
    X = torch.from_numpy(X)
    return [{"b": x[: size // 3].clone(), "a": x[size // 3 :].reshape(1, -1).clone()} for x in X]


def stacked(mappings):
    """(Q, n) in the order on the air."""
    return np.stack([np.concatenate([m[key].numpy().ravel() for key in sorted(m)]) for m in mappings])


def true_risk(a, t, sent, V, gain=None):
    """E|sum a xhat - sum t tau|^2 for fixed vectors, noise of variance `V` summed over the coefficients."""
    X = stacked(sent)
    g = np.ones(len(X)) if gain is None else gain
    return ((np.asarray(a) * g - t) @ X) @ ((np.asarray(a) * g - t) @ X) + a @ V @ a


def noise_of(E, sent):
    X = stacked(sent)
    rms = np.sqrt((X**2).mean(1))
    return X.shape[1] * np.asarray(E).real * np.outer(rms, rms)


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


class TestSelection:
    @pytest.mark.parametrize("seed", range(6))
    def test_is_the_best_of_all_subsets_on_the_exact_risk(self, seed):
        """By the definition: every subset, the risk from what was sent. Clear cases, so that estimates decide alike."""
        rng = np.random.default_rng(seed)
        E, sent = 2 * covariance(5, seed), vectors(5, 60_000, seed, norms=rng.uniform(0.5, 2, 5))
        V = noise_of(E, sent)
        risk = {
            chosen: true_risk(np.isin(np.arange(5), chosen).astype(float), 1.0, sent, V)
            for size in range(6)
            for chosen in itertools.combinations(range(5), size)
        }
        received = transmit(sent, reception_of(E), seed=seed)
        found = select_users(received, reception_of(E), at_least=0)
        assert risk[found] <= 1.02 * min(risk.values())
        assert risk[found] <= 1.02 * risk[(0, 1, 2, 3, 4)]

    def test_stronger_than_its_noise_or_not(self):
        mse = [0.5, 2.0, 0.9, 1.1, 0.0]
        sent = vectors(5, 200_000, seed=0, common=0.0)
        received = transmit(sent, mse, seed=1)
        assert select_users(received, mse) == (0, 2, 4)
        order = [4, 1, 0, 3, 2]
        turned = select_users([received[q] for q in order], [mse[q] for q in order])
        assert turned == (0, 2, 4)

    def test_what_others_share_with_a_vector_decides_too(self):
        """Each is noisier than strong, yet without any 9 units of power would be missing; and opposites cancel."""
        one = vectors(1, 100_000, seed=0)[0]
        opposite = {key: -value for key, value in one.items()}
        mse = [1.5, 1.3, 1.7]  # all: 4.5; the better two: 1 + 2.8; the best alone: 4 + 1.3; none: 9
        assert select_users(transmit([one] * 3, mse, seed=1), mse, at_least=0) == (0, 1)
        assert select_users(transmit([one, opposite], [0.1, 0.1], seed=1), [0.1, 0.1], at_least=0) == ()

    def test_nobody_only_if_asked(self):
        mse = [3.0, 2.0, 4.0]
        received = transmit(vectors(3, 50_000, seed=0, common=0.0), mse, seed=1)
        assert select_users(received, mse, at_least=0) == ()
        assert select_users(received, mse) == (1,)
        assert select_users(received, mse, at_least=3) == (0, 1, 2)

    def test_without_noise_everybody(self):
        assert select_users(vectors(4, 100, seed=0), [0.0] * 4) == (0, 1, 2, 3)
        assert select_users([{"w": torch.zeros(5)}] * 3, [0.1] * 3) == (0, 1, 2)

    def test_many_users_are_left_out_one_by_one(self):
        """13 and more; with independent vectors greedy is exact."""
        mse = [0.3, 1.8] * 8
        received = transmit(vectors(16, 100_000, seed=0, common=0.0), mse, seed=1)
        assert select_users(received, mse) == tuple(range(0, 16, 2))
        assert len(select_users(received, mse, at_least=10)) == 10


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
