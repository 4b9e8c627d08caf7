"""The geometric median of the task vectors: robust federated averaging."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import Unpack

from ..._state import Tensors, finite_number, whole_number
from .._engine import Fusion
from .._options import FusionOptions
from ..vector import TaskVector
from ._distances import gram_around, squared_distances
from ._fermat_weber import gram_from, most_central, optimal_weights
from ._linear import weighted_sum

__all__ = ["geometric_median"]


def geometric_median(
    vectors: Iterable[Tensors],
    *,
    scale: float = 1.0,
    tolerance: float = 1e-10,
    max_steps: int = 100,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The vector with the smallest sum of distances to the task vectors: robust federated averaging (RFA).

    .. math:: \tau = \lambda \operatorname*{arg\,min}_z \sum_{q=1}^{N} \lVert z - \tau_q \rVert

    Distances are over all entries together. Fewer than half of the vectors cannot carry it away. The minimiser is a
    convex combination of the vectors, found from their distances alone: they are read twice (three times if some are
    ten thousand times as far off as others), however many steps it takes. Where the source stops a smoothed Weiszfeld
    iteration early, this one goes on, with Newton's method, until the vectors' pull is balanced,

    .. math:: \Big\lVert \sum_{q=1}^{N} \frac{z - \tau_q}{\lVert z - \tau_q \rVert} \Big\rVert \le N \text{ tolerance}

    or, where z is one of the vectors, until the others pull at it with no more than 1 (Vardi and Zhang).

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        scale: :math:`\lambda`; 1, as in the source.
        tolerance: how far from balanced the pull of the vectors may be, per vector.
        max_steps: how many steps are taken at most; it takes about ten.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, before distances are taken (the
            source's weights, which multiply the distances, are something else).

    Returns:
        The update, a `TaskVector`. Where several of the vectors solve the problem (N = 2, or all of them on one line),
        the mean of those. Vectors closer to each other than a millionth of their distance from the most central one
        count as equal.

    Raises:
        ConvergenceError: `tolerance` is not reached after `max_steps`. NonFiniteError: NaN or infinity in any vector:
            distances to it do not exist. InputError: `tolerance` or `max_steps` are not positive. Otherwise as
            `task_arithmetic`.

    Source: Pillutla et al., "Robust aggregation for federated learning", 2022; Vardi and Zhang, "The multivariate
    L1-median and associated data depth", 2000.

    Example:
        >>> import torch
        >>> corners = [{"w": torch.tensor(corner)} for corner in ([0.0, 1.0], [0.0, -1.0], [2.0, 0.0], [1e6, 0.0])]
        >>> dict(geometric_median(corners))
        {'w': tensor([2.0000, 0.0000])}
    """
    factor = finite_number(scale, "scale")
    tolerance = finite_number(tolerance, "tolerance", positive=True)
    max_steps = whole_number(max_steps, "max_steps", at_least=1)
    fusion = Fusion(vectors, options)
    distances = squared_distances(fusion).numpy()
    gram = gram_from(distances)
    if gram is None:
        gram = gram_around(fusion, most_central(distances)).numpy()
    share = [factor * float(weight) for weight in optimal_weights(distances, gram, tolerance, max_steps)]
    return weighted_sum(fusion, lambda key: [a * w for a, w in zip(share, fusion.weights(key), strict=True)])
