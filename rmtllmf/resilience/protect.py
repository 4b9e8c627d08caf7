"""Everything that a base station can do for a fusion, composed: one call, and a report of what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, ValuesView
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._arrays import ArrayLike
from .._random import Seed, seed_number
from .._state import (
    StateLike,
    Tensors,
    as_state,
    as_vectors,
    check_dtypes,
    check_keys,
    check_shapes,
    identity,
    is_bendable,
    quoted,
    whole_number,
)
from .._tasks import Tasks, as_tasks, pairs
from ..channel import Reception
from ..errors import InputError, StateMismatchError
from ..taskvec import TaskVector, task_arithmetic
from ._energy import Energy, energy_of
from ._noise import KnownNoise, Scale
from ._protection import Protection as Protection
from ._protection import TensorReport as TensorReport
from ._screening import Uplink, screened
from .fusion import _as_task_vectors, _frozen_names, load, resilient_fusion
from .joint_shrink import jointly_shrunk
from .realign import Loss, prepare
from .search_scale import search_scale
from .sensitivity import sensitivity_of
from .shrink import Sensitivity, sensitivities

__all__ = ["Protection", "TensorReport", "protect"]

# to be searched; large ones, because posterior means are short where noise is strong
_SCALES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
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
    frozen: str | Iterable[str] | None = (),
    loss: Loss = cross_entropy,
    lr: float | None = None,
    progress: bool = False,
) -> Protection:
    r"""Fuse what came over a hostile uplink with all that a base station can do, in place.

    1. Vectors that do not look like what honest users send are left out (`suspects`), and those of users who were not
       heard at all.
    2. The others are replaced by their posterior means, all users together (`joint_shrink`): what is noise for all that
       the received power tells is restored from the base model, tensor by tensor. How much signal is worth beside noise
       is measured on the model (`measured_sensitivity`), on `inputs` or on the samples of the tasks; without either the
       posterior mean of the parameters is taken, which is more careful than it had to be.
    3. `rule` fuses them.
    4. With a few labelled samples of every task the scale of the update is searched (`search_scale`), and the model is
       realigned on them (`realign`).

    Without samples and with hopeless noise the result is the base model. A posterior mean gives up signal with the
    noise: where a model hardly feels the noise (around 0 dB, say), `protect` without samples may lose more than fusion
    without protection. With samples the search of the scale makes up for it.

    Beside what the caller holds there is one more copy of every vector that is fused until `rule` has returned; after
    that two of the update and one of the model, and in the realignment what its optimizer needs.

    Args:
        model: receives the result; whatever it holds before is overwritten. May be the same object as `base`.
        base: what the task vectors were taken from: a module, a state dict or the path of a checkpoint.
        received: Q mappings of name -> tensor, as they came over the channel. Not written to.
        reception: the `Reception` of `transmit`, or bare MSEs, (Q,) or (blocks, Q).
        tasks_or_batches: a few labelled samples: name -> (head, batches), or the batches of a complete model; None:
            there are none. The batches are gone through once and kept, to measure and to search on; realignment goes
            through them again, as a DataLoader that shuffles would have it, or where that cannot be done, with an
            iterator, through those that were kept.
        seed: of the noise that sensitivities are measured with, an int or a ``torch.Generator``.
        estimator, scale: as for `shrink`.
        inputs: batches of inputs without labels, real or drawn at random, to measure the sensitivity on; None: those of
            the tasks' first batches, every one of them; a single batch with samples of all tasks is as good, and
            cheaper where there are many.
        sensitivity: as for `shrink`, instead of a measured one.
        screen: whether to leave anyone out; of one user or two nobody is who was heard and sent finite numbers.
        rule: as for `resilient_fusion`; it is handed the estimates of the users that are not left out, which matters
            for one with weights.
        search: whether to search the scale.
        steps, loss, lr, progress: as for `realign`.
        frozen: as for `resilient_fusion`. Nothing need be, since noise does not reach what was not tuned; None or
            ``embedding_keys(model)`` are the paper's.

    Returns:
        A `Protection`, whose repr is a report.

    Raises:
        InputError: every user was left out, a user is silent in some blocks only (which `screen` cannot judge),
            `inputs` beside a `sensitivity`, or an argument that a step refuses.
        StateMismatchError: model, base and received vectors do not fit together, or what is one tensor in the model was
            received as several.
        TypeError: arguments of a wrong type.
        NonFiniteError: NaN or infinity in what is fused, an output or a loss that is not finite.

        All arguments, the batches among them, are looked at before the model is touched. After an error in what runs
        on the model it is the base model, or, while it was being realigned, as `realign` leaves it. Modes,
        `requires_grad` and `grad` are always as they were.

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
    _check_options(rule, screen=screen, search=search)
    vectors, original, fixed = _fitting(model, base, received, frozen)
    given: Tasks = {} if tasks_or_batches is None else tasks_or_batches
    steps = min(whole_number(steps, "steps", at_least=0), 0 if tasks_or_batches is None else steps)
    prepare(model, given, steps=steps, frozen=fixed, loss=loss, lr=lr, progress=progress)
    unlabelled = _unlabelled(inputs, sensitivity)
    uplink = Uplink(tuple(range(len(vectors))), vectors, reception, estimator, scale)
    kept, reasons = screened(uplink) if screen else (uplink, {})
    known = kept.known()
    energy = energy_of(known)
    kappa = sensitivities(known.stream.keys, 1.0 if sensitivity is None else sensitivity)
    samples, again = ({}, {}) if tasks_or_batches is None else _passed(given)
    if sensitivity is None and unlabelled is None and samples:
        unlabelled = _first_inputs(samples)
    measured = None
    if unlabelled is not None:
        _check_ties(model, known)
        load(model, original)
        measured = sensitivity_of(model, known, energy, unlabelled, seed=number)
        kappa = sensitivities(known.stream.keys, measured.lower)
    update, tensors = _fused(known, energy, kappa, rule, fixed)
    factor = 1.0
    if samples and search:
        found = search_scale(model, original, update, samples, scales=_SCALES, refinements=_REFINEMENTS, loss=loss)
        factor = found.scale
    done = resilient_fusion(
        model,
        original,
        [update],
        again,
        rule=lambda vectors: vectors[0] if factor == 1 else vectors[0] * factor,
        frozen=fixed,
        steps=steps,
        loss=loss,
        lr=lr,
        progress=progress,
    )
    return Protection(
        users=kept.users,
        reasons=MappingProxyType(reasons),
        sensitivity=measured,
        tensors=MappingProxyType(tensors),
        scale=factor,
        update=update,
        realignment=None if tasks_or_batches is None else done,
    )


