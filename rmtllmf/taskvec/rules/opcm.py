"""OPCM: task vectors come one after another, and each brings in only what is orthogonal to those before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from ...errors import InputError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..vector import TaskVector
from ._distances import squared_norms
from ._interim import interim, part_of
from ._spectral import averaged, image, leading, rounding_level, scaled

__all__ = ["ContinualMerge", "opcm"]


def opcm(
    vectors: Iterable[Tensors], alpha: float = 0.5, *, scale: float = 1.0, **options: Unpack[FusionOptions]
) -> TaskVector:
    r"""The fused update of OPCM, of vectors in the order given.

    .. math::
        S_1 = \tau_1, \qquad S_t = S_{t-1} + P_{S_{t-1}}(\tau_t), \qquad
        \tau = \lambda \Big( \frac{1}{N} \sum_q \|\tau_q\| \Big) \frac{S_N}{\|S_N\|}

    with the norms of whole vectors. With the singular value decomposition :math:`S = U \operatorname{diag}(\sigma) V^T`
    of a matrix, P takes out of :math:`U^T \tau V` the diagonal and the block of the first k rows and columns, where k
    is the largest number of singular values whose sum is at most :math:`\alpha \sum_i \sigma_i`. What P brings in is
    thus orthogonal to S, and leaves the main directions of S alone. Tensors that are no matrices (biases, convolutions)
    are added, P = 1.

    Each vector can be merged and forgotten before the next one comes: `ContinualMerge`.

    Directions whose singular value is at the level that rounding of the entries makes are none of S, and nothing is
    taken out there; an SVD makes some up.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        alpha: :math:`\alpha` in [0, 1]; 0 takes out the diagonal only, 1 all that lies in the row and column spaces
            of S.
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, before anything else.

    Returns:
        The update, a `TaskVector`. Its norm is the mean of the vectors' norms. Memory: one vector more than the result.

    Raises:
        InputError: `alpha` is not in [0, 1], no vectors, or a `scale` that is not finite. StateMismatchError: keys or
        shapes disagree. NonFiniteError: NaN or infinity in a vector, or the update overflows.

    Source: Tang et al., "Merging models on the fly without retraining: a sequential approach to scalable continual
    model merging", 2025. k as in the authors' code (which keeps k = 0 for alpha = 1).

    Example:
        >>> import torch
        >>> first = {"w": torch.tensor([[4.0, 0.0], [0.0, 0.0]])}
        >>> second = {"w": torch.tensor([[4.0, 3.0], [0.0, 0.0]])}  # the 4 is known already
        >>> opcm([first, second])["w"]  # [[4, 3], [0, 0]], as long as the two vectors are in the mean
        tensor([[3.6000, 2.7000],
                [0.0000, 0.0000]])
    """
    share, factor = _share(alpha), finite_number(scale, "scale")
    fusion = Fusion(vectors, options)
    inner = interim(fusion, options)
    total = _total(inner, share)
    mean = float(squared_norms(inner).sqrt().mean())
    length = _norm(total)
    factor *= mean / length if length else 0.0

    def shorten(piece: Piece) -> None:
        torch.mul(part_of(total, piece), factor, out=piece.into)

    return fusion.by_entry(shorten, positional=True)


@dataclass(frozen=True)
class ContinualMerge:
    r"""What `opcm` must know of the task vectors so far: one vector and the mean of their norms.

    Attributes:
        alpha: as in `opcm`.
        total: :math:`S_t`, in float32 at least; None before the first vector.
        count: t, how many vectors have been merged.
        mean_norm: of these vectors.

    Example:
        >>> import torch
        >>> vectors = [{"w": torch.randn(4, 3)} for _ in range(5)]
        >>> merge = ContinualMerge(alpha=0.5)
        >>> for vector in vectors:
        ...     merge = merge.add(vector)
        >>> bool(torch.allclose(merge.update["w"], opcm(vectors, 0.5)["w"], atol=1e-5))
        True
    """

    alpha: float = 0.5
    total: TaskVector | None = None
    count: int = 0
    mean_norm: float = 0.0

    def __post_init__(self) -> None:
        _share(self.alpha)

    def add(self, vector: Tensors) -> ContinualMerge:
        """The same with one more task vector, which is not written to; this one stays as it is.

        Raises:
            StateMismatchError: names or shapes are not those of the vectors before. NonFiniteError: NaN or infinity.
        """
        before = [] if self.total is None else [self.total]
        fusion = Fusion([*before, vector], {}, argument="vector")
        total = _total(interim(fusion, {}), self.alpha)
        norm = float(squared_norms(fusion).sqrt()[-1])
        mean = self.mean_norm + (norm - self.mean_norm) / (self.count + 1)
        return ContinualMerge(self.alpha, total, self.count + 1, mean)

    @property
    def update(self) -> TaskVector:
        """The fused update of all vectors so far.

        Raises:
            InputError: there were none.
        """
        if self.total is None:
            raise InputError("update: nothing has been merged yet; add() a task vector first")
        length = _norm(self.total)
        return self.total * (self.mean_norm / length if length else 0.0)


def _share(alpha: float) -> float:
    share = finite_number(alpha, "alpha")
    if not 0 <= share <= 1:
        raise InputError(f"alpha: expected a share in [0, 1], got {share:g}")
    return share


def _norm(vector: TaskVector) -> float:
    return float(squared_norms(Fusion([vector], {})).sqrt()[0])


def _total(fusion: Fusion, alpha: float) -> TaskVector:
    r""":math:`S_N`."""

    def matrix(key: str, parts: list[Tensor]) -> Tensor:
        parts, unit = scaled(parts)
        return reduce(lambda total, part: _added(total, part, alpha), parts) * unit

    return fusion.by_matrix(matrix, averaged(1, 1.0))


def _added(total: Tensor, part: Tensor, alpha: float) -> Tensor:
    """S + P_S(part)."""
    dtype = part.dtype
    U, s, V = leading(total, min(total.shape), rounding_level([total]), dtype)
    if not len(s):
        return total + part
    known = len(s) if alpha == 1 else int((s.cumsum(0) <= alpha * s.sum()).sum())
    U, V = U.to(dtype), V.to(dtype)
    seen = image(part, V)  # U^T part V: its block, then the rest of its diagonal
    block = U[:, :known].mT @ seen[:, :known]
    diagonal = torch.linalg.vecdot(U[:, known:], seen[:, known:], dim=0)
    taken = torch.cat([block @ V[:, :known].mT, diagonal[:, None] * V[:, known:].mT])
    return torch.addmm(total + part, U, taken, alpha=-1)
