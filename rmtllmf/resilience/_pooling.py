"""Many noisy measurements of like things: how far each is believed, and how far it is drawn to their mean."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 100


def pooled(values: Tensor, errors: Tensor) -> Tensor:
    r"""Posterior means of :math:`v_i` from measurements of them, in the random-effects model.

    .. math:: \hat v_i \sim \mathcal{N}(v_i, s_i^2), \qquad v_i \sim \mathcal{N}(m, t^2), \qquad
              E[v_i] = m + \frac{t^2}{t^2 + s_i^2} (\hat v_i - m)

    Args:
        values: (..., n) the measurements.
        errors: (..., n) their variances; those of infinite variance say nothing, those of none are kept.

    Returns:
        (..., n), with `m` and `t` of each row found from the measurements by moments (Paule and Mandel's equation).
    """
    known = errors.isfinite()
    found, least = values.where(known, 0.0), _least(values, errors)
    spread = _between(found, errors, known, least)
    mean = _mean(found, _weights(errors, spread, known, least))
    trust = torch.where(known, spread / (spread + errors).clamp_min(least), 0.0)
    return mean + torch.where(errors == 0, 1.0, trust) * (found - mean)


def _between(values: Tensor, errors: Tensor, known: Tensor, least: Tensor) -> Tensor:
    """The variance t^2 at which the weighted squares about the mean add up to what they should; by bisection."""
    count = known.sum(-1, keepdim=True)

    def surplus(spread: Tensor) -> Tensor:
        weight = _weights(errors, spread, known, least)
        return (weight * (values - _mean(values, weight)) ** 2).sum(-1, keepdim=True) - (count - 1)

    low = torch.zeros_like(values[..., :1])
    high = (values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)) ** 2 * count.clamp_min(1)
    none = (surplus(low) <= 0) | (count < 2)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        more = surplus(middle) > 0
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return torch.where(none, 0.0, high)


def _weights(errors: Tensor, spread: Tensor, known: Tensor, least: Tensor) -> Tensor:
    return torch.where(known, 1 / (errors + spread).clamp_min(least), 0.0)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, (weight * values).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0), 0.0)


def _least(values: Tensor, errors: Tensor) -> Tensor:
    """A variance that is as good as none beside these measurements."""
    largest = torch.maximum(values.abs().amax() ** 2, errors.where(errors.isfinite(), 0.0).amax())
    return largest.clamp_min(1e-200) * 1e-30
