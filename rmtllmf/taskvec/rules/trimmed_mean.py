"""The coordinate-wise trimmed mean of the task vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable

from typing_extensions import Unpack

from ..._state import Tensors, finite_number, whole_number
from ...errors import InputError
from .._engine import Fusion
from .._options import FusionOptions
from ..vector import TaskVector
from ._sorting import mean_of_ranks

__all__ = ["trimmed_mean"]


def trimmed_mean(
    vectors: Iterable[Tensors], trim: float = 0.25, *, scale: float = 1.0, **options: Unpack[FusionOptions]
) -> TaskVector:
    r"""The mean of the task vectors without the k largest and k smallest values, entry by entry.

    .. math:: \tau_i = \frac{\lambda}{N - 2k} \sum_{q=k+1}^{N-k} \tau_{(q),i}

    where :math:`\tau_{(1),i} \le \dots \le \tau_{(N),i}` are the sorted values of entry i. Up to k hostile vectors
    cannot move it beyond the others. k = 0 is the mean, the largest k is `coordinate_median`.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        trim: k itself, an int; or the share :math:`\beta < 1/2` of the vectors, a float, with
            :math:`k = \lfloor \beta N \rfloor`. The source takes the share of hostile vectors that must be borne; the
            default leaves the half in the middle (and, for fewer than four vectors, all of them).
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors.

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: `trim` is negative, or leaves nothing.
        NonFiniteError: NaN or infinity in any vector, also where it would have been trimmed. Otherwise as
            `task_arithmetic`.

    Source: Yin et al., "Byzantine-robust distributed learning: towards optimal statistical rates", 2018, definition 2.

    Example:
        >>> import torch
        >>> values = [{"w": torch.tensor([value])} for value in (1.0, 2.0, 6.0, -1e6)]
        >>> dict(trimmed_mean(values, 1))
        {'w': tensor([1.5000])}
    """
    factor = finite_number(scale, "scale")
    fusion = Fusion(vectors, options)
    return mean_of_ranks(fusion, _ranks_left(trim, fusion.count), factor)


def _ranks_left(trim: float, count: int) -> range:
    if isinstance(trim, float):
        share = finite_number(trim, "trim")
        if not 0 <= share < 0.5:
            raise InputError(f"trim: expected a share of at least 0 and less than 0.5, or an int, got {share}")
        dropped = math.floor(share * count * (1 + 1e-12))  # 0.29 * 100 is 29
    else:
        dropped = whole_number(trim, "trim", at_least=0)
    if 2 * dropped >= count:
        raise InputError(f"trim: {dropped} on either side leave nothing of {count} vectors")
    return range(dropped, count - dropped)
