"""Everything that a base station can do for a fusion, composed: one call, and a report of what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._arrays import ArrayLike
from .._random import Seed, seed_number
from .._state import StateLike, Tensors
from .._tasks import Head, Tasks, as_tasks, pairs
from ..channel import Reception
from ..errors import InputError
from ..taskvec import TaskVector, task_arithmetic
from ._energy import Energy, energy_of
from ._noise import KnownNoise, Scale
from .fusion import load, resilient_fusion
from .joint_shrink import jointly_shrunk
from .realign import Loss, Realignment
from .search_scale import search_scale
from .sensitivity import MeasuredSensitivity, measured_sensitivity
from .shrink import Sensitivity, sensitivities
from .suspects import suspects

__all__ = ["Protection", "TensorReport", "protect"]


@dataclass(frozen=True)
class TensorReport:
    """What happened to a tensor, in the mean over the users that were kept.

    Attributes:
        signal: mean square of what was sent, as estimated.
        noise: mean square of the error in what was received (per unit of gain).
        kept: norm of the estimates relative to that of what was received; 0: restored from the base model.

    Example:
        >>> print(TensorReport(signal=1.0, noise=100.0, kept=0.01))  # SNR in dB, and what is kept
            -20.0  0.010
    """

    signal: float
    noise: float
    kept: float

    def __str__(self) -> str:
        ratio = 10 * math.log10(self.signal / self.noise) if min(self.signal, self.noise) > 0 else math.inf
        snr = "no noise" if self.noise == 0 else "no signal" if self.signal == 0 else f"{ratio:.1f}"
        return f"{snr:>9}  {self.kept:5.3f}"


@dataclass(frozen=True)
class Protection:
    """What `protect` did.

    Attributes:
        users: those whose vectors were fused.
        reasons: user -> why it was left out.
        sensitivity: what was measured; None if it was given, or nothing was there to measure it on.
        tensors: name -> a `TensorReport`.
        scale: what the fused update was multiplied by, beside the rule's own scale: 1 without samples to choose it on.
        update: the fused update, before realignment.
        realignment: None without samples.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> model, draw = torch.nn.Linear(64, 64), torch.Generator().manual_seed(0)
        >>> base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> sent = [{"weight": torch.randn(64, 64, generator=draw), "bias": torch.zeros(64)} for _ in range(4)]
        >>> protect(model, base, transmit(sent, 1.0, seed=1), 1.0, seed=0)
        Protection of 4 users' task vectors
          2 tensors kept, 0 as good as restored from the base
            tensor   SNR (dB)   kept
            weight        0.1  0.503
            bias        -11.2  0.070
          the update times 1
    """

    users: tuple[int, ...]
    reasons: Mapping[int, str]
    sensitivity: MeasuredSensitivity | None
    tensors: Mapping[str, TensorReport]
    scale: float
    update: TaskVector
    realignment: Realignment | None

    def __repr__(self) -> str:
        lines = [f"Protection of {len(self.users) + len(self.reasons)} users' task vectors"]
        lines += [f"  user {user} left out: {why}" for user, why in self.reasons.items()]
        if self.sensitivity is not None:
            s = self.sensitivity
            lines.append(f"  outputs feel signal {s.ratio:.3g} (+- {s.error:.2g}) times as much as noise of its energy")
        kept = sorted(self.tensors, key=lambda name: -self.tensors[name].kept)
        restored = [name for name in kept if self.tensors[name].kept < _RESTORED]
        lines.append(f"  {len(kept) - len(restored)} tensors kept, {len(restored)} as good as restored from the base")
        width = max((len(name) for name in kept), default=0)
        shown = kept if len(kept) <= 2 * _SHOWN else [*kept[:_SHOWN], "", *kept[-_SHOWN:]]
        lines.append(f"    {'tensor'.ljust(width)}   SNR (dB)   kept")
        for name in shown:
            lines.append(f"    {name.ljust(width)}  {self.tensors[name]}" if name else "    ...")
        lines.append(f"  the update times {self.scale:.3g}")
        if self.realignment is not None and self.realignment.losses:
            losses = self.realignment.losses
            lines.append(f"  realigned in {len(losses)} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}")
        return "\n".join(lines)


_SHOWN = 5  # tensors at each end of a long list
_RESTORED = 0.01
_SCALES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # large ones where the sensitivity could not be measured
_REFINEMENTS = 4


def protect(
    model: nn.Module,
    base: StateLike,
    received: Iterable[Tensors],
    reception: Reception | ArrayLike,
    tasks_or_batches: Tasks | None = None,
    *,
    seed: Seed,
    estimator: str = "additive",
    scale: Scale = "rms",
    inputs: Iterable[Any] | None = None,
    sensitivity: Sensitivity | None = None,
    screen: bool = True,
    rule: Callable[[list[TaskVector]], Tensors] = task_arithmetic,
    search: bool = True,
    steps: int = 100,
    frozen: str | Iterable[str] = (),
    loss: Loss = cross_entropy,
    lr: float | None = None,
    progress: bool = False,
) -> Protection:
    r"""Fuse what came over a hostile uplink as well as it can be done, in place.

    1. Vectors that do not look like what honest users send are left out (`suspects`).
    2. The others are replaced by their posterior means, all users together (`joint_shrink`): what is noise for all that
       the received power tells is restored from the base model, tensor by tensor. How much signal is worth beside noise
       is measured on the model (`measured_sensitivity`), on `inputs` or on the samples of the tasks; without either the
       posterior mean of the parameters is taken, which is more careful than it had to be.
    3. `rule` fuses them.
    4. With a few labelled samples of every task the scale of the update is searched (`search_scale`), and the model is
       realigned on them (`realign`).

    Without samples and with hopeless noise the result is the base model.

    Args:
        model: receives the result; whatever it holds before is overwritten. May be the same object as `base`.
        base: what the task vectors were taken from: a module, a state dict or the path of a safetensors file.
        received: Q mappings of name -> tensor, as they came over the channel.
        reception: the `Reception` of `transmit`, or bare MSEs, (Q,) or (blocks, Q).
        tasks_or_batches: a few labelled samples: name -> (head, batches), or the batches of a complete model; None:
            there are none.
        seed: of the noise that sensitivities are measured with, an int or a ``torch.Generator``.
        estimator, scale: as for `shrink`.
        inputs: batches of inputs without labels, real or drawn at random, to measure the sensitivity on; None: those of
            the tasks' first batches.
        sensitivity: as for `shrink`, instead of a measured one.
        screen: whether to leave out suspects; with fewer than three users nobody is.
        rule: as for `resilient_fusion`.
        search: whether to search the scale.
        steps, frozen, loss, lr, progress: as for `realign`. Nothing need be frozen, since noise does not reach what was
            not tuned; ``embedding_keys(model)`` are the paper's.

    Returns:
        A `Protection`, whose repr is a report.

    Raises:
        InputError: every user was left out, or an argument that a step refuses.
        StateMismatchError: model, base and received vectors do not fit together.

    Source: each step names its own; the scheme to compare with is R-MTLLMF, `resilient_fusion`.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> model, draw = torch.nn.Linear(64, 64), torch.Generator().manual_seed(0)
        >>> base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> sent = [{"weight": torch.randn(64, 64, generator=draw), "bias": torch.zeros(64)} for _ in range(4)]
        >>> done = protect(model, base, transmit(sent, 1.0, seed=1), 1.0, seed=0)
        >>> done.users, round(done.tensors["weight"].kept, 1), done.tensors["bias"].kept < 0.2
        ((0, 1, 2, 3), 0.5, True)
    """
    number = seed_number(seed)
    vectors = list(received)
    users, reasons = tuple(range(len(vectors))), {}
    if screen and len(vectors) > 2:
        found = suspects(vectors, reception, estimator=estimator, scale=scale)
        users, reasons = found.accepted, dict(found.reasons)
        if not users:
            raise InputError(f"received: every vector looks hostile: {reasons}; pass screen=False to fuse them anyway")
    heard = [vectors[user] for user in users]
    if len(users) < len(vectors):
        reception, scale = _of_users(reception, users), _scale_of(scale, users)
    known = KnownNoise.of(heard, reception, estimator=estimator, scale=scale)
    energy = energy_of(known)
    samples = None if tasks_or_batches is None else _seen(tasks_or_batches)
    measured = None
    if sensitivity is None:
        if inputs is None and samples is not None:
            inputs = [batches[0][0] for _, batches in samples.values()]
        if inputs is not None:
            load(model, base)
            measured = measured_sensitivity(
                model, heard, reception, inputs, seed=number, estimator=estimator, scale=scale
            )
        sensitivity = 1.0 if measured is None else measured.lower
    estimates = jointly_shrunk(known, energy, sensitivities(known.stream.keys, sensitivity))
    fused = rule([vector if isinstance(vector, TaskVector) else TaskVector(vector) for vector in estimates])
    update = fused if isinstance(fused, TaskVector) else TaskVector(fused)
    factor = 1.0
    if samples is not None and search:
        given: Any = {name: batches if head is None else (head, batches) for name, (head, batches) in samples.items()}
        factor = search_scale(model, base, update, given, scales=_SCALES, refinements=_REFINEMENTS, loss=loss).scale
    done = resilient_fusion(
        model,
        base,
        [update],
        {} if tasks_or_batches is None else tasks_or_batches,
        rule=lambda vectors: vectors[0] * factor,
        frozen=frozen,
        steps=0 if tasks_or_batches is None else steps,
        loss=loss,
        lr=lr,
        progress=progress,
    )
    return Protection(
        users,
        reasons,
        measured,
        _reports(known, energy, heard, estimates),
        factor,
        update,
        None if tasks_or_batches is None else done,
    )


def _seen(tasks_or_batches: Tasks) -> dict[str, tuple[Head | None, list[Any]]]:
    """The batches of one pass, kept: they may come in another order the next time."""
    return {
        name: (task.head, list(pairs(task.batches, f"tasks_or_batches[{name!r}]" if name else "tasks_or_batches")))
        for name, task in as_tasks(tasks_or_batches, "tasks_or_batches").items()
    }


def _reports(
    known: KnownNoise, energy: Energy, heard: Sequence[Tensors], estimates: Sequence[Tensors]
) -> dict[str, TensorReport]:
    reports = {}
    for key in energy.keys:
        before, after = (_norm(vector[key] for vector in vectors) for vectors in (heard, estimates))
        kept = after / before if before > 0 else 0.0
        reports[key] = TensorReport(float(energy.of(key).mean()), float(known.variance(key).mean()), kept)
    return reports


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))


def _of_users(reception: Reception | ArrayLike, users: Sequence[int]) -> Reception | ArrayLike:
    """The reception of some of the users, the others having been received with them."""
    index = list(users)
    if not isinstance(reception, Reception):
        given: Any = reception
        array = given if isinstance(given, Tensor | np.ndarray) else np.asarray(given)
        return array if array.ndim == 0 else array[..., index]
    order = reception.order
    if order is not None:
        place = {user: i for i, user in enumerate(index)}
        rows = np.asarray(order.cpu() if isinstance(order, Tensor) else order)
        order = np.array([[place[u] for u in row if u in place] for row in rows.reshape(-1, rows.shape[-1])])
        order = order.reshape(*rows.shape[:-1], len(index))
        order = torch.from_numpy(order) if isinstance(reception.order, Tensor) else order
    columns = {name: getattr(reception, name)[..., index] for name in ("mse", "sinr", "rate", "gain")}
    squares = {
        name: getattr(reception, name)[..., index, :][..., index] for name in ("error_covariance", "noise_covariance")
    }
    return replace(reception, order=order, **columns, **squares)


def _scale_of(scale: Scale, users: Sequence[int]) -> Scale:
    if isinstance(scale, str) or not isinstance(scale, Sequence | np.ndarray | Tensor) or len(scale) == 1:
        return scale
    return [float(scale[user]) for user in users]
