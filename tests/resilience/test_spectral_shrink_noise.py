"""Singular values under noise that is correlated between users or differs within a matrix."""

import numpy as np
import pytest
import torch

from helpers.draws import normal
from helpers.known_errors import correlated
from helpers.spectral_shrinkage import USERS, equicorrelated, error, low_rank, naive, several, shrunk, with_noise
from rmtllmf.channel import UplinkScenario, sic, strongest_user_covariance, transmit
from rmtllmf.errors import NotPSDError
from rmtllmf.resilience.spectral_shrink import spectral_shrink


@pytest.mark.parametrize(
    ("kind", "energy", "factor"),
    [
        ("independent", 0.1, 2.5),
        ("independent", 0.5, 3.3),
        ("independent", 2.0, 3.3),
        ("full rank", 0.1, 1.4),
        ("full rank", 2.0, 1.6),
        ("Gaussian", 2.0, 1.7),  # alone it stays as it was received
        ("alike", 0.1, 0.98),
        ("alike", 0.5, 0.98),
        ("alike", 2.0, 0.98),
    ],
)
def test_joint_beats_single_where_errors_are_correlated(kind, energy, factor):
    """By `factor`; a user's noise has 1 - 7 rho^2 / (1 + 6 rho) = 1/4.0 of its variance once the others' is known."""
    V = equicorrelated(0.78, [1.0] * USERS)
    A = several(kind, energy, seed=3)
    X = with_noise(A, V, seed=4)
    alone, joint = error(shrunk(X, correlated(V)), A), error(shrunk(X, correlated(V), joint=True), A)
    assert factor * joint <= alone


@pytest.mark.parametrize(
    "noise",
    [
        [0.7] * USERS,
        correlated(torch.diag(torch.linspace(0.2, 3, USERS))),
        correlated(equicorrelated(1e-13, torch.linspace(0.5, 2, USERS))),  # but for rounding
    ],
)
def test_joint_is_single_where_errors_are_uncorrelated(noise):
    X = with_noise(several("independent", 0.5, seed=1), torch.eye(USERS, dtype=torch.float64), seed=2)
    for a, b in zip(shrunk(X, noise), shrunk(X, noise, joint=True), strict=True):
        assert torch.equal(a, b)


def test_joint_is_the_prediction_of_each_users_noise_from_the_others_in_turn():
    scale = [2.0, 1.0, 0.5]  # the last user has the least noise
    V = equicorrelated(0.6, [0.6, 2.0, 0.9])
    V[0, 1] = V[1, 0] = -0.02
    actual = (V * torch.tensor(scale, dtype=torch.float64)[:, None] * torch.tensor(scale)).numpy()
    A = [q * low_rank(20, 30, [9.0, 7.0], seed=q) for q in (1, 2, 3)]
    X = with_noise(A, torch.from_numpy(actual), seed=5)
    found = [naive(x, actual[q, q] ** 0.5) for q, x in enumerate(X)]
    for q in np.argsort(np.diag(actual)):
        others = [j for j in range(3) if j != q]
        law = np.linalg.solve(actual[np.ix_(others, others)], actual[others, q])
        predicted = sum(c * (X[j].numpy() - found[j]) for c, j in zip(law, others, strict=True))
        estimate = naive(X[q].numpy() - predicted, np.sqrt(actual[q, q] - actual[q, others] @ law))
        if np.sum(estimate**2) >= 0.99 * np.sum(found[q] ** 2):
            found[q] = estimate
    for a, b, alone in zip(shrunk(X, correlated(V), scale=scale, joint=True), found, X, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * float(alone.norm()))


def test_joint_under_the_strongest_user_attack():
    up = UplinkScenario().draw(seed=3)
    C = strongest_user_covariance(up.H, up.P, 124 * up.noise) + up.noise_covariance
    heard = sic(up.H, up.P, C, designed_for=up.noise_covariance, order="strongest_first")
    sent = [{"w": low_rank(64, 128, [1.0, 0.8, 0.5], seed=q)} for q in range(USERS)]
    received = transmit(sent, heard, seed=2)
    true = [vector["w"] for vector in sent]
    risk = [
        error([vector["w"] for vector in vectors], true)
        for vectors in (
            received,
            spectral_shrink(received, heard),
            spectral_shrink(received, heard, joint=True),
        )
    ]
    assert risk[1] < 0.2 * risk[0]
    assert risk[2] < 0.6 * risk[1]


