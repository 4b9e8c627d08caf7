"""How many steps of realignment a few samples bear, found by cross-validation over them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .._display import counted, spread
from .._random import Seed, generator, seed_number
from .._state import whole_number
from .._tasks import Head, Task, Tasks, as_tasks, pairs
from ..errors import InputError, ShapeError
from ._plan import RealignOptions, check_keywords, prepare

__all__ = ["CrossValidation", "steps_by_cross_validation"]


@dataclass(frozen=True)
class CrossValidation:
    """The validation losses of a realignment, and the number of steps after which they are smallest.

    It can stand for that number: ``realign(model, tasks, steps=chosen)``.

    Attributes:
        steps: the number of steps with the smallest mean loss; the fewest of several.
        evaluated: numbers of steps after which was evaluated, from 0.
        losses: the mean over tasks and folds of the validation loss, one number for each of `evaluated`.
        folds: the same for each fold.

    Example:
        >>> chosen = CrossValidation(steps=2, evaluated=(0, 2), losses=(0.7, 0.5), folds=((0.6, 0.4), (0.8, 0.6)))
        >>> list(range(5))[chosen]
        2
    """

    steps: int
    evaluated: tuple[int, ...]
    losses: tuple[float, ...]
    folds: tuple[tuple[float, ...], ...]

    def __repr__(self) -> str:
        least = dict(zip(self.evaluated, self.losses, strict=True))[self.steps]
        return (
            f"CrossValidation(steps {self.steps}, loss {least:.3g}; "
            f"{counted(len(self.folds), 'fold')}, after 0 to {max(self.evaluated)} steps loss {spread(self.losses)})"
        )

    def __index__(self) -> int:
        return self.steps


def steps_by_cross_validation(
    model: nn.Module,
    tasks_or_batches: Tasks,
    *,
    seed: Seed,
    steps: int = 100,
    folds: int | None = None,
    every: int = 1,
    batch_size: int | None = None,
    **options: Unpack[RealignOptions],
) -> CrossValidation:
    r"""The number of steps after which samples that were left out are predicted best.

    .. math:: \hat t = \arg\min_{t \le T} \frac{1}{K} \sum_{k=1}^K \frac{1}{N} \sum_{i=1}^N
              E_{(x, y) \sim \mathcal{S}_{i,k}}\,
              \ell\bigl(h_i(f(x; \theta_t(\mathcal{S} \setminus \mathcal{S}_k))), y\bigr)

    For each fold a copy of the model is realigned without the fold's samples; one copy is alive at a time, and neither
    the model nor the heads change. Then realign on all samples with the schedule that was tried:
    ``realign(model, tasks, steps=chosen, schedule_steps=steps)``. With few samples the curve is as noisy as the samples
    are few: look at `losses` and `folds` before trusting a minimum.

    Args:
        model: one encoder for all tasks, or a complete model.
        tasks_or_batches: as for `realign`; gone through once, and all samples kept in memory. Inputs are tensors, or
            tuples or mappings of tensors, whose first dimension counts samples.
        seed: of the folds and of the order of the samples: an int or a ``torch.Generator``. Dropout draws from torch's
            own generator, as in `realign`.
        steps: T, the largest number of steps, at least 1.
        folds: K, at least 2. The samples of every class (of whole-number targets, one a sample; other targets are one
            class) are dealt out to the folds in random order, so every class needs K of them. None: as many as the
            smallest class has: with equally many shots in all classes, one of each class is left out at a time.
        every: steps from one evaluation to the next; the last step is always evaluated.
        batch_size: of training and evaluation; None: of each task, the largest batch that was given.
        options: everything else that `realign` takes, but for validation.

    Returns:
        A `CrossValidation`.

    Raises:
        InputError: `folds` below 2 or above the samples of a class, or an argument that `realign` refuses.
        ShapeError: inputs and targets of different lengths, or batches that do not fit together.
        TypeError: inputs other than tensors in tuples and mappings, or targets other than tensors.
        NonFiniteError: a loss that is not finite.

    Source: Stone, "Cross-validatory choice and assessment of statistical predictions", 1974; early stopping: Prechelt,
    "Early stopping - but when?", 1998.

    Example:
        >>> import torch
        >>> model, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        >>> batches = [(torch.eye(4), torch.tensor([0, 0, 1, 1]))]
        >>> chosen = steps_by_cross_validation(model, {"parity": (head, batches)}, steps=4, every=2, lr=0.1, seed=0)
        >>> chosen.evaluated, len(chosen.folds), chosen.steps in chosen.evaluated
        ((0, 2, 4), 2, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_keywords(options, RealignOptions)
    steps = whole_number(steps, "steps", at_least=1)
    every = whole_number(every, "every", at_least=1)
    if folds is not None:
        folds = whole_number(folds, "folds", at_least=2)
    if batch_size is not None:
        batch_size = whole_number(batch_size, "batch_size", at_least=1)
    number = seed_number(seed)
    samples = {
        name: _Samples.of(task, f"tasks_or_batches[{name!r}]" if name else "tasks_or_batches", batch_size)
        for name, task in as_tasks(tasks_or_batches, "tasks_or_batches").items()
    }
    count = folds or _smallest_class(samples)
    fold_of = {name: part.deal(count, number, name) for name, part in samples.items()}
    curves = []
    for fold in range(count):
        orders = {name: generator(number, "order", fold, name) for name in samples}
        plan = prepare(
            copy.deepcopy(model),
            {name: part.task(fold_of[name] != fold, orders[name]) for name, part in samples.items()},
            steps=steps,
            validation={name: part.task(fold_of[name] == fold) for name, part in samples.items()},
            validate_every=every,
            **options,
        )
        curves.append(plan.run().validation)
        del plan  # and with it the copy, before the next one is made
    losses = tuple(math.fsum(values) / count for values in zip(*curves, strict=True))
    evaluated = tuple(sorted({*range(0, steps, every), steps}))
    return CrossValidation(evaluated[losses.index(min(losses))], evaluated, losses, tuple(curves))


@dataclass(frozen=True)
class _Samples:
    """All samples of one task."""

    head: Head | None
    inputs: Any
    targets: Tensor
    batch_size: int
    argument: str

    @classmethod
    def of(cls, task: Task, argument: str, batch_size: int | None) -> _Samples:
        found = list(pairs(task.batches, argument))
        targets = _joined([target for _, target in found], f"targets of {argument}")
        if not isinstance(targets, Tensor):
            raise TypeError(f"{argument}: expected targets that are a tensor, got {type(targets).__name__}")
        inputs = _joined([given for given, _ in found], f"inputs of {argument}")
        _check_length(inputs, len(targets), argument)
        return cls(task.head, inputs, targets, batch_size or max(len(target) for _, target in found), argument)

    def classes(self) -> list[Any]:
        """The class of each sample."""
        whole = not (self.targets.is_floating_point() or self.targets.is_complex())
        return self.targets.tolist() if whole and self.targets.ndim == 1 else [0] * len(self.targets)

    def deal(self, folds: int, seed: int, name: str) -> Tensor:
        """The fold of each sample: of every class the same number for each, or one more for the first ones."""
        members: dict[Any, list[int]] = {}
        for place, label in enumerate(self.classes()):
            members.setdefault(label, []).append(place)
        result = torch.zeros(len(self.targets), dtype=torch.int64)
        for label, places in members.items():
            if len(places) < folds:
                raise InputError(
                    f"folds: expected at least {folds} samples of every class, but class {label!r} of {self.argument} "
                    f"has {len(places)}"
                )
            order = torch.randperm(len(places), generator=generator(seed, "folds", name, int(label)))
            for fold, position in enumerate(order.tolist()):
                result[places[position]] = fold % folds
        return result

    def task(self, chosen: Tensor, order: torch.Generator | None = None) -> tuple[Head, _Batches] | _Batches:
        """The chosen samples as `realign` takes them; with `order` in a new one every time they come round."""
        batches = _Batches(self, chosen.nonzero().squeeze(1), order)
        return batches if self.head is None else (self.head, batches)


@dataclass(frozen=True)
class _Batches:
    samples: _Samples
    places: Tensor
    order: torch.Generator | None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        places, size = self.places, self.samples.batch_size
        if self.order is not None and len(places) > size:  # the order within one single batch does not matter
            places = places[torch.randperm(len(places), generator=self.order)]
        for part in places.split(size):
            yield _at(self.samples.inputs, part), _at(self.samples.targets, part)


def _smallest_class(samples: Mapping[str, _Samples]) -> int:
    smallest = min(min(part.classes().count(label) for label in set(part.classes())) for part in samples.values())
    if smallest < 2:
        raise InputError("tasks_or_batches: expected at least two samples of every class, to leave one out, got one")
    return smallest


def _joined(values: list[Any], what: str) -> Any:
    """Batches of tensors, or of tuples or mappings of tensors, one after the other."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise TypeError(f"{what}: expected the same in every batch, got {', '.join(sorted(map(_kind, values)))}")
    if isinstance(first, Tensor):
        if any(value.shape[1:] != first.shape[1:] or not value.ndim for value in values):
            shapes = ", ".join(str(tuple(value.shape)) for value in values[:5])
            raise ShapeError(f"{what}: expected batches that differ in their first dimension only, got {shapes}")
        return torch.cat(values)
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise InputError(f"{what}: expected the same names in every batch, as in {', '.join(map(repr, first))}")
        return {key: _joined([value[key] for value in values], what) for key in first}
    if isinstance(first, tuple | list):
        if any(len(value) != len(first) for value in values):
            raise InputError(f"{what}: expected {len(first)} of them in every batch")
        return tuple(_joined(list(items), what) for items in zip(*values, strict=True))
    raise TypeError(f"{what}: expected tensors, or tuples or mappings of tensors, got {_kind(first)}")


def _kind(value: Any) -> str:
    return type(value).__name__


def _at(value: Any, places: Tensor) -> Any:
    """The samples at these places of what `_joined` returns."""
    if isinstance(value, Tensor):
        return value[places.to(value.device)]
    if isinstance(value, dict):
        return {key: _at(item, places) for key, item in value.items()}
    return tuple(_at(item, places) for item in value)


def _check_length(value: Any, expected: int, argument: str) -> None:
    if isinstance(value, Tensor):
        if len(value) != expected:
            raise ShapeError(f"{argument}: expected as many inputs as targets, got {len(value)} and {expected}")
    else:
        for item in value.values() if isinstance(value, dict) else value:
            _check_length(item, expected, argument)
