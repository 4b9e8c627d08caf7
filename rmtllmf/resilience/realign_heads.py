"""Train the heads of a fused model on features that are computed once, and leave the model as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from .._state import StateLike
from .._tasks import Task, Tasks, device_of, forward, mode, named_tasks, pairs
from ..errors import InputError
from ._anchor import AnchorWeight
from ._plan import Realignment, TrainingOptions, check_keywords, prepare

__all__ = ["realign_heads"]


def realign_heads(
    model: nn.Module,
    tasks: Tasks,
    *,
    steps: int = 100,
    frozen: str | Iterable[str] = (),
    trainable: str | Iterable[str] | None = None,
    anchor: StateLike | None = None,
    anchor_weight: AnchorWeight = 1.0,
    validation: Tasks | None = None,
    validate_every: int = 1,
    patience: int | None = None,
    **options: Unpack[TrainingOptions],
) -> tuple[dict[str, nn.Module], Realignment]:
    r"""Minimise the mean loss of all tasks over copies of their heads, on fixed features.

    .. math:: \min_{\phi_1, \dots, \phi_N} \frac{1}{N} \sum_{i=1}^N E_{(x, y) \sim \mathcal{S}_i}\,
              \ell\bigl(h_{\phi_i}(f(x)), y\bigr)

    The encoder goes once through all batches, in evaluation mode and without gradients, so that a step costs what a
    head costs. All features stay in memory, on the model's device. Neither the model nor the heads that were given
    change; heads that share parameters go on sharing them in the copies.

    Args:
        model: the encoder.
        tasks: name -> (head, batches), every head a module with parameters. Batches are gone through once.
        steps: number of steps, at least 0.
        frozen, trainable: names or glob patterns as for `realign`; a parameter is called by the name of its task, a
            dot, and its name in the head.
        anchor, anchor_weight: as for `realign`, with these names; "start" is the heads that were given.
        validation: name -> (head, batches), of which the batches count: held-out samples of all or some tasks.
        validate_every, patience: as for `realign`.
        options: loss, lr, weight_decay, warmup, schedule_steps, optimizer and progress, as for `realign`.

    Returns:
        The new heads by the name of their task, and a `Realignment`.

    Raises:
        InputError: a head without parameters (one with fixed weights, such as a zero-shot head) or of which nothing
            is trained (leave such a task out), validation of an unknown task, or an argument that `realign` refuses.
        TypeError: `model` or a head is no module.
        NonFiniteError: a loss, a gradient or a trained parameter that is not finite.

    Source: Kumar et al., "Fine-tuning can distort pretrained features and underperform out-of-distribution", 2022
    (linear probing).

    Example:
        >>> import torch
        >>> model, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        >>> batches = [(torch.eye(4), torch.tensor([0, 0, 1, 1]))]
        >>> heads, done = realign_heads(model, {"parity": (head, batches)}, steps=30, lr=0.1)
        >>> done.trained, heads["parity"] is head
        (('parity.weight', 'parity.bias'), False)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_keywords(options, TrainingOptions)
    known = named_tasks(tasks, "tasks")
    heads: dict[str, nn.Module] = {}
    for name, task in known.items():
        if not isinstance(task.head, nn.Module):
            kind = "none" if task.head is None else type(task.head).__name__
            raise TypeError(f"tasks[{name!r}]: expected a head that is a torch.nn.Module, got {kind}")
        if not any(True for _ in task.head.parameters()):
            raise InputError(
                f"tasks[{name!r}]: expected a head with parameters to train, got a {type(task.head).__name__} without "
                "(its weights are buffers or not there at all)"
            )
        heads[name] = task.head
    held_out = {} if validation is None else named_tasks(validation, "validation")
    unknown = held_out.keys() - heads.keys()
    if unknown:
        raise InputError(
            f"validation: {sorted(unknown)[0]!r} is no task; expected some of {', '.join(map(repr, heads))}"
        )
    copies = copy.deepcopy(heads)
    plan = prepare(
        _Heads(copies),
        {name: _Features(model, task, name, "tasks") for name, task in known.items()},
        steps=steps,
        frozen=frozen,
        trainable=trainable,
        anchor=anchor,
        anchor_weight=anchor_weight,
        validation=None
        if validation is None
        else {name: _Features(model, task, name, "validation") for name, task in held_out.items()},
        validate_every=validate_every,
        patience=patience,
        **options,
    )
    return copies, plan.run()


class _Heads(nn.Module):
    """All heads as one complete model of (name of the task, features)."""

    def __init__(self, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self._modules.update(heads)  # a task may be called what an attribute must not be
        self.training = all(head.training for head in heads.values())

    def forward(self, name: str, features: _Held) -> Any:
        """The logits of one task."""
        head = self._modules[name]
        assert head is not None
        return head(features.value)


@dataclass(frozen=True)
class _Held:
    """Features of whatever kind, which pass through unchanged."""

    value: Any


class _Features:
    """The batches ``((name, f(x)), y)`` of a task, calculated when they are gone through for the first time."""

    def __init__(self, model: nn.Module, task: Task, name: str, argument: str) -> None:
        self._model, self._task, self._name, self._argument = model, task, name, argument
        self._batches: list[tuple[Any, Any]] = []

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if not self._batches:
            with mode(False, self._model), torch.no_grad():
                self._batches = [
                    ((self._name, _Held(forward(self._model, inputs))), targets)
                    for inputs, targets in pairs(
                        self._task.batches, f"{self._argument}[{self._name!r}]", device_of(self._model)
                    )
                ]
        return iter(self._batches)
