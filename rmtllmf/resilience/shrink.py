"""Posterior means of task vectors from what was received: each tensor shrunk by how little of it is signal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._state import Tensors, finite_number, select_names
from ..channel import Reception
from ..errors import InputError
from ._energy import energy_of
from ._noise import KnownNoise, Scale
from ._pooling import pooled

__all__ = ["shrink"]

By = Literal["tensor", "vector", "row"]
Sensitivity: TypeAlias = float | Mapping[str, float]


def shrink(
    received: Iterable[Tensors],
    reception: Reception | ArrayLike,
    *,
    estimator: str = "additive",
    scale: Scale = "rms",
    by: By = "tensor",
    sensitivity: Sensitivity = 1.0,
) -> list[Any]:
    r"""The posterior mean of what was sent, given what was received and how noisy it is.

    .. math:: \hat\tau = g\tau + n, \quad \tau_j \sim \mathcal{N}(0, v), \quad n_j \sim \mathcal{N}(0, \sigma^2):
              \qquad E[\tau \mid \hat\tau] = \frac{\kappa\, g\, v}{\kappa\, g^2 v + \sigma^2}\, \hat\tau

    with :math:`\kappa = 1`. The noise variance :math:`\sigma^2` of every part of a vector follows from the reception;
    the signal's energy v from the received power less that, by empirical Bayes: energies that noise hides are drawn to
    what the tensors of all users have in common. Where nothing but noise was received, what is left is the base model.

    The posterior mean has the least squared error in the *parameters*. A model suffers less from noise than from a lost
    signal of the same energy, because fine-tuning moves the parameters that outputs depend on; with
    :math:`\kappa > 1`, the ratio of the two effects on the outputs, the squared error of the *outputs* is least.
    `measured_sensitivity` finds it.

    Args:
        received: Q mappings of name -> tensor with the same keys and shapes, as they came over the channel.
        reception: the `Reception` of `transmit`, or bare MSEs, (Q,) or (blocks, Q).
        estimator: that of `transmit`: "additive", "mmse" or "unbiased".
        scale: what the senders divided by: "rms" or "tensor_rms", which is read off the received power; a number for
            all, or one for each user, which the senders tell.
        by: what has an energy of its own: every "tensor", the whole "vector" (one factor a block), or every "row" of
            a matrix.
        sensitivity: :math:`\kappa > 0`, a number, or name or glob -> number (1 for names that none of them matches).

    Returns:
        A list of Q, a `TaskVector` where one was given, else a dict; in the dtypes received. Integer entries and
        running statistics are carried as they are.

    Raises:
        InputError: no vectors, a `scale` that cannot be known, `by` that is none, a `sensitivity` that is not positive
            or names nothing. ShapeError: the reception is not for Q users. StateMismatchError: keys or shapes disagree.
            NonFiniteError: NaN or infinity. NotPSDError: an error covariance that is none.

    Source: James and Stein, 1961; Morris, "Parametric empirical Bayes inference", 1983.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> sent = {"steady": torch.zeros(4000), "tuned": torch.randn(4000, generator=torch.Generator().manual_seed(0))}
        >>> heard = transmit([sent], [4.0], seed=0, scale=1.0)
        >>> [kept] = shrink(heard, [4.0], scale=1.0)
        >>> error = lambda vector: round(float((vector["tuned"] - sent["tuned"]).square().mean()), 1)
        >>> error(heard[0]), error(kept), bool(kept["steady"].norm() < 0.1 * heard[0]["steady"].norm())
        (3.9, 0.8, True)
    """
    if by not in get_args(By):
        raise InputError(f"by: expected one of {', '.join(map(repr, get_args(By)))}, got {by!r}")
    known = KnownNoise.of(received, reception, estimator=estimator, scale=scale)
    kappa = sensitivities(known.stream.keys, sensitivity)
    signal = _signal(known, by)
    return shrunk(known, signal, kappa)


def sensitivities(keys: Iterable[str], sensitivity: Sensitivity) -> dict[str, float]:
    """Name -> a positive number."""
    names = list(keys)
    if not isinstance(sensitivity, Mapping):
        return dict.fromkeys(names, finite_number(sensitivity, "sensitivity", positive=True))
    result = dict.fromkeys(names, 1.0)
    for pattern, value in sensitivity.items():
        number = finite_number(value, f"sensitivity[{pattern!r}]", positive=True)
        for name in select_names(names, pattern, "sensitivity"):
            result[name] = number
    return result


def shrunk(known: KnownNoise, signal: list[dict[str, Tensor]], kappa: Mapping[str, float]) -> list[Any]:
    """The received vectors times ``kappa g v / (kappa g^2 v + noise)``; `signal`: v, a number or one for each row."""
    result = []
    for q, vector in enumerate(known.stream.vectors):
        flat = {}
        for key in known.stream.keys:
            tensor = vector[key].detach()
            given = tensor.reshape(-1)
            out = torch.empty_like(given)
            v = signal[q].get(key, torch.zeros(()))
            v = kappa[key] * (v if v.ndim == 0 else v.repeat_interleave(tensor[0].numel()))
            for part in known.parts[key]:
                cut = slice(part.start, part.stop)
                g, noise = float(known.gain[part.block, q]), float(known.covariance_of(key, part.block)[q, q])
                here = v if v.ndim == 0 else v[cut]
                total = g * g * here + noise
                factor = torch.where(total > 0, g * here / torch.where(total > 0, total, 1.0), 0.0)
                if noise == 0 and g != 0:  # exact, whatever its energy
                    factor = torch.full_like(factor, 1 / g)
                wide = given[cut] if given.dtype.itemsize >= 4 else given[cut].float()
                out[cut] = (wide * factor.to(wide)).to(out.dtype)
            flat[key] = out
        result.append(flat)
    return known.stream.rebuilt(result)


def _signal(known: KnownNoise, by: By) -> list[dict[str, Tensor]]:
    energy = energy_of(known)
    if by == "vector":
        size = torch.tensor([known.stream.vectors[0][key].numel() for key in energy.keys], dtype=torch.float64)
        weight = torch.where(energy.error.isfinite(), size, 0.0)
        total = weight.sum(1).clamp_min(1.0)
        whole = ((weight * energy.measured.where(energy.error.isfinite(), 0.0)).sum(1) / total).clamp_min(0)
        return [dict.fromkeys(energy.keys, whole[q]) for q in range(known.users)]
    tensors = [{key: energy.signal[q, k] for k, key in enumerate(energy.keys)} for q in range(known.users)]
    if by == "row":
        for key in energy.keys:
            if known.stream.vectors[0][key].ndim > 1:
                for q in range(known.users):
                    tensors[q][key] = _rows(known, key, q, float(tensors[q][key]))
    return tensors


def _rows(known: KnownNoise, key: str, q: int, whole: float) -> Tensor:
    """The energy of every row of a tensor, drawn to that of the whole tensor."""
    matrix = known.stream.vectors[q][key].detach()
    matrix = matrix.reshape(len(matrix), -1).double()
    gain, noise = (torch.empty(matrix.shape, dtype=torch.float64, device=matrix.device) for _ in range(2))
    for part in known.parts[key]:
        cut = slice(part.start, part.stop)
        gain.view(-1)[cut] = known.gain[part.block, q] ** 2
        noise.view(-1)[cut] = known.covariance_of(key, part.block)[q, q]
    power = (gain * whole + noise).clamp_min(1e-9 * max(known.scale[q][key], 1e-100) ** 2)
    weight = 1 / (2 * power**2)
    information = (weight * gain**2).sum(1)
    found = (weight * gain * (matrix**2 - noise)).sum(1) / information
    error = torch.where(information > 0, 1 / information, torch.inf)
    return pooled(found.where(information > 0, 0.0), error).clamp_min(0).cpu()
