"""Task arithmetic: add the task vectors up and scale the sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._state import (
    Tensors,
    all_finite,
    check_finite,
    check_same_states,
    finite_number,
    heuristic_scale,
    is_bendable,
    map_tied,
)
from ..errors import InputError, NonFiniteError
from .vector import TaskVector

__all__ = ["heuristic_scale", "task_arithmetic"]


def task_arithmetic(vectors: Sequence[Tensors], scale: float | None = None) -> TaskVector:
    r"""The fused update of task arithmetic.

    .. math:: \tau = \lambda_N \sum_{q=1}^{N} \tau_q

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes; integer, boolean and running-statistics
            entries are left out. Not written to.
        scale: :math:`\lambda_N`; None: `heuristic_scale` of N.

    Returns:
        The update, a `TaskVector`; ``update.apply_to(base)`` makes the model. Added up in the order given, in float32
        at least, and returned in the vectors' dtype.

    Raises:
        InputError: no vectors, or a `scale` that is not finite. StateMismatchError: keys or shapes disagree.
        NonFiniteError: NaN or infinity in a vector, or the sum overflows.

    Source: Ilharco et al., "Editing models with task arithmetic", 2023; R-MTLLMF, eq. 6.

    Example:
        >>> import torch
        >>> update = task_arithmetic([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}], scale=0.5)
        >>> update.apply_to({"w": torch.tensor([10.0])})
        {'w': tensor([12.])}
    """
    check_same_states(vectors, "vectors")
    factor = heuristic_scale(len(vectors)) if scale is None else finite_number(scale, "scale")
    keys = [key for key in vectors[0] if is_bendable(key, vectors[0][key])]
    if not keys:
        raise InputError("vectors: hold no floating-point entries, so there is nothing to add up")

    def scaled_sum(*tensors: Tensor) -> Tensor:
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        total = tensors[0].to(torch.promote_types(dtype, torch.float32), copy=True)
        for tensor in tensors[1:]:
            total += tensor
        return total.mul_(factor).to(dtype)

    fused = map_tied(scaled_sum, keys, *vectors)
    for key, value in fused.items():
        if not all_finite(value):
            for index, vector in enumerate(vectors):
                check_finite({key: vector[key]}, f"vectors[{index}]")
            raise NonFiniteError(f"the sum of vectors[...][{key!r}] overflows {value.dtype}")
    return TaskVector(fused)
