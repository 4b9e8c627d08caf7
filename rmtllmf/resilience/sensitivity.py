"""How much more a model's outputs follow from what was sent than from noise of the same energy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._arrays import ArrayLike
from .._random import Seed, generator, seed_number
from .._state import Tensors, check_keys, check_shapes, whole_number, wide
from .._tasks import device_of, logits_of, mode, moved, without_labels
from ..channel import Reception
from ..errors import InputError, NonFiniteError
from ._energy import Energy, energy_of
from ._noise import KnownNoise, Scale

__all__ = ["MeasuredSensitivity", "measured_sensitivity"]

PROBES = 8  # draws of each kind of noise
_STEP = 1e-2  # of the parameters' own rms: how far a tangent goes


@dataclass(frozen=True)
class MeasuredSensitivity:
    r"""The ratio of two mean squared changes of the outputs: by what was sent, and by white noise of its energy.

    Attributes:
        ratio: :math:`\kappa`, the estimate; may be negative where noise hides what was sent.
        error: its standard error.

    Example:
        >>> MeasuredSensitivity(ratio=20.0, error=3.0).lower, MeasuredSensitivity(ratio=9.0, error=30.0).lower
        (17.0, 1.0)
    """

    ratio: float
    error: float

    @property
    def lower(self) -> float:
        """The larger of 1 and ``ratio - error``: what is safe to use as `sensitivity` of `shrink`."""
        return max(1.0, self.ratio - self.error)


def measured_sensitivity(
    model: nn.Module,
    received: Iterable[Tensors],
    reception: Reception | ArrayLike,
    inputs: Iterable[Any],
    *,
    seed: Seed,
    estimator: str = "additive",
    scale: Scale = "rms",
    probes: int = PROBES,
) -> MeasuredSensitivity:
    r"""How much more the outputs change along the task vectors than along white noise of the same energy.

    .. math:: \kappa = \frac{\sum_q E_x \lVert J(x)\, \tau_q \rVert^2}{\sum_q E_x \lVert J(x)\, u_q \rVert^2},
              \qquad u_{q,j} \sim \mathcal{N}(0, v_{q,j})

    with the Jacobian J of the model's outputs at the base model's parameters, and the energies v of `shrink`. Of the
    vectors only :math:`\hat\tau_q = \tau_q + n_q` is known; but :math:`E \lVert J\hat\tau \rVert^2 = \lVert J\tau
    \rVert^2 + E\lVert Jn \rVert^2`, and the law of the noise is known too, so that the second term is found from noise
    that is drawn here. No labels are needed: any inputs will do that excite the model as real ones do; random ones of
    the right form give the right order of magnitude.

    Args:
        model: the base model, or its encoder; its outputs (an attribute ``logits``, where there is one) are looked at.
            Not changed, in evaluation mode meanwhile.
        received: Q mappings of name -> tensor, as for `shrink`; names of the model's parameters.
        reception: as for `shrink`.
        inputs: batches of inputs, without targets. Inputs that are a tuple or a mapping become positional or keyword
            arguments.
        seed: of the noise that is drawn, an int or a ``torch.Generator``.
        estimator, scale: as for `shrink`.
        probes: draws of each kind of noise, at least 2. With every vector and draw come two forward passes.

    Returns:
        A `MeasuredSensitivity`.

    Raises:
        InputError: no inputs, fewer than two `probes`, or what `shrink` refuses. StateMismatchError: the vectors name
            what the model lacks. NonFiniteError: outputs that are not finite.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> model = torch.nn.Linear(50, 50, bias=False)
        >>> x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * (torch.arange(50) < 5)
        >>> sent = [{"weight": torch.randn(50, 50, generator=torch.Generator().manual_seed(q)) * (torch.arange(50) < 5)}
        ...         for q in (1, 2)]
        >>> heard = transmit(sent, 1.0, seed=0)
        >>> round(measured_sensitivity(model, heard, 1.0, [x], seed=0, probes=20).ratio)  # all in 5 of 50 inputs
        10
    """
    probes = whole_number(probes, "probes", at_least=2)
    known = KnownNoise.of(received, reception, estimator=estimator, scale=scale)
    return sensitivity_of(model, known, energy_of(known), inputs, seed=seed, probes=probes)


def sensitivity_of(
    model: nn.Module,
    known: KnownNoise,
    energy: Energy,
    inputs: Iterable[Any],
    *,
    seed: Seed,
    probes: int = PROBES,
) -> MeasuredSensitivity:
    """What `measured_sensitivity` returns."""
    state = dict(model.state_dict())
    missing = set(known.stream.keys) - set(state)
    if missing:
        check_keys(known.stream.keys, set(known.stream.keys) - missing, "received", "model")
    check_shapes({key: known.stream.vectors[0][key] for key in known.stream.keys}, state, "received", "model")
    number = seed_number(seed)
    changes = _Changes(model, state, inputs)
    loud = [
        any(float(known.covariance_of(key, part.block)[q, q]) > 0 for key in energy.keys for part in known.parts[key])
        for q in range(known.users)
    ]
    by_received = [changes.along(_unbiased(known, q)) for q in range(known.users)]
    drawn = torch.zeros(2, known.users, probes, dtype=torch.float64)
    for q in range(known.users):
        for i in range(probes):
            if loud[q]:
                drawn[0, q, i] = changes.along(_noise(known, q, number, i))
            drawn[1, q, i] = changes.along(_like_signal(known, energy, q, number, i))
    noise, unit = drawn.mean(-1).sum(-1).tolist()
    if unit == 0:  # nothing was sent, or outputs do not depend on it
        return MeasuredSensitivity(1.0, 0.0)
    signal = sum(by_received) - noise
    # the noise that came along, its product with the signal, and the mean that is taken off
    deviation = drawn[0].std(-1)
    own = float(deviation @ _correlation(known) ** 2 @ deviation) * (1 + 2 * max(signal, 0.0) / max(noise, 1e-300))
    taken = float(drawn[0].var(-1).sum()) / probes
    relative = float(drawn[1].sum(0).var()) / probes / unit**2
    ratio = signal / unit
    return MeasuredSensitivity(ratio, ((own + taken) / unit**2 + ratio**2 * relative) ** 0.5)


class _Changes:
    """How far outputs move when the parameters do, in the mean over inputs."""

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], inputs: Iterable[Any]) -> None:
        self.model, self.state = model, state
        device = device_of(model)
        if isinstance(inputs, Tensor | Mapping | str) or not isinstance(inputs, Iterable):
            raise TypeError(f"inputs: expected batches of inputs, such as a list of them, got {type(inputs).__name__}")
        self.inputs = [moved(without_labels(batch), device) for batch in inputs]
        if not self.inputs:
            raise InputError("inputs: expected at least one batch, got none")

    def along(self, direction: Mapping[str, Tensor]) -> float:
        """The mean squared norm of the derivative of the outputs of an input along `direction`, by differences."""
        own = _rms(self.state[key] for key in direction)
        far = _rms(direction.values())
        if far == 0:
            return 0.0
        step = _STEP * (own if own > 0 else 1.0) / far
        total, count = 0.0, 0
        with torch.no_grad(), mode(False, self.model):
            for batch in self.inputs:
                ahead, behind = (self._outputs(direction, sign * step, batch) for sign in (1, -1))
                difference = (ahead.double() - behind.double()) / (2 * step)
                total += float(difference.square().sum())
                count += len(difference)
        if not count:
            raise InputError("inputs: expected at least one input, got empty batches")
        if not math.isfinite(total):
            raise NonFiniteError("model: its outputs are not finite for parameters near its own")
        return total / count

    def _outputs(self, direction: Mapping[str, Tensor], step: float, batch: Any) -> Tensor:
        moved_state = {
            key: torch.add(self.state[key], tensor.to(self.state[key]), alpha=step) for key, tensor in direction.items()
        }

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, moved_state, args, kwargs)

        outputs = logits_of(call, None, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError("model: expected a tensor, or something with logits, as its output")
        return outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]


def _unbiased(known: KnownNoise, q: int) -> dict[str, Tensor]:
    """What was received of a user, divided by the gains; nothing where these are 0."""
    result = {}
    for key in known.stream.keys:
        tensor = wide(known.stream.vectors[q][key].detach())
        gains = [float(known.gain[part.block, q]) for part in known.parts[key]]
        if any(gain != 1 for gain in gains):
            flat = tensor.reshape(-1).clone()
            for part, gain in zip(known.parts[key], gains, strict=True):
                flat[part.start : part.stop] *= 1 / gain if gain else 0.0
            tensor = flat.view(tensor.shape)
        result[key] = tensor
    return result


def _noise(known: KnownNoise, q: int, seed: int, index: int) -> dict[str, Tensor]:
    """Noise like that in `_unbiased`, drawn anew."""
    result = {}
    for key in known.stream.keys:
        flat, shape = _white(known, key, seed, "noise", q, index)
        for part in known.parts[key]:
            gain, variance = float(known.gain[part.block, q]), float(known.covariance_of(key, part.block)[q, q])
            flat[part.start : part.stop] *= variance**0.5 / gain if gain else 0.0
        result[key] = flat.view(shape)
    return result


def _like_signal(known: KnownNoise, energy: Energy, q: int, seed: int, index: int) -> dict[str, Tensor]:
    """White noise with the energies of what was sent."""
    result = {}
    for key in energy.keys:
        flat, shape = _white(known, key, seed, "signal", q, index)
        flat.mul_(float(energy.of(key)[q]) ** 0.5)
        for part in known.parts[key]:
            if known.gain[part.block, q] == 0:  # nothing was heard to compare it with
                flat[part.start : part.stop] = 0.0
        result[key] = flat.view(shape)
    return result


def _white(known: KnownNoise, key: str, seed: int, kind: str, q: int, index: int) -> tuple[Tensor, torch.Size]:
    like = known.stream.vectors[q][key]
    source = generator(seed, kind, q, index, key, device=like.device)
    return torch.empty(like.numel(), dtype=wide(like).dtype, device=like.device).normal_(generator=source), like.shape


def _correlation(known: KnownNoise) -> Tensor:
    """(Q, Q) of the users' noise, in the mean over blocks."""
    covariance = known.covariance.mean(0)
    deviation = covariance.diagonal().clamp_min(1e-300).sqrt()
    return covariance / deviation[:, None] / deviation[None, :]


def _rms(tensors: Iterable[Tensor]) -> float:
    squares, entries = 0.0, 0
    for tensor in tensors:
        squares += float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)) ** 2
        entries += tensor.numel()
    return (squares / max(1, entries)) ** 0.5
