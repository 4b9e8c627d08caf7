"""Singular values of a matrix in known noise: which of them are signal, and how much of each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..taskvec.rules._spectral import gram

HIDDEN = 1e6  # largest eigenvalue of a Gram matrix over the noise's, from which rounding of it would be seen
EQUAL = 1e-9  # relative difference of variances, or correlation, that is rounding


def denoised(X: Tensor, variance: Tensor) -> tuple[Tensor, bool]:
    """The matrix in X (rows, columns), float64, whose noise is independent with a `variance` for each row.

    Rows are brought to unit variance, shrunk and brought back; a row without noise stays as it is, outside of this.
    Beside it whether it is closer than X itself, as far as can be told from X.
    """
    noisy = variance > 0
    if not bool(noisy.all()):
        result, closer = X.clone(), True
        if bool(noisy.any()):
            result[noisy], closer = denoised(X[noisy], variance[noisy])
        return result, closer
    if float(variance.max() - variance.min()) <= EQUAL * float(variance.max()):
        sigma = variance.mean().sqrt()
        found, closer = _shrunk(X / sigma, None)
        return found * sigma, closer
    root = variance.sqrt()[:, None]
    found, closer = _shrunk(X / root, variance)
    return found * root, closer


def _shrunk(Y: Tensor, weights: Tensor | None) -> tuple[Tensor, bool]:
    """The signal in Y, whose noise is white with variance 1: least squared error, with the rows weighted."""
    wide = Y.shape[0] <= Y.shape[1]
    short = Y if wide else Y.mT  # (m, n), m <= n
    m, n = short.shape
    beta, edge = m / n, (m**0.5 + n**0.5) ** 2
    G = gram(short.mT)
    if not int(torch.linalg.cholesky_ex(torch.diag_embed(G.new_full((m,), edge)) - G).info):
        return torch.zeros_like(Y), True  # all eigenvalues are below the edge of the noise: eigenvectors are not needed
    eigenvalues, U = torch.linalg.eigh(G)
    if float(eigenvalues[-1]) > HIDDEN * edge:
        U, s, _ = torch.linalg.svd(short, full_matrices=False)
        eigenvalues = s.square()
    kept = eigenvalues > edge
    U, energy = U[:, kept], eigenvalues[kept] / n
    root = ((energy - beta - 1).square() - 4 * beta).clamp_min(0).sqrt()
    factor = root / energy  # new singular value over old one
    closer = _risk(eigenvalues, kept, factor, n) <= m * n
    if weights is not None:
        signal = (energy - beta - 1 + root) / 2  # squared singular value without noise, over n
        side = beta if wide else 1.0
        cosine = (signal.square() - beta).clamp_min(0) / (signal.square() + side * signal)
        factor = factor * _in_rows(U if wide else short.mT @ (U / eigenvalues[kept].sqrt()), cosine, weights)
    if 2 * len(energy) > m:
        found = ((U * factor) @ U.mT) @ short
    else:
        found = (U * factor) @ (U.mT @ short)
    return (found if wide else found.mT), closer


def _risk(eigenvalues: Tensor, kept: Tensor, factor: Tensor, n: int) -> float:
    """Stein's unbiased estimate of the squared error (Candes, Sing-Long and Trzasko, 2013, theorem IV.3).

    But for the slopes of the new values, which are taken for 1: that is one part in n of it.
    """
    m = len(eigenvalues)
    ratio = torch.zeros_like(eigenvalues)
    ratio[kept] = factor
    change = eigenvalues * (1 - ratio).square()
    product = eigenvalues * ratio  # new times old
    apart = eigenvalues[:, None] - eigenvalues
    slopes = (product[:, None] - product) / apart
    close = apart.abs() <= EQUAL * eigenvalues.abs().max()
    slopes = torch.where(close, (ratio[:, None] + ratio) / 2, slopes).fill_diagonal_(0)
    divergence = (n - m) * ratio.sum() + slopes.sum() + len(factor)
    return float(change.sum() + 2 * divergence) - m * n


def _in_rows(vectors: Tensor, cosine: Tensor, weights: Tensor) -> Tensor:
    """What weighted rows change in the best coefficient of a singular triplet.

    A singular vector is a `cosine` (squared) of the signal's and for the rest noise, which weighs what rows weigh on
    average; the coefficient falls by the share of the signal in the weight.
    """
    weight = (vectors.square() * weights[:, None]).sum(0)
    rest = (1 - cosine) * weights.mean()
    signal = (weight - rest) / cosine.clamp_min(torch.finfo(cosine.dtype).tiny)
    return torch.clamp(signal, float(weights.min()), float(weights.max())) / weight
