"""SLERP: from one vector to another along the sphere, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import StateLike, Tensors, as_state, check_keys, finite_number
from ...errors import InputError
from .._engine import Fusion
from .._options import FusionOptions
from .._sources import Stored
from ..vector import TaskVector
from ._distances import grams
from ._linear import weighted_sum

__all__ = ["slerp"]


def slerp(
    vectors: Iterable[Tensors],
    t: float = 0.5,
    *,
    base: StateLike | None = None,
    parallel: float = 0.9995,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""Every tensor interpolated between two vectors along the great circle through their directions.

    .. math:: \tau = \lambda \, \frac{\sin((1 - t) \theta) \, \tau_1 + \sin(t \theta) \, \tau_2}{\sin\theta}, \qquad
              \cos\theta = \frac{\langle \tau_1, \tau_2 \rangle}{\lVert \tau_1 \rVert \, \lVert \tau_2 \rVert}

    Of two vectors of one length all points have that length, where a mean of theirs is shorter: for orthogonal ones by
    a factor of :math:`\sqrt 2`. With `base` it is not the task vectors that are interpolated but the models,
    :math:`\theta_q = \theta_{\text{base}} + \tau_q`, as in the tools that have no task vectors (mergekit, FusionBench):
    these are nearly parallel, so that the result hardly differs from a mean.

    Tensors whose directions are (nearly) the same or opposite, and tensors of zeros, which have none, are interpolated
    linearly, :math:`(1 - t) \tau_1 + t \tau_2`.

    Args:
        vectors: two mappings of name -> tensor with the same keys and shapes. Not written to.
        t: between 0, the first vector, and 1, the second.
        base: the base model, a module or a mapping with the vectors' names; None: the task vectors are interpolated.
        parallel: linearly where :math:`|\cos\theta|` is above this; the default is what the tools have.
        scale: :math:`\lambda`, of the update.
        options: as for every rule, see `FusionOptions`. Weights multiply the task vectors, before angles are taken.

    Returns:
        The update, a `TaskVector`, also with `base`. The vectors are read twice and nothing is held as a whole.

    Raises:
        InputError: not two vectors, or `t` or `parallel` outside [0, 1]. StateMismatchError: `base` does not fit.
            NonFiniteError: NaN or infinity in a vector or in `base`. Otherwise as `task_arithmetic`.

    Source: Shoemake, "Animating rotation with quaternion curves", 1985, section 3.3; for models it is common practice,
    without a paper of its own.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}
        >>> dict(slerp([a, b], 1 / 3))  # 30 degrees from a, and as long
        {'w': tensor([2.5981, 1.5000])}
        >>> dict(slerp([a, b], base={"w": torch.tensor([100.0, 100.0])}))  # nearly the mean
        {'w': tensor([1.5000, 1.5000])}
    """
    place, limit, factor = finite_number(t, "t"), finite_number(parallel, "parallel"), finite_number(scale, "scale")
    for argument, value in (("t", place), ("parallel", limit)):
        if not 0 <= value <= 1:
            raise InputError(f"{argument}: expected a number in [0, 1], got {value:g}")
    fusion = Fusion(vectors, options)
    if fusion.count != 2:
        raise InputError(f"vectors: expected two, between which to interpolate, got {fusion.count}")
    if base is not None:
        fusion = _with_base(fusion, base, options)
    ends = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)[:, : fusion.count]
    coefficients = {}
    for key, gram in grams(fusion).items():
        a, b = _coefficients(ends @ gram @ ends.T, place, limit)
        shares = (a, b, a + b - 1)[: fusion.count]
        coefficients[key] = [factor * c * w for c, w in zip(shares, fusion.weights(key), strict=True)]
    return weighted_sum(fusion, coefficients.__getitem__)


def _with_base(fusion: Fusion, base: StateLike, options: FusionOptions) -> Fusion:
    """The same with the base as a third vector, of weight 1."""
    state, names = as_state(base, "base"), fusion.sources[0].specs
    check_keys([key for key in state if key in names], names, "base", "vectors[0]")
    third = Stored({key: state[key] for key in names}, "base")
    weights = options.get("weights")
    if isinstance(weights, Mapping):
        weights = {pattern: [*_pair(value), 1.0] for pattern, value in weights.items()}
    elif weights is not None:
        weights = [*_pair(weights), 1.0]
    three = Fusion([*fusion.sources, third], {**options, "weights": weights})
    three.specs = {
        key: fusion.specs[fusion.alias.get(key, key)] for key in three.keys
    }  # whatever the base is stored in
    return three


def _pair(value: Any) -> list[float]:
    several = isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0
    return [float(number) for number in value] if several else [float(value)] * 2


def _coefficients(gram: Tensor, t: float, parallel: float) -> tuple[float, float]:
    """Of both ends, from their inner products."""
    squares = float(gram[0, 0]), float(gram[1, 1])
    if min(squares) > 0:
        cosine = float(gram[0, 1]) / math.sqrt(squares[0]) / math.sqrt(squares[1])
        if abs(cosine) <= min(parallel, 1 - 1e-15):
            angle = math.acos(cosine)
            return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return 1 - t, t
