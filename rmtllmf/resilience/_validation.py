"""The loss on held-out samples while a model is trained, and the best values of what was trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._loss import loss_of
from .._state import whole_number
from .._tasks import Task, Tasks, as_tasks, device_of, logits_of, mode, pairs
from ..errors import InputError, NonFiniteError, ShapeError


@dataclass(frozen=True)
class Validation:
    """Checked: the tasks to validate on, how often, and after how many evaluations without improvement to stop."""

    tasks: dict[str, Task]
    every: int
    patience: int | None

    @classmethod
    def of(cls, tasks: Tasks | None, every: Any, patience: Any) -> Validation | None:
        """None without tasks, where the other two say nothing."""
        every = whole_number(every, "validate_every", at_least=1)
        if tasks is None:
            if patience is not None or every != 1:
                raise InputError("patience, validate_every: need `validation`, the samples to validate on")
            return None
        if patience is not None:
            patience = whole_number(patience, "patience", at_least=1)
        checked = as_tasks(tasks, "validation")
        for name, task in checked.items():
            if isinstance(task.batches, Iterator):
                raise InputError(
                    f"{_argument(name)}: expected batches that can be gone through again (a list, a DataLoader), got "
                    f"an iterator ({type(task.batches).__name__})"
                )
        return cls(checked, every, patience)

    def watch(self, model: nn.Module, trained: Mapping[str, nn.Parameter], loss: Callable[[Any, Any], Tensor]) -> Watch:
        """For a run that begins now: evaluates the model as it stands."""
        return Watch(self, model, list(trained.values()), loss)


class Watch:
    """The evaluations of one run, in `losses`, and the model's values at the best of them, after `best` steps."""

    def __init__(
        self,
        validation: Validation,
        model: nn.Module,
        parameters: list[nn.Parameter],
        loss: Callable[[Any, Any], Tensor],
    ) -> None:
        self._validation, self._model, self._loss = validation, model, loss
        self._parameters = parameters
        self._places = [
            (module, name)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if isinstance(buffer, Tensor)
        ]
        self.losses: list[float] = []
        self.best = 0
        self._kept: list[Tensor] = []
        self._worse = 0
        self._evaluate(0)

    def enough(self, done: int, steps: int) -> bool:
        """After `done` of at most `steps` steps: evaluate if it is time to; whether to stop now."""
        if done % self._validation.every == 0 or done == steps:
            self._evaluate(done)
        return self._validation.patience is not None and self._worse >= self._validation.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put parameters and buffers back to where the loss was smallest."""
        for tensor, value in zip(self._tensors(), self._kept, strict=True):
            tensor.copy_(value)

    def _tensors(self) -> list[Tensor]:
        return [*self._parameters, *(getattr(module, name) for module, name in self._places)]

    @torch.no_grad()
    def _evaluate(self, done: int) -> None:
        losses = [self._mean_loss(name, task, done) for name, task in self._validation.tasks.items()]
        self.losses.append(math.fsum(losses) / len(losses))
        if done and self.losses[-1] >= min(self.losses[:-1]):
            self._worse += 1
            return
        self.best, self._worse = done, 0
        self._kept = [tensor.detach().clone() for tensor in self._tensors()]

    def _mean_loss(self, name: str, task: Task, done: int) -> float:
        """Over all batches, each counted with its number of samples."""
        total, count = 0.0, 0
        with mode(False, self._model, task.head):
            for inputs, targets in pairs(task.batches, _argument(name), device_of(self._model)):
                value = loss_of(self._loss, logits_of(self._model, task.head, inputs), targets, _argument(name))
                if not isinstance(value, Tensor) or value.numel() != 1:
                    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ShapeError(f"loss: expected one number on {_argument(name)}, got {got}")
                samples = len(targets) if isinstance(targets, Tensor) and targets.ndim else 1
                total, count = total + float(value) * samples, count + samples
        mean = total / max(1, count)
        if not math.isfinite(mean):
            raise NonFiniteError(f"{_argument(name)}: the loss is {mean} after {done} steps; try a smaller lr")
        return mean


def _argument(name: str) -> str:
    return f"validation[{name!r}]" if name else "validation"
