"""Iso-CTS: directions that the tasks share, and some of each task's own, made orthogonal and equally long."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from ...errors import InputError
from .._engine import Fusion
from .._options import FusionOptions
from ..vector import TaskVector
from ._joined import Triplets, decorrelated
from ._spectral import averaged, leading, preimage, rounding_level, scaled

__all__ = ["iso_cts"]

STRONG = 1e-3  # share of a matrix's norm above which directions are good enough after a projection in float32


def iso_cts(
    vectors: Iterable[Tensors], common: float = 0.8, *, scale: float = 1.0, **options: Unpack[FusionOptions]
) -> TaskVector:
    r"""The fused update of Iso-CTS: Iso-C, with its weakest directions replaced by the tasks' own strongest.

    .. math::
        \tau = \lambda \bar\sigma U_\perp V_\perp^T, \qquad
        U = [U_0\ U_1 \cdots U_N], \quad V = [V_0\ V_1 \cdots V_N], \qquad
        U_\perp = \arg\min_{Q^T Q = I} \|Q - U\|_F,

    for each matrix (m, n) of :math:`r = \min(m, n)` directions. :math:`U_0, V_0` are the k leading singular vectors of
    :math:`\sum_q \tau_q`; :math:`U_q, V_q` the s leading ones of :math:`\tau_q - U_0 U_0^T \tau_q`, what the task has
    beside them; :math:`\bar\sigma` is the mean of all their singular values, and :math:`V_\perp` is made as
    :math:`U_\perp` is. s is (1 - common) r / N rounded to the nearest whole number (at most r / N), and k = r - N s, so
    that there are r directions in all. Where s is 0 (more tasks than directions) this is Iso-C. Tensors that are no
    matrices (biases, convolutions) are averaged, :math:`\tau = \frac{\lambda}{N} \sum_q \tau_q`.

    Directions whose singular value is at the level that rounding makes are left out, and what tasks share exactly
    counts once, as in `tsv`; the mean is over r nevertheless, as in `iso_c`.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        common: the share of directions that is common, between 0 (each task has its own, isotropic) and 1 (Iso-C).
        scale: :math:`\lambda`, of the matrices and of the averages; the source tunes it on held-out data.
        options: as for every rule, see `FusionOptions`. Embeddings and projections are matrices too, see `iso_c`.

    Returns:
        The update, a `TaskVector`. Within 1e-3 (relative, a tensor's Frobenius norm) of an exact calculation, and 1e-9
        with ``compute_dtype=torch.float64``, unless the joined directions, or the last one kept and the first one left
        out, are all but equal.

    Raises:
        InputError: `common` is not in [0, 1], no vectors, or a `scale` that is not finite. StateMismatchError: keys or
        shapes disagree. NonFiniteError: NaN or infinity in a vector, or the sum overflows.

    Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces",
    2025, algorithm 2. k is rounded as in the authors' code, whose default `common` has.

    Example:
        >>> import torch
        >>> a = {"w": torch.diag(torch.tensor([3.0, 1.0, 0.0]))}
        >>> b = {"w": torch.diag(torch.tensor([3.0, 0.0, 2.0]))}
        >>> iso_cts([a, b], common=0.4)["w"]  # one direction in common and one of each task: all as long as their mean
        tensor([[3., 0., 0.],
                [0., 3., 0.],
                [0., 0., 3.]])
    """
    share, factor = finite_number(common, "common"), finite_number(scale, "scale")
    if not 0 <= share <= 1:
        raise InputError(f"common: expected a share in [0, 1], got {share:g}")
    fusion = Fusion(vectors, options)
    count = fusion.count

    def matrix(key: str, parts: list[Tensor]) -> Tensor:
        rank, dtype = min(parts[0].shape), parts[0].dtype
        own = min(round((rank - int(rank * share)) / count), rank // count)
        parts, unit = scaled(parts)
        total = torch.stack(parts).sum(0) if count > 1 else parts[0]
        shared = leading(total, rank - count * own, rounding_level(parts), dtype)
        beside = _Beside(shared[0], parts[0].shape[1])
        return decorrelated(
            lambda quick: [shared, *(beside.leading(part, own, quick) for part in parts if own)],
            lambda s: torch.full_like(s, factor * unit * float(s.sum()) / rank),
            dtype,
        )

    return fusion.by_matrix(matrix, averaged(count, factor))


class _Beside:
    """Matrices (m, n) without their part in the span of the orthonormal columns of U (m, k)."""

    def __init__(self, U: Tensor, n: int) -> None:
        (m, k), self.U = U.shape, U
        # few directions are left: in their coordinates it is a small matrix
        self.others = torch.linalg.qr(U, mode="complete").Q[:, k:] if m - k < n else None

    def leading(self, X: Tensor, count: int, quick: bool) -> Triplets:
        """The `count` leading singular triplets of what is left of X."""
        floor = rounding_level([X])
        if self.others is not None:
            U, s, V = leading(preimage(X, self.others).mT, count, floor, X.dtype)
            return self.others @ U, s, V
        if quick:
            U = self.U.to(X.dtype)
            rest = torch.addmm(X, U, U.mT @ X, alpha=-1)
            found = leading(rest, count, floor, X.dtype, quick=True)
            if len(found[1]) == count and float(found[1][-1]) > STRONG * float(torch.linalg.vector_norm(X)):
                return found
        return leading(X.double() - self.U @ preimage(X, self.U).mT, count, floor, X.dtype)
