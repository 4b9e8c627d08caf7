"""Train a fused model on a few samples of every task, with some of its parameters frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._state import finite_number, select_names, whole_number
from .._tasks import Task, Tasks, as_tasks, device_of, logits_of, mode, pairs
from ..errors import InputError, NonFiniteError, ShapeError
from ._training import check_finite, kept, only_trained, progress_bar, warmup_cosine

__all__ = ["Realignment", "realign"]

Loss: TypeAlias = Callable[[Any, Any], Tensor]
MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Realignment:
    """What a realignment did.

    Attributes:
        losses: the mean loss over the tasks before each step, one number a step.
        trained: names of the parameters that were trained; tied ones under their first name.
        seconds: wall-clock time of all steps.

    Example:
        >>> Realignment(losses=(0.7, 0.5), trained=("weight",), seconds=0.1).losses[-1]
        0.5
    """

    losses: tuple[float, ...]
    trained: tuple[str, ...]
    seconds: float


def realign(
    model: nn.Module,
    tasks_or_batches: Tasks,
    *,
    steps: int = 100,
    frozen: str | Iterable[str] = (),
    trainable: str | Iterable[str] | None = None,
    loss: Loss = cross_entropy,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup: float | None = None,
    optimizer: MakeOptimizer | None = None,
    progress: bool = False,
) -> Realignment:
    r"""Minimise the mean loss of all tasks over the parameters that are not frozen, in place.

    .. math:: \min_{\theta_j,\ j \notin \mathcal{E}} \frac{1}{N} \sum_{i=1}^N
              E_{(x, y) \sim \mathcal{S}_i}\, \ell\bigl(h_i(f(x; \theta)), y\bigr)

    Every step takes the next batch of every task, so small tasks come round more often. Tasks go backward one by one,
    so memory is that of the largest. The model is in training mode meanwhile (but for modules with frozen statistics,
    and parts that were in evaluation mode when the whole was in training mode), the heads in evaluation mode;
    `requires_grad`, `grad` and the mode of every sub-module are left as they were found, after an exception too.
    Only what the model and the DataLoader draw themselves (dropout, shuffling) is random.

    Args:
        model: one encoder for all tasks, or a complete model.
        tasks_or_batches: name -> (head, batches), with logits ``head(model(inputs))``; or the batches of a complete
            model. Batches are (inputs, targets), in anything that can be gone through again: a DataLoader, a list.
            Inputs that are a tuple or a mapping become positional or keyword arguments.
        steps: number of steps, at least 0.
        frozen: names or glob patterns of parameters and buffers that must keep their values; wins over `trainable`.
            A tied parameter is meant under any of its names.
        trainable: names or glob patterns of the parameters to train; None: those with `requires_grad`.
        loss: of logits and targets, a scalar. The default takes class indices.
        lr: peak step size of AdamW; None: 1e-4.
        weight_decay: of AdamW; None: 0, since decay would pull away from the base model.
        warmup: share of the steps with linearly rising step size, followed by a cosine to 0; None: 0.1.
        optimizer: parameters -> a ``torch.optim.Optimizer`` that replaces AdamW and the schedule (and so excludes
            `lr`, `weight_decay` and `warmup`).
        progress: show a bar.

    Returns:
        A `Realignment`.

    Raises:
        InputError: a pattern that matches nothing, nothing left to train, a task without batches or with an iterator
            that is used up, half-precision parameters without an `optimizer`, `steps` or `lr` out of range.
        NonFiniteError: a loss or a gradient that is not finite, before the step is taken, or a parameter that is not
            after the last.
        ShapeError: the loss is not one number.

    Source: R-MTLLMF, section III, step "realignment" (few-shot fine-tuning with frozen embeddings).

    Example:
        >>> import torch
        >>> model, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        >>> batches = [(torch.eye(4), torch.tensor([0, 0, 1, 1]))]
        >>> done = realign(model, {"parity": (head, batches)}, steps=30, lr=0.1, frozen="bias")
        >>> done.trained, done.losses[-1] < done.losses[0]
        (('weight',), True)
    """
    plan = prepare(
        model,
        tasks_or_batches,
        steps=steps,
        frozen=frozen,
        trainable=trainable,
        loss=loss,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        optimizer=optimizer,
        progress=progress,
    )
    return plan.run()


@dataclass(frozen=True)
class Plan:
    """A realignment whose arguments have been checked, and that has not touched anything yet."""

    model: nn.Module
    tasks: dict[str, Task]
    steps: int
    trained: dict[str, nn.Parameter]
    kept_buffers: tuple[tuple[nn.Module, str], ...]
    loss: Loss
    optimizer: torch.optim.Optimizer | None  # None: no steps
    schedule: Callable[[int], float] | None
    progress: bool

    def run(self) -> Realignment:
        """All steps, after which flags, modes, gradients and frozen buffers are as they were."""
        start, losses = time.perf_counter(), []
        parameters = list(self.trained.values())
        heads = [task.head for task in self.tasks.values() if isinstance(task.head, nn.Module)]
        device = device_of(self.model)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._training())
            stack.enter_context(mode(False, *heads))
            stack.enter_context(only_trained(parameters, self.model, *heads))
            stack.enter_context(kept(self.kept_buffers))
            scheduler = None
            if self.schedule is not None and self.optimizer is not None:
                scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)
            batches = {name: _endless(task, name, device) for name, task in self.tasks.items()}
            bar = stack.enter_context(progress_bar(self.steps)) if self.progress else None
            for step in range(self.steps):
                for parameter in parameters:
                    parameter.grad = None
                total = 0.0
                for name, task in self.tasks.items():
                    inputs, targets = next(batches[name])
                    value = self.loss(logits_of(self.model, task.head, inputs), targets)
                    total += _check_loss(value, step, name)
                    # `inputs=`: a head that hides parameters in a closure gets no gradients either
                    (value / len(self.tasks)).backward(inputs=parameters)
                losses.append(total / len(self.tasks))
                check_finite([parameter.grad for parameter in parameters], self.trained, f"gradient in step {step}")
                assert self.optimizer is not None  # there are steps
                self.optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                if bar is not None:
                    bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                    bar.update()
            check_finite(parameters, self.trained, "value after the last step")
        return Realignment(tuple(losses), tuple(self.trained), time.perf_counter() - start)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode, but not where statistics are frozen, nor in parts that the caller had set apart."""
        found = [part for part in self.model.modules() if self.model.training and not part.training]
        with mode(True, self.model):
            for part in [*found, *(module for module, _ in self.kept_buffers)]:
                part.training = False
            yield