def _check_options(rule: object, **switches: object) -> None:
    if not callable(rule):
        raise TypeError(f"rule: expected a function task vectors -> update, got {type(rule).__name__}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def _fitting(
    model: nn.Module, base: StateLike, received: Iterable[Tensors], frozen: str | Iterable[str] | None
) -> tuple[Sequence[Tensors], dict[str, Tensor], list[str]]:
    """The received vectors, the base model's state, and all names of what is frozen; they fit together."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    given: Any = list(received) if isinstance(received, Iterator | ValuesView) else received
    vectors = as_vectors(given, "received")
    original = as_state(base, "base")
    everything = model.state_dict(keep_vars=True)  # the parameters themselves, which tells ties
    current = {name: tensor for name, tensor in everything.items() if isinstance(tensor, Tensor)}
    check_keys(original, current, "base", "model")
    check_shapes(original, current, "base", "model")
    check_dtypes(original, current, "base", "model")
    sent = {name: tensor for name, tensor in vectors[0].items() if is_bendable(name, tensor.dtype)}
    if set(sent) - set(original):
        raise StateMismatchError(f"base lacks {quoted(set(sent) - set(original))}, which received names")
    check_shapes(sent, original, "received[0]", "base")
    for name in sent:
        if not is_bendable(name, original[name].dtype):
            raise StateMismatchError(f"received[0][{name!r}] is {sent[name].dtype}; base has {original[name].dtype}")
    return list(given), original, _frozen_names(model, current, frozen)


def _check_ties(model: nn.Module, known: KnownNoise) -> None:
    """Outputs cannot be looked at along a direction in which one tensor goes two ways."""
    state = model.state_dict(keep_vars=True)
    first: dict[Hashable, str] = {}
    for name in known.stream.keys:
        twin = first.setdefault(identity(state[name]), name)
        if twin != name:
            raise StateMismatchError(
                f"received: {twin!r} and {name!r} are one tensor in the model, but were received as two; send it once, "
                "or, with both names frozen, give a `sensitivity` or neither inputs nor samples"
            )


def _unlabelled(inputs: Iterable[Any] | None, sensitivity: Sensitivity | None) -> list[Any] | None:
    """The caller's inputs, if any."""
    if inputs is None:
        return None
    if sensitivity is not None:
        raise InputError("inputs: nothing is measured on them where a `sensitivity` is given; leave out one of the two")
    if isinstance(inputs, Tensor | Mapping | str) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs: expected batches of inputs, such as a list of them, got {type(inputs).__name__}")
    batches = list(inputs)
    if not batches:
        raise InputError("inputs: expected at least one batch, got none")
    return batches


