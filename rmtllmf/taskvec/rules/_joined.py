"""Singular directions of several tasks side by side, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._spectral import polar

CLOSE = 3e-6  # least singular value of the joined directions for which quick ones are good enough ...
GROWTH = 100.0  # ... and by how much their errors, some 1e-6, may grow
COINCIDENT = 1e-7  # singular value of the joined directions below which they are dependent

Triplets = tuple[Tensor, Tensor, Tensor]  # U (m, r), singular values (r), V (n, r)


def decorrelated(
    find: Callable[[bool], Sequence[Triplets]], weigh: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    r"""``polar(U) diag(weigh(s)) polar(V)^T`` (m, n), of all the triplets U, s, V that are found, side by side.

    Args:
        find: find(True) may find what errs by some 1e-6, as ``leading(..., quick=True)`` does; find(False) is called
            where that is not exact enough, because directions are too close to each other, and for float64.
        weigh: what takes the place of the joined singular values.
        dtype: as for `polar`; also that of the result.
    """
    for quick in (dtype == torch.float32, False):
        U, s, V = (torch.cat(tensors, -1) for tensors in zip(*find(quick), strict=True))
        if not len(s):
            return U.new_zeros(len(U), len(V), dtype=dtype)
        (left, length), (right, width) = (polar(tensor, COINCIDENT, dtype) for tensor in (U, V))
        if not quick or (_apart(length, len(U)) and _apart(width, len(V))):
            break
    s = weigh(s).to(dtype)
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
