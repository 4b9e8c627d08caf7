"""Task arithmetic: add the task vectors up and scale the sum."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import Unpack

from ..._state import Tensors, heuristic_scale
from .._engine import Fusion
from .._options import FusionOptions, plain_number
from ..vector import TaskVector
from ._linear import weighted_sum

__all__ = ["heuristic_scale", "task_arithmetic"]


def task_arithmetic(
    vectors: Iterable[Tensors], scale: float | None = None, **options: Unpack[FusionOptions]
) -> TaskVector:
    r"""The fused update of task arithmetic.

    .. math:: \tau = \lambda_N \sum_{q=1}^{N} \tau_q

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes; integer, boolean and running-statistics
            entries are left out. Not written to.
        scale: :math:`\lambda_N`; None: `heuristic_scale` of N.
        options: as for every rule, see `FusionOptions`.

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
    fusion = Fusion(vectors, options)
    factor = heuristic_scale(fusion.count) if scale is None else plain_number(scale, "scale")
    return weighted_sum(fusion, lambda key: [factor * weight for weight in fusion.weights(key)])
