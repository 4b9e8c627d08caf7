"""The coordinate-wise median of the task vectors."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from .._engine import Fusion
from .._options import FusionOptions
from ..vector import TaskVector
from ._sorting import mean_of_ranks

__all__ = ["coordinate_median"]


def coordinate_median(
    vectors: Iterable[Tensors], *, scale: float = 1.0, **options: Unpack[FusionOptions]
) -> TaskVector:
    r"""The median of the task vectors, entry by entry: fewer than half of them can say what they like.

    .. math:: \tau_i = \lambda \operatorname{median}(\tau_{1,i}, \dots, \tau_{N,i})

    For an even N the mean of the two values in the middle. It replaces an average, not a sum: N equal vectors give that
    vector.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors; they do not count them twice.

    Returns:
        The update, a `TaskVector`. Without weights, for an odd N every entry is one of the given ones, exactly.

    Raises:
        NonFiniteError: NaN or infinity in any vector, also where the median would not have noticed: a vector with
            infinities is to be left out by name, not outvoted in silence. Otherwise as `task_arithmetic`.

    Source: Yin et al., "Byzantine-robust distributed learning: towards optimal statistical rates", 2018, definition 1.

    Example:
        >>> import torch
        >>> honest, hostile = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}], {"w": torch.tensor([-1e6])}
        >>> dict(coordinate_median([*honest, hostile]))
        {'w': tensor([1.])}
    """
    factor = finite_number(scale, "scale")
    fusion = Fusion(vectors, options)
    return mean_of_ranks(fusion, range((fusion.count - 1) // 2, fusion.count // 2 + 1), factor)