def _passed(tasks: Tasks) -> tuple[dict[str, Any], dict[str, Any]]:
    """The samples of one pass, kept, since they may come in another order the next time; and what to go through again.

    What was an iterator is used up after that, and the samples kept take its place.
    """
    kept: dict[str, Any] = {}
    again: dict[str, Any] = {}
    for name, (head, batches) in as_tasks(tasks, "tasks_or_batches").items():
        where = f"tasks_or_batches[{name!r}]" if name else "tasks_or_batches"
        filled = [batch for batch in pairs(batches, where) if not _is_empty(batch[1])]
        if not filled:
            raise InputError(f"{where}: expected at least one sample, got only empty batches")
        more = filled if isinstance(batches, Iterator) else batches
        kept[name], again[name] = (filled, more) if head is None else ((head, filled), (head, more))
    return kept, again


def _first_inputs(samples: Tasks) -> list[Any]:
    return [next(iter(task.batches))[0] for task in as_tasks(samples, "tasks_or_batches").values()]


def _is_empty(targets: object) -> bool:
    return isinstance(targets, Tensor) and targets.ndim > 0 and len(targets) == 0


def _fused(
    known: KnownNoise,
    energy: Energy,
    kappa: Mapping[str, float],
    rule: Callable[[list[TaskVector]], Tensors],
    fixed: Sequence[str],
) -> tuple[TaskVector, dict[str, TensorReport]]:
    """What the rule makes of the posterior means, which are let go of, and a report on them."""
    estimates = jointly_shrunk(known, energy, kappa)
    tensors = {key: _report(known, energy, key, estimates) for key in energy.keys}
    vectors = _as_task_vectors(estimates)
    fused = rule(vectors)
    if not isinstance(fused, Mapping):
        raise TypeError(f"rule: expected it to return a mapping of name -> tensor, got {type(fused).__name__}")
    if set(fused) - set(vectors[0]):
        unknown = quoted(set(fused) - set(vectors[0]))
        raise StateMismatchError(f"rule's result has the unexpected {unknown}, which no received vector names")
    update = fused if isinstance(fused, TaskVector) else TaskVector(fused)
    if fixed:  # the search must see the model that will be
        update = update.map(lambda name, tensor: torch.zeros_like(tensor) if name in fixed else tensor)
    return update, tensors


def _report(known: KnownNoise, energy: Energy, key: str, estimates: Sequence[Tensors]) -> TensorReport:
    noise = known.variance(key)
    loud = noise.isfinite()  # else the gain is 0 somewhere
    signal = energy.of(key)[loud].mean() if bool(loud.any()) else 0.0
    before, after = (_norm(vector[key] for vector in vectors) for vectors in (known.stream.vectors, estimates))
    error = noise[loud].mean() if bool(loud.any()) else math.inf
    return TensorReport(float(signal), float(error), after / before if before > 0 else 0.0)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))
