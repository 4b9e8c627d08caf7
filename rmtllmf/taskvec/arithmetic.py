"""Task arithmetic: add the task vectors up and scale the sum."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .._state import (
    Tensors,
    all_finite,
    as_vectors,
    check_finite,
    finite_number,
    heuristic_scale,
    is_bendable,
    map_tied,
    wide,
)
from ..errors import InputError, NonFiniteError
from .vector import TaskVector

__all__ = ["heuristic_scale", "task_arithmetic"]


def task_arithmetic(vectors: Iterable[Tensors], scale: float | None = None) -> TaskVector:
    r"""The fused update of task arithmetic.

    .. math:: \tau = \lambda_N \sum_{q=1}^{N} \tau_q

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes; integer, boolean and running-statistics
            entries are left out. Not written to.
        scale: :math:`\lambda_N`; None: `heuristic_scale` of N.

    Returns:
        The update, a `TaskVector`; ``update.apply_to(base)`` makes the model. Added up in the order given, in float32
        at least, and returned in the vectors' dtype (the wider one where they differ).

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
    states = as_vectors(vectors, "vectors")
    factor = heuristic_scale(len(states)) if scale is None else finite_number(scale, "scale")
    keys = [key for key, tensor in states[0].items() if is_bendable(key, tensor)]
    if not keys:
        raise InputError("vectors: hold no floating-point entries, so there is nothing to add up")

    def scaled_sum(*tensors: Tensor) -> Tensor:
        dtypes = {tensor.dtype for tensor in tensors}
        total = wide(tensors[0])
        total = total.to(torch.float64 if torch.float64 in dtypes else torch.float32, copy=total is tensors[0])
        for tensor in tensors[1:]:
            total += tensor.to(total.dtype)
        total *= factor
        return total.to(dtypes.pop()) if len(dtypes) == 1 else total

    fused = map_tied(scaled_sum, keys, *states)
    for key, value in fused.items():
        if not all_finite(value):
            for index, state in enumerate(states):
                check_finite({key: state[key]}, f"vectors[{index}]")
            raise NonFiniteError(f"the sum of vectors[...][{key!r}] overflows {value.dtype}")
    return TaskVector(fused)