def test_perfectly_correlated_errors_are_refused_and_noise_free_users_are_not():
    one = torch.ones(3, 3, dtype=torch.float64)
    X = [normal(8, 9, seed=q) for q in range(3)]
    with pytest.raises(NotPSDError, match=r"perfectly correlated in block 0 .* use joint=False"):
        shrunk(X, correlated(one), joint=True)
    for a, b in zip(shrunk(X, correlated(one)), X, strict=True):
        np.testing.assert_allclose(a, naive(b, 1.0), atol=1e-11)
    V = equicorrelated(0.9, [0.0, 1.0, 2.0])
    quiet, *loud = shrunk(X, correlated(V), joint=True)
    assert torch.equal(quiet, X[0])
    for a, b in zip(loud, shrunk(X[1:], correlated(V[1:, 1:]), joint=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# Noise that differs within a matrix


def test_equal_blocks_are_no_blocks():
    X = [normal(10, 12, seed=q) + low_rank(10, 12, [30.0], seed=q) for q in range(2)]
    for joint in (False, True):
        V = equicorrelated(0.5, [1.0, 1.5])
        one, many = (shrunk(X, correlated(v), joint=joint) for v in (V, V.expand(5, 2, 2)))
        for a, b in zip(one, many, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(60, 120), (120, 60)])
@pytest.mark.parametrize("quiet", [0.02, 0.2])
def test_rows_of_unequal_noise(shape, quiet):
    """As good as the best coefficients, which need the truth, but for 6 %; and much better than one mean variance."""
    variance = torch.tensor([[quiet], [2 - quiet]], dtype=torch.float64)
    rows = variance.repeat_interleave(shape[0] // 2, 0)
    errors = np.zeros(3)
    for seed in range(6):
        A = low_rank(*shape, [26.0, 22.0, 17.0], seed)
        X = A + rows.sqrt() * normal(*shape, seed=seed + 100)
        (found,) = shrunk([X], variance)
        U, s, Vt = torch.linalg.svd(X / rows.sqrt(), full_matrices=False)
        kept = int((s > shape[0] ** 0.5 + shape[1] ** 0.5).sum())
        triplets = torch.stack([(rows.sqrt() * torch.outer(U[:, i], Vt[i])).reshape(-1) for i in range(kept)], 1)
        best = triplets @ torch.linalg.lstsq(triplets, A.reshape(-1, 1)).solution
        inside = triplets @ torch.linalg.lstsq(triplets, found.reshape(-1, 1)).solution
        torch.testing.assert_close(inside.view(shape), found, rtol=0, atol=1e-9)
        errors += [error([found], [A]), error([best.view(shape)], [A]), error(shrunk([X], [1.0]), [A])]
    assert errors[0] <= 1.06 * errors[1]
    assert errors[2] >= 1.3 * errors[0]


def test_blocks_without_noise_keep_their_rows():
    X = low_rank(12, 20, [20.0], seed=1) + normal(12, 20, seed=2)
    (found,) = shrunk([X], [[0.0], [1.0], [1.0]])
    assert torch.equal(found[:4], X[:4])
    np.testing.assert_allclose(found[4:], naive(X[4:], 1.0), atol=1e-12)


def test_a_row_across_two_blocks_counts_with_its_mean_variance():
    X = low_rank(3, 20, [20.0], seed=1) + normal(3, 20, seed=2)
    (halved,) = shrunk([X], [[0.5], [1.5]])  # 30 entries each: the middle row lies in both
    noise = torch.tensor([0.5, 1.0, 1.5])
    (by_rows,) = shrunk([X], noise[:, None])
    torch.testing.assert_close(halved, by_rows, rtol=0, atol=1e-12)


def test_joint_in_block_fading_takes_every_blocks_own_covariance():
    signs = [1.6, -1.6] * (USERS // 2)
    V = torch.stack([equicorrelated(0.9, [1.0] * USERS), equicorrelated(0.5, signs)])
    A = several("independent", 0.5, seed=3)
    X = with_noise(A, V, seed=4)
    alone, joint = (error(shrunk(X, correlated(V), joint=joint), A) for joint in (False, True))
    mean = error(shrunk(X, correlated(V.mean(0)), joint=True), A)
    assert 2 * joint <= alone
    assert 1.1 * joint <= mean
