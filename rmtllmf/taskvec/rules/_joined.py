"""Singular directions of several tasks side by side, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._spectral import polar

CLOSE = 3e-6  # least singular value of the joined directions for which quick ones are good enough ...
GROWTH = 100.0  # ... and by how much their errors, some 1e-6, may grow
COINCIDENT = 1e-7  # singular value of the joined directions below which they are dependent

Triplets = tuple[Tensor, Tensor, Tensor]  # U (m, r), singular values (r), V (n, r)


def joined(triplets: Sequence[Triplets]) -> Triplets:
    """All of them side by side."""
    U, s, V = (torch.cat(parts, -1) for parts in zip(*triplets, strict=True))
    return U, s, V


def decorrelated(U: Tensor, s: Tensor, V: Tensor, dtype: torch.dtype, *, quick: bool = False) -> Tensor | None:
    r"""``polar(U) diag(s) polar(V)^T``: the nearest orthonormal directions in the place of U (m, r) and V (n, r).

    Args:
        U, s, V: of r joined directions.
        dtype: as for `polar`; also that of the result.
        quick: U and V err by some 1e-6, as those of ``leading(..., quick=True)`` may.

    Returns:
        (m, n); None if `quick` directions are not exact enough, because they are too close to each other.
    """
    (left, length), (right, width) = (polar(tensor, COINCIDENT, dtype) for tensor in (U, V))
    if quick and not (_apart(length, len(U)) and _apart(width, len(V))):
        return None
    s = s.to(dtype)
    if len(U) >= len(V):
        return left.times(s[:, None] * right.whole().to(dtype).mT).to(dtype)
    return right.times(s[:, None] * left.whole().to(dtype).mT).to(dtype).mT


def _apart(s: Tensor, rows: int) -> bool:
    r"""Whether the polar factor of a matrix of singular values `s` is not much less exact than the matrix.

    An error :math:`E` of it becomes one of :math:`2 E_{ij} / (s_i + s_j)` at most between two of its directions, of
    :math:`E_{ij} / s_j` towards others, and of nothing in a single direction, unless its sign changes.
    """
    if float(s.min()) <= CLOSE:
        return False
    pairs = 2 / (s[:, None] + s)
    pairs.diagonal().zero_()
    growth = pairs.square_().sum() + (rows - len(s)) * s.pow(-2).sum()
    return float(growth.sqrt()) < GROWTH * len(s)