def prepare(
    model: nn.Module,
    tasks_or_batches: Tasks,
    *,
    steps: int,
    frozen: str | Iterable[str],
    trainable: str | Iterable[str] | None,
    loss: Loss,
    lr: float | None,
    weight_decay: float | None,
    warmup: float | None,
    optimizer: MakeOptimizer | None,
    progress: bool,
) -> Plan:
    """Check all arguments of `realign` before anything is changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    steps = whole_number(steps, "steps", at_least=0)
    if not callable(loss):
        raise TypeError(f"loss: expected a function of logits and targets, got {type(loss).__name__}")
    tasks = as_tasks(tasks_or_batches, "tasks_or_batches") if steps else {}
    streams = [
        task.batches for task in tasks.values() if isinstance(task.batches, Iterator)
    ]  # iter() would cost a DataLoader a draw
    if len({id(stream) for stream in streams}) < len(streams):
        raise InputError("tasks_or_batches: two tasks share one iterator, and would get every other batch of it")
    trained, fixed = _choose(model, frozen, trainable, needed=steps > 0)
    schedule = None
    if optimizer is None:
        half = [name for name, parameter in trained.items() if parameter.dtype in (torch.float16, torch.bfloat16)]
        if half and steps:
            raise InputError(
                f"model: {half[0]!r} is {trained[half[0]].dtype}, in which small steps round to nothing; realign in "
                "float32 (model.float(), and back afterwards), or give an `optimizer` that keeps float32 copies"
            )
        peak = 1e-4 if lr is None else finite_number(lr, "lr", positive=True)
        decay = 0.0 if weight_decay is None else finite_number(weight_decay, "weight_decay")
        share = 0.1 if warmup is None else finite_number(warmup, "warmup")
        if decay < 0:
            raise InputError(f"weight_decay: expected a number >= 0, got {decay}")
        if not 0 <= share <= 1:
            raise InputError(f"warmup: expected a share of the steps between 0 and 1, got {share}")
        schedule = warmup_cosine(steps, share)

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=peak, weight_decay=decay)

    elif not callable(optimizer):
        raise TypeError(f"optimizer: expected a function parameters -> optimizer, got {type(optimizer).__name__}")
    else:
        given = {"lr": lr, "weight_decay": weight_decay, "warmup": warmup}
        clash = [name for name, value in given.items() if value is not None]
        if clash:
            raise InputError(f"{', '.join(clash)}: belong to the default optimizer; give them to your own `optimizer`")
    made = _made(optimizer, list(trained.values()), model) if steps else None
    return Plan(model, tasks, steps, trained, fixed, loss, made, schedule, progress)


def _made(optimizer: MakeOptimizer, parameters: list[nn.Parameter], model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, which may train what it was handed and nothing else."""
    with only_trained(parameters, model):
        made = optimizer(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected it to return a torch.optim.Optimizer, got {type(made).__name__}")
    if isinstance(made, torch.optim.LBFGS):
        raise TypeError("optimizer: LBFGS evaluates the loss on its own; expected one whose step() needs no closure")
    handed = {id(parameter) for parameter in parameters}
    if any(id(parameter) not in handed for group in made.param_groups for parameter in group["params"]):
        raise InputError("optimizer: trains parameters that it was not handed, which may be frozen ones")
    return made


def _choose(
    model: nn.Module, frozen: str | Iterable[str], trainable: str | Iterable[str] | None, *, needed: bool
) -> tuple[dict[str, nn.Parameter], tuple[tuple[nn.Module, str], ...]]:
    """The parameters to train by their first names, and where the buffers are that must keep their values."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    fixed = select_names([*parameters, *buffers], frozen, "frozen")
    if trainable is None:
        wanted = [name for name, parameter in parameters.items() if parameter.requires_grad]
    else:
        wanted = select_names(parameters, trainable, "trainable")
    ids = {id(parameters[name]) for name in wanted} - {id(parameters[name]) for name in fixed if name in parameters}
    trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ids}
    if not trained and needed:
        raise InputError(
            f"nothing to train: {len(wanted)} parameter names are trainable and all of them are frozen"
            if wanted
            else "nothing to train: no parameter has requires_grad; name some with `trainable`"
        )
    for name, parameter in trained.items():
        if not parameter.is_floating_point():
            raise TypeError(f"trainable: {name!r} is {parameter.dtype}, which has no gradient")
    places = [name.rpartition(".")[::2] for name in fixed if name in buffers]
    return trained, tuple((model.get_submodule(owner), last) for owner, last in places)


def _endless(task: Task, name: str, device: torch.device | None) -> Iterator[tuple[Any, Any]]:
    argument = f"tasks_or_batches[{name!r}]" if name else "tasks_or_batches"
    while True:
        yield from pairs(task.batches, argument, device)


def _check_loss(value: Any, step: int, name: str) -> float:
    of = f" of task {name!r}" if name else ""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(value).__name__}{of}")
    if value.numel() != 1:
        raise ShapeError(f"loss: expected one number, got shape {tuple(value.shape)}{of}; reduce it with a mean")
    number = float(value.detach())
    if not math.isfinite(number):
        raise NonFiniteError(f"loss{of} is {number} in step {step}; the model has not been changed by this step")
    if not value.requires_grad:
        raise InputError(f"loss{of} does not depend on any of the parameters to train")
    return number
