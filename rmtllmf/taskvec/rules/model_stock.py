"""Model Stock: the mean of the task vectors, the shorter the more they point in different directions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from ...errors import InputError
from .._engine import Fusion
from .._options import FusionOptions, Weights
from ..vector import TaskVector
from ._distances import grams
from ._linear import weighted_sum

__all__ = ["model_stock", "model_stock_ratios"]

Average = Literal["cosine", "angle"]


def model_stock(
    vectors: Iterable[Tensors],
    *,
    average: Average = "cosine",
    extrapolate: bool = False,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""For every tensor the mean of the vectors, times a ratio that follows from the angle between them.

    .. math:: \tau = \lambda \, \frac{t}{N} \sum_{q=1}^{N} \tau_q, \qquad
              t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}

    If the vectors differ from a common centre by independent noise of the same length, :math:`t \, \bar\tau` is the
    point nearest to the centre of all between the base and their mean. Vectors of one direction give t = 1; orthogonal
    ones, which have nothing in common, t = 0.

    Args:
        vectors: two mappings of name -> tensor or more, with the same keys and shapes. Not written to.
        average: what is averaged over the pairs of vectors, which the source takes to be equal: the "cosine" of
            their angle (mergekit), or the "angle" itself (FusionBench).
        extrapolate: see `model_stock_ratios`.
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, before angles are taken.

    Returns:
        The update, a `TaskVector`. The vectors are read twice and nothing is held as a whole.

    Raises:
        InputError: fewer than two vectors, or an `average` that is none. NonFiniteError: NaN or infinity in any vector.
            Otherwise as `task_arithmetic`.

    Source: Jang et al., "Model Stock: all we need is just a few fine-tuned models", 2024, section 4: made for vectors
    of one task, such as those of several seeds. The source's periodic merging during training is not part of this.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([3.0, -1.0])}
        >>> dict(model_stock([a, b]))  # noise of length 1 on both: cos = 0.8, t = 8/9
        {'w': tensor([2.6667, 0.0000])}
    """
    fusion = Fusion(vectors, options)
    factor = finite_number(scale, "scale")
    ratios = _ratios(fusion, average, extrapolate)
    return weighted_sum(fusion, lambda key: [factor * ratios[key] / fusion.count * w for w in fusion.weights(key)])


def model_stock_ratios(
    vectors: Iterable[Tensors],
    *,
    average: Average = "cosine",
    extrapolate: bool = False,
    weights: Weights | None = None,
    skip: str | Iterable[str] = (),
) -> dict[str, float]:
    r"""The ratio t of `model_stock` for every tensor: how much of it the vectors have in common.

    .. math:: t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}, \qquad
              \cos\theta = \frac{2}{N (N - 1)} \sum_{p < q} \cos(\tau_p, \tau_q)

    A vector of zeros counts as orthogonal to all others.

    Args:
        vectors: two mappings of name -> tensor or more, with the same keys and shapes.
        average: as in `model_stock`.
        extrapolate: whether t may be negative, as the formula says where vectors are further apart than orthogonal ones
            (the implementations in use), with 0 where it has no value. By default t is 0 there: a centre is not
            further away than the base, and the formula has a pole at :math:`\cos\theta = -1 / (N - 1)`.
        weights, skip: as in `FusionOptions`.

    Returns:
        Name -> t, which is at most 1.

    Raises:
        As `model_stock`.

    Source: Jang et al., "Model Stock: all we need is just a few fine-tuned models", 2024, section 4.

    Example:
        >>> import torch
        >>> same = torch.tensor([1.0, 2.0])
        >>> a, b = {"v": same, "w": torch.tensor([0.0, 1.0])}, {"v": same, "w": torch.tensor([1.0, 0.0])}
        >>> model_stock_ratios([a, b])
        {'v': 1.0, 'w': 0.0}
    """
    fusion = Fusion(vectors, {"weights": weights, "skip": skip})
    ratios = _ratios(fusion, average, extrapolate)
    ratios |= {key: ratios[original] for key, original in fusion.alias.items()}
    return {key: ratios[key] for key in fusion.sources[0].specs if key in ratios}


def _ratios(fusion: Fusion, average: Average, extrapolate: bool) -> dict[str, float]:
    if average not in get_args(Average):
        raise InputError(f"average: expected 'cosine' or 'angle', got {average!r}")
    if fusion.count < 2:
        raise InputError(f"{fusion.argument}: expected two vectors or more, which have angles, got {fusion.count}")
    return {key: _ratio(gram, average, extrapolate) for key, gram in grams(fusion).items()}


def _ratio(gram: Tensor, average: Average, extrapolate: bool) -> float:
    count = len(gram)
    norms = gram.diagonal().sqrt()
    units = (gram / norms.where(norms > 0, 1.0)[:, None]) / norms.where(norms > 0, 1.0)
    found = [min(1.0, max(-1.0, float(units[p, q]))) for q in range(count) for p in range(q)]
    cosine = math.fsum(found) / len(found)
    if average == "angle":
        cosine = math.cos(math.fsum(map(math.acos, found)) / len(found))
    if cosine <= 0 and not extrapolate:
        return 0.0
    below = 1 + (count - 1) * cosine
    return count * cosine / below if abs(below) > 1e-6 else 0.0
