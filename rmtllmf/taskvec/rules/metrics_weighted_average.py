"""Metrics-weighted averaging: the mean of checkpoints, in which the better ones count for more."""

from __future__ import annotations

import math
from collections.abc import Iterable

from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from ...errors import InputError, ShapeError
from .._engine import Fusion
from .._options import FusionOptions, plain_number
from ..vector import TaskVector
from ._linear import weighted_sum

__all__ = ["metric_weights", "metrics_weighted_average"]


def metrics_weighted_average(
    vectors: Iterable[Tensors],
    metrics: Iterable[float],
    penalty: float = 1.0,
    *,
    larger_is_better: bool = False,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The mean of the vectors, weighted by how good each of them is known to be.

    .. math:: \tau = \lambda \sum_{q=1}^{N} w_q \tau_q, \qquad w_q = \frac{m_q^{\mp p}}{\sum_{j=1}^{N} m_j^{\mp p}}

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        metrics: :math:`m_q`, a positive number for each vector, such as its loss, or its number of training steps.
        penalty: p, at least 0: how much worse ones are made to suffer. 0 is the plain mean; a large number leaves the
            best one alone.
        larger_is_better: False for losses, with :math:`m^{-p}`; True for accuracies and steps, with :math:`m^p`.
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors.

    Returns:
        The update, a `TaskVector`. Gradients flow to the vectors.

    Raises:
        InputError: metrics that are not positive, or a negative `penalty`. ShapeError: not one metric for each vector.
            Otherwise as `task_arithmetic`.

    Source: Yu and Choi, "Parameter-efficient checkpoint merging via metrics-weighted averaging", 2025: checkpoints of
    one run, weighted by training loss or steps and one penalty factor. That the penalty is an exponent is the choice of
    this library. Adapters are to be averaged as updates (`adapter_vector`): a mean of products is not the product of
    means.

    Example:
        >>> import torch
        >>> checkpoints = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}]
        >>> dict(metrics_weighted_average(checkpoints, [0.6, 0.3]))  # weights 1/3 and 2/3
        {'w': tensor([3.])}
    """
    fusion = Fusion(vectors, options)
    factor = plain_number(scale, "scale")
    shares = metric_weights(metrics, penalty, larger_is_better=larger_is_better)
    if len(shares) != fusion.count:
        raise ShapeError(f"metrics: expected {fusion.count} numbers, one for each vector, got {len(shares)}")
    return weighted_sum(fusion, lambda key: [factor * a * w for a, w in zip(shares, fusion.weights(key), strict=True)])


def metric_weights(metrics: Iterable[float], penalty: float = 1.0, *, larger_is_better: bool = False) -> list[float]:
    r"""The weights of `metrics_weighted_average`, for use in any other rule: ``ties(vectors, weights=...)``.

    .. math:: w_q = \frac{m_q^{\mp p}}{\sum_{j=1}^{N} m_j^{\mp p}}

    Args:
        metrics: :math:`m_q`, positive numbers.
        penalty, larger_is_better: as in `metrics_weighted_average`.

    Returns:
        N weights that add up to 1.

    Raises:
        InputError: no metrics or such as are not positive, or a negative `penalty`.

    Source: Yu and Choi, "Parameter-efficient checkpoint merging via metrics-weighted averaging", 2025.

    Example:
        >>> metric_weights([0.5, 0.9], larger_is_better=True)
        [0.357..., 0.642...]
        >>> metric_weights([1.0, 2.0], penalty=2.0)
        [0.8, 0.2]
    """
    if not isinstance(larger_is_better, bool):
        raise TypeError(f"larger_is_better: expected True or False, got {larger_is_better!r}")
    power = finite_number(penalty, "penalty")
    if power < 0:
        raise InputError(f"penalty: expected a number of at least 0, got {power:g}")
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        raise TypeError(f"metrics: expected a number for each vector, got {type(metrics).__name__}")
    values = [finite_number(value, f"metrics[{index}]", positive=True) for index, value in enumerate(metrics)]
    if not values:
        raise InputError("metrics: expected at least one number, got none")
    best = max(values) if larger_is_better else min(values)
    ratios = [value / best if larger_is_better else best / value for value in values]  # at most 1: no overflow
    weights = [ratio**power for ratio in ratios]
    return [weight / math.fsum(weights) for weight in weights]
