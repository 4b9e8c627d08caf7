"""How much of what was received is signal: empirical Bayes estimates of the energy of what was sent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ._noise import KnownNoise
from ._pooling import pooled

_ROUNDS = 4  # of weights that depend on what they weigh
_FAR = 3.0  # standard errors: no estimate is drawn farther, however much the others have in common
_EXACT = 1e-9  # of the energy that a scale stands for: below, a measurement is as good as exact


@dataclass(frozen=True)
class Energy:
    """Of each user's tensors, name by name in the order of the stream.

    Attributes:
        keys: names.
        measured: (Q, K) mean square of what was sent: that of what was received, less the noise's; may be negative.
        error: (Q, K) the variance of that.
        signal: (Q, K) the same, not negative, drawn to what the users' tensors have in common as far as noise demands.
    """

    keys: list[str]
    measured: Tensor
    error: Tensor
    signal: Tensor

    def of(self, key: str) -> Tensor:
        """(Q,) of one tensor."""
        return self.signal[:, self.keys.index(key)]


def energy_of(known: KnownNoise) -> Energy:
    r"""The energies of what was sent, tensor by tensor.

    A part of n coefficients with the gain g, the noise variance :math:`\sigma^2` and the mean square v of what was sent
    has the mean square :math:`g^2 v + \sigma^2`, with the variance :math:`2 \sigma^2 (2 g^2 v + \sigma^2) / n`.
    Energies in units of the users' scales are pooled twice: those of a tensor over the users, and the tensors' means
    over the tensors; but none is drawn farther than three standard errors.
    """
    keys = [key for key in known.stream.keys if known.parts[key]]
    squares = _squares(known, keys)
    measured, error = (torch.zeros(known.users, len(keys), dtype=torch.float64) for _ in range(2))
    for k, key in enumerate(keys):
        measured[:, k], error[:, k] = _measured(known, key, squares[key])
    scale = torch.tensor([[row[key] for key in keys] for row in known.scale], dtype=torch.float64)
    unit = torch.where(scale > 0, scale, 1.0) ** 2
    signal = _pooled_twice(measured / unit, error / unit**2) * unit
    far = _FAR * error.sqrt()
    return Energy(keys, measured, error, signal.clamp(measured - far, measured + far).clamp_min(0))


def _squares(known: KnownNoise, keys: list[str]) -> dict[str, Tensor]:
    """Name -> (Q, parts) sums of squares of what was received."""
    found = {}
    for key in keys:
        rows = []
        for q, vector in enumerate(known.stream.vectors):
            flat = vector[key].detach().reshape(-1)
            norms = [
                float(torch.linalg.vector_norm(flat[p.start : p.stop], dtype=torch.float64)) for p in known.parts[key]
            ]
            rows.append([norm * norm for norm in norms])
            if not all(map(math.isfinite, rows[-1])):
                raise NonFiniteError(f"received[{q}][{key!r}] holds NaN or infinity; expected finite numbers")
        found[key] = torch.tensor(rows, dtype=torch.float64)
    return found


def _measured(known: KnownNoise, key: str, squares: Tensor) -> tuple[Tensor, Tensor]:
    """(Q,) the energy of a tensor and its variance, each part with the weight that it deserves."""
    parts = known.parts[key]
    length = torch.tensor([part.stop - part.start for part in parts], dtype=torch.float64)
    gain = torch.stack([known.gain[part.block] for part in parts], dim=1) ** 2  # (Q, parts)
    noise = torch.stack([known.covariance_of(key, part.block).diagonal() for part in parts], dim=1)
    excess = squares / length - noise  # expected: gain * energy
    unit = torch.tensor([[row[key] ** 2] for row in known.scale], dtype=torch.float64)
    floor = _EXACT * torch.where(unit > 0, unit, 1.0)
    energy = torch.zeros(known.users, 1, dtype=torch.float64)
    information = torch.zeros_like(energy)
    for _ in range(_ROUNDS):
        power = gain * energy + noise
        weight = length / (2 * torch.maximum(power, floor) ** 2)
        information = (weight * gain**2).sum(1, keepdim=True)
        found = (weight * gain * excess).sum(1, keepdim=True) / information
        energy = torch.where(information > 0, found, 0.0).clamp_min(0)
    power = gain * energy + noise
    found = torch.where(information > 0, found, 0.0)
    own = 2 * (power**2 - (gain * energy) ** 2) / length  # of what was sent, not of others like it
    error = (weight * weight * gain**2 * own).sum(1, keepdim=True) / information**2
    return found.squeeze(1), torch.where(information > 0, error, torch.inf).squeeze(1)


def _pooled_twice(values: Tensor, errors: Tensor) -> Tensor:
    """(Q, K): each tensor's energies over the users, about a mean that is pooled over the tensors."""
    if values.shape[0] == 1:
        return pooled(values, errors)
    known = errors.isfinite()
    weight = torch.where(known, 1 / errors.clamp_min(1e-300), 0.0)
    total = weight.sum(0)
    means = (weight * values.where(known, 0.0)).sum(0) / total.clamp_min(1e-300)
    common = pooled(means[None], torch.where(total > 0, 1 / total.clamp_min(1e-300), torch.inf)[None])
    # how the users differ about the common value is one number for all tensors
    rest = pooled((values - common).reshape(1, -1), errors.reshape(1, -1)).reshape(values.shape)
    return common + rest
