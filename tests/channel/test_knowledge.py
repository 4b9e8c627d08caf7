"""Estimated covariances against scikit-learn, the Wishart distribution, and the known loss of adaptive receivers."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from helpers.oracles import complex_normal, random_covariance
from rmtllmf.channel import (
    covariance_of,
    estimated_covariance,
    knowledge,
    lmmse,
    power_only_covariance,
    sic,
)


def regular(rng, size):
    return random_covariance(rng, size) + 0.05 * np.eye(size)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize(("antennas", "count"), [(5, 3), (5, 40), (12, 12), (3, 400), (1, 7)])
def test_ledoit_wolf_is_that_of_scikit_learn_on_real_data(antennas, count, scale):
    rng = np.random.default_rng(count)
    Z = scale * np.linalg.cholesky(regular(rng, antennas).real) @ rng.standard_normal((2, antennas, count))
    ours = covariance_of(Z + 0j, shrinkage="ledoit_wolf")
    for item, data in zip(ours, Z, strict=True):
        fitted = LedoitWolf(assume_centered=True).fit(data.T)
        np.testing.assert_allclose(item, fitted.covariance_, rtol=1e-9, atol=1e-12 * scale**2)
        plain = covariance_of(data + 0j, shrinkage=fitted.shrinkage_)
        np.testing.assert_allclose(item, plain, rtol=1e-9, atol=1e-12 * scale**2)


def test_ledoit_wolf_finds_the_best_shrinkage_of_complex_data():
    """Its mean error is that of the best fixed shrinkage, whose closed form needs the true C."""
    rng = np.random.default_rng(0)
    antennas, count, draws = 16, 32, 2000
    C = random_covariance(rng, antennas, rank=4) + 0.02 * np.eye(antennas)
    stack = np.broadcast_to(C, (draws, antennas, antennas))

    def error(estimate):
        return float((np.abs(estimate - C) ** 2).sum((-2, -1)).mean())

    mean = np.trace(C).real / antennas
    variance = np.trace(C).real ** 2 / count  # E |S - C|^2 of complex Gaussian snapshots
    best = variance / (variance + np.linalg.norm(C - mean * np.eye(antennas)) ** 2)
    plain = error(estimated_covariance(stack, count, seed=1))
    oracle = error(estimated_covariance(stack, count, seed=1, shrinkage=best))
    found = error(estimated_covariance(stack, count, seed=1, shrinkage="ledoit_wolf"))
    assert plain == pytest.approx(variance, rel=0.05)
    assert oracle < 0.9 * plain
    assert found < 1.05 * oracle
    for other in (0.5 * best, 2 * best):
        assert found < error(estimated_covariance(stack, count, seed=1, shrinkage=other))


def test_the_sample_covariance_is_complex_wishart():
    """E S = C, E|S_ij - C_ij|^2 = C_ii C_jj / L, and E S^-1 = L / (L - N_R) C^-1."""
    rng = np.random.default_rng(1)
    antennas, count, draws = 3, 8, 40_000
    C = regular(rng, antennas)
    S = estimated_covariance(np.broadcast_to(C, (draws, antennas, antennas)), count, seed=3)
    power = np.diag(C).real
    variance = np.outer(power, power) / count
    assert np.all(np.abs(S.mean(0) - C) < 5 * np.sqrt(variance / draws))
    np.testing.assert_allclose((np.abs(S - C) ** 2).mean(0), variance, rtol=0.05)
    np.testing.assert_allclose(
        np.linalg.inv(S).mean(0), count / (count - antennas) * np.linalg.inv(C), rtol=0.05, atol=0.05
    )


def test_the_loss_of_a_receiver_with_few_snapshots_is_that_of_reed_mallett_and_brennan():
    """One user: SINR / best SINR is Beta distributed, with mean (L + 2 - N_R) / (L + 1), whatever C is."""
    rng = np.random.default_rng(2)
    antennas, draws = 8, 4000
    H, C = complex_normal(rng, draws, antennas, 1), regular(rng, antennas)
    best = lmmse(H, 1.0, C).sinr
    for count in (10, 16, 40):
        belief = estimated_covariance(np.broadcast_to(C, (draws, antennas, antennas)), count, seed=4)
        loss = (lmmse(H, 1.0, C, designed_for=belief).sinr / best)[:, 0]
        expected = (count + 2 - antennas) / (count + 1)
        assert abs(loss.mean() - expected) < 5 * loss.std() / np.sqrt(draws)


def test_loading_and_shrinkage_do_what_they_say():
    rng = np.random.default_rng(3)
    Z = complex_normal(rng, 2, 4, 6)
    S = Z @ Z.conj().swapaxes(-1, -2) / 6
    mean = np.einsum("bii->b", S).real[:, None, None] / 4 * np.eye(4)
    np.testing.assert_allclose(covariance_of(Z), S, atol=1e-14)
    np.testing.assert_allclose(covariance_of(Z, loading=0.3), S + 0.3 * mean, atol=1e-14)
    np.testing.assert_allclose(covariance_of(Z, shrinkage=1.0), mean, atol=1e-14)
    both = covariance_of(Z, loading=0.3, shrinkage=np.array([[0.25], [0.5]]))  # broadcasts: 2 shrinkages x 2 items
    assert both.shape == (2, 2, 4, 4)
    np.testing.assert_allclose(both[1], 0.5 * S + 0.8 * mean, atol=1e-14)
    np.testing.assert_allclose(covariance_of(Z, shrinkage=1.0), power_only_covariance(S), atol=1e-14)
    np.testing.assert_array_equal(covariance_of(np.zeros((2, 3), complex), shrinkage="ledoit_wolf"), np.zeros((2, 2)))


def test_many_snapshots_lead_to_the_receiver_that_knows():
    rng = np.random.default_rng(5)
    H, C = complex_normal(rng, 6, 3), regular(rng, 6)
    belief = estimated_covariance(C, 1_000_000, seed=0)
    np.testing.assert_allclose(belief, C, atol=2e-3)
    np.testing.assert_allclose(sic(H, 1.0, C, designed_for=belief).mse, sic(H, 1.0, C).mse, rtol=1e-4)


def test_a_singular_covariance_is_sampled_in_its_range():
    """A jammer without thermal noise: regular and singular items side by side, and none at all."""
    rng = np.random.default_rng(6)
    line = random_covariance(rng, 4, rank=1)
    C = np.stack([line, regular(rng, 4), np.zeros((4, 4))])
    S = estimated_covariance(C, 50, seed=0)
    assert np.linalg.matrix_rank(S[0], tol=1e-10) == 1
    np.testing.assert_allclose(S[0] / np.trace(S[0]), line / np.trace(line), atol=1e-7)
    np.testing.assert_array_equal(S[1], estimated_covariance(np.stack([C[1]] * 3), 50, seed=0)[1])
    assert not S[2].any()


def test_the_same_seed_gives_the_same_bits():
    C = np.stack([regular(np.random.default_rng(7), 3)] * 2)
    first = estimated_covariance(C, 5, seed=1)
    np.testing.assert_array_equal(first, estimated_covariance(C, 5, seed=1))
    assert np.abs(first - estimated_covariance(C, 5, seed=2)).max() > 0.01
    assert np.abs(first[0] - first[1]).max() > 0.01  # batch items hear different noise
    source = torch.Generator().manual_seed(0)
    again = [estimated_covariance(C, 5, seed=source) for _ in range(2)]
    assert np.abs(again[0] - again[1]).max() > 0.01
    tensor = estimated_covariance(torch.from_numpy(C), 5, seed=1)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), first)
    single = estimated_covariance(C.astype(np.complex64), 5, seed=1, shrinkage="ledoit_wolf")
    assert single.dtype == np.complex64
    np.testing.assert_allclose(
        single, estimated_covariance(C, 5, seed=1, shrinkage="ledoit_wolf"), rtol=1e-4, atol=1e-6
    )


def test_long_batches_are_drawn_in_parts(monkeypatch):
    monkeypatch.setattr(knowledge, "_CHUNK", 64)
    C = np.broadcast_to(np.diag([1.0, 4.0]), (500, 2, 2))
    S = estimated_covariance(C, 10, seed=0)
    assert len(np.unique(S[:, 0, 0])) == 500
    np.testing.assert_allclose(S.mean(0), np.diag([1.0, 4.0]), atol=0.25)
    assert estimated_covariance(np.zeros((0, 2, 2)), 10, seed=0).shape == (0, 2, 2)


def test_power_only_keeps_the_trace_and_nothing_else():
    rng = np.random.default_rng(8)
    C = np.stack([regular(rng, 4), np.zeros((4, 4))])
    white = power_only_covariance(C)
    np.testing.assert_allclose(np.einsum("bii->b", white), np.einsum("bii->b", C), rtol=1e-12)
    np.testing.assert_allclose(white[0], white[0, 0, 0] * np.eye(4))
    assert isinstance(power_only_covariance(torch.eye(2)), torch.Tensor)


def test_gradients_reach_the_covariance_and_the_weights():
    rng = np.random.default_rng(9)
    root = torch.from_numpy(complex_normal(rng, 3, 3)).requires_grad_()
    loading = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def outputs(root, loading):
        C = root @ root.mH + 0.1 * torch.eye(3)
        plain = estimated_covariance(C, 4, seed=0, loading=loading)
        return plain, estimated_covariance(C, 4, seed=0, shrinkage="ledoit_wolf"), power_only_covariance(C)

    assert torch.autograd.gradcheck(outputs, (root, loading))
