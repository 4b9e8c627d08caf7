"""Concrete subspace fusion: task arithmetic inside of a mask that all tasks share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from typing_extensions import Unpack

from ..._state import Tensors, all_finite, heuristic_scale
from ...errors import NonFiniteError
from .._engine import Fusion, Piece
from .._options import FusionOptions, plain_number
from ..vector import TaskVector
from ._companion import companion

__all__ = ["concrete"]


def concrete(
    vectors: Iterable[Tensors], mask: Tensors, *, scale: float | None = None, **options: Unpack[FusionOptions]
) -> TaskVector:
    r"""The fused update of Concrete task arithmetic.

    .. math:: \tau = \lambda\, m \odot \sum_q \tau_q

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        mask: m, name -> a factor for every entry: what `concrete_mask` has learned for these vectors, or any other.
        scale: :math:`\lambda`; None: `heuristic_scale` of N. The one that the mask was learned with.
        options: as for every rule, see `FusionOptions`. With the weights of `adamerging_coefficients`, and scale 1,
            this is Concrete AdaMerging, if the mask was learned with these too.

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: no vectors, or a `scale` that is not finite. StateMismatchError: keys or shapes disagree, also
            those of the mask. NonFiniteError: NaN or infinity in a vector or the mask, or overflow.

    Source: Tang et al., "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion", 2023.

    Example:
        >>> import torch
        >>> vectors = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 2.0])}]
        >>> dict(concrete(vectors, {"w": torch.tensor([2.0, 0.0])}, scale=0.5))
        {'w': tensor([4., 0.])}
    """
    fusion = Fusion(vectors, options)
    factor = heuristic_scale(fusion.count) if scale is None else plain_number(scale, "scale")
    shared = companion(mask, "mask", fusion)

    def combine(piece: Piece) -> None:
        factors = shared.read(piece.key, piece.start, piece.stop, piece.spare(0, len(piece)))
        if not all_finite(factors):
            raise NonFiniteError(f"mask[{piece.key!r}] holds non-finite entries; expected finite numbers")
        total = piece.into.zero_()
        for index in range(piece.count):
            total.add_(piece.read(index, 0))
        torch.mul(total, factors, out=total)
        if factor != 1:
            total.mul_(factor)

    return fusion.by_entry(combine, positional=True)
