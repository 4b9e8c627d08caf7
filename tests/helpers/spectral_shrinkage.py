"""Low-rank matrices in noise, shrunk by their singular values, and the formula for one of them written out."""

import numpy as np
import torch

from helpers.draws import normal
from rmtllmf.resilience.spectral_shrink import spectral_shrink

USERS = 8


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(normal(rows, columns, seed=seed))[0]


def low_rank(rows, columns, values, seed):
    values = torch.as_tensor(values, dtype=torch.float64)
    left, right = orthonormal(rows, len(values), seed), orthonormal(columns, len(values), seed + 10_000)
    return (left * values) @ right.T


def equicorrelated(rho, deviations):
    d = torch.as_tensor(deviations, dtype=torch.float64)
    return (rho + (1 - rho) * torch.eye(len(d), dtype=torch.float64)) * d[:, None] * d


def shrunk(matrices, noise, **options):
    """The tensors that come back for one matrix a user."""
    options = {"scale": 1.0, **options}
    return [vector["w"] for vector in spectral_shrink([{"w": X} for X in matrices], noise, **options)]


def error(found, true):
    return float(sum((a - b).square().sum() for a, b in zip(found, true, strict=True)))


def naive(X, sigma):
    """The formula of Gavish and Donoho, value by value."""
    X = np.asarray(X, dtype=float)
    if X.shape[0] > X.shape[1]:
        return naive(X.T, sigma).T
    m, n = X.shape
    beta = m / n
    U, s, Vt = np.linalg.svd(X, full_matrices=False)
    result = np.zeros_like(X)
    for i in range(m):
        y = s[i] / (sigma * np.sqrt(n))
        if y > 1 + np.sqrt(beta):
            new = sigma * np.sqrt(n) * np.sqrt((y**2 - beta - 1) ** 2 - 4 * beta) / y
            result += new * np.outer(U[:, i], Vt[i])
    return result


def several(kind, energy, seed, rows=48, columns=96):
    """USERS matrices with `energy` times that of noise of variance 1."""
    values = [1.0, 0.7, 0.5]
    if kind == "alike":
        matrices = [low_rank(rows, columns, values, seed)] * USERS
    elif kind == "Gaussian":
        matrices = list(normal(USERS, rows, columns, seed=seed))
    elif kind == "full rank":
        values = torch.arange(1, rows + 1, dtype=torch.float64) ** -0.7
        matrices = [low_rank(rows, columns, values, seed + q) for q in range(USERS)]
    else:
        matrices = [low_rank(rows, columns, values, seed + q) for q in range(USERS)]
    return [A * (energy * rows * columns) ** 0.5 / A.norm() for A in matrices]


def with_noise(matrices, V, seed):
    """Noise of covariance V between users; a block for each of equally many rows, if V has blocks."""
    V = V if V.ndim == 3 else V[None]
    Z = normal(len(matrices), *matrices[0].shape, seed=seed)
    pieces = Z.chunk(len(V), 1)
    Z = torch.cat([torch.einsum("qj,jmn->qmn", torch.linalg.cholesky(v), z) for v, z in zip(V, pieces, strict=True)], 1)
    return [A + z for A, z in zip(matrices, Z, strict=True)]
