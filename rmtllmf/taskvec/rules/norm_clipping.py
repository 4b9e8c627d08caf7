"""Norm clipping: no task vector counts with more than a given length."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from .._engine import Fusion
from .._options import FusionOptions
from ..vector import TaskVector
from ._distances import squared_norms
from ._linear import weighted_sum

__all__ = ["norm_clipping"]


def norm_clipping(
    vectors: Iterable[Tensors],
    max_norm: float | None = None,
    *,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The mean of the vectors, of which the long ones are shortened first.

    .. math:: \tau = \frac{\lambda}{N} \sum_{q=1}^{N} \frac{\tau_q}{\max(1, \lVert \tau_q \rVert / M)}

    A hostile vector moves the result by M / N at most. Averaged as in the source (federated averaging), not summed:
    ``scale=0.3 * N`` gives what task arithmetic gives when no vector is long.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        max_norm: M, of a whole vector; None: the median of the N norms (of the two middle ones their mean), which fewer
            than half of the vectors cannot move at will. The source takes a constant tuned to the task.
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, before norms are taken.

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: `max_norm` is not positive. NonFiniteError: NaN or infinity in any vector: it has no norm. Otherwise
            as `task_arithmetic`.

    Source: Sun et al., "Can you really backdoor federated learning?", 2019, section 4, without the noise.

    Example:
        >>> import torch
        >>> values = [{"w": torch.tensor([value])} for value in (1.0, 2.0, -1e6)]
        >>> dict(norm_clipping(values, scale=3.0))
        {'w': tensor([1.])}
    """
    factor = finite_number(scale, "scale")
    if max_norm is not None:
        max_norm = finite_number(max_norm, "max_norm", positive=True)
    fusion = Fusion(vectors, options)
    norms = squared_norms(fusion).sqrt().tolist()
    if max_norm is None:
        max_norm = median(norms)
    share = [factor / fusion.count * (1.0 if norm <= max_norm else max_norm / norm) for norm in norms]
    return weighted_sum(fusion, lambda key: [a * w for a, w in zip(share, fusion.weights(key), strict=True)])
