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
    so memory is that of the largest. The model is in training mode meanwhile, the heads in evaluation mode;
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
            that is used up, `steps` or `lr` out of range.
        NonFiniteError: a loss that is not finite, before the step is taken; it names the step and the task.
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
    kept_buffers: tuple[Tensor, ...]
    loss: Loss
    optimizer: MakeOptimizer
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
            stack.enter_context(mode(True, self.model))
            stack.enter_context(mode(False, *heads))
            stack.enter_context(_only_trained(parameters, self.model, *heads))
            stack.enter_context(_kept(self.kept_buffers))
            optimizer = self.optimizer(parameters)
            if not isinstance(optimizer, torch.optim.Optimizer):
                kind = type(optimizer).__name__
                raise TypeError(f"optimizer: expected it to return a torch.optim.Optimizer, got {kind}")
            scheduler = None if self.schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
            batches = {name: _endless(task, name, device) for name, task in self.tasks.items()}
            bar = stack.enter_context(_bar(self.steps)) if self.progress else None
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
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                if bar is not None:
                    bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                    bar.update()
        return Realignment(tuple(losses), tuple(self.trained), time.perf_counter() - start)


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
    tasks = as_tasks(tasks_or_batches, "tasks_or_batches")
    trained, kept = _choose(model, frozen, trainable)
    schedule = None
    if optimizer is None:
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
    return Plan(model, tasks, steps, trained, kept, loss, optimizer, schedule, progress)


def warmup_cosine(steps: int, share: float) -> Callable[[int], float]:
    """Step -> factor: rising linearly to 1 over the first `share` of the steps, then half a cosine that ends at 0."""
    rising = math.ceil(share * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def _choose(
    model: nn.Module, frozen: str | Iterable[str], trainable: str | Iterable[str] | None
) -> tuple[dict[str, nn.Parameter], tuple[Tensor, ...]]:
    """The parameters to train by their first names, and the buffers that must keep their values."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    fixed = select_names([*parameters, *buffers], frozen, "frozen")
    if trainable is None:
        wanted = [name for name, parameter in parameters.items() if parameter.requires_grad]
    else:
        wanted = select_names(parameters, trainable, "trainable")
    ids = {id(parameters[name]) for name in wanted} - {id(parameters[name]) for name in fixed if name in parameters}
    trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ids}
    if not trained:
        raise InputError(
            f"nothing to train: {len(wanted)} parameter names are trainable and all of them are frozen"
            if wanted
            else "nothing to train: no parameter has requires_grad; name some with `trainable`"
        )
    for name, parameter in trained.items():
        if not parameter.is_floating_point():
            raise TypeError(f"trainable: {name!r} is {parameter.dtype}, which has no gradient")
    return trained, tuple(buffers[name] for name in fixed if name in buffers)


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


@contextmanager
def _only_trained(parameters: list[nn.Parameter], *modules: nn.Module) -> Iterator[None]:
    """`requires_grad` on `parameters` and nowhere else, and a clean `grad`; both put back afterwards."""
    found = {parameter: parameter.requires_grad for module in modules for parameter in module.parameters()}
    gradients = [parameter.grad for parameter in parameters]
    chosen = set(parameters)
    try:
        for parameter in found:
            if parameter.is_floating_point():
                parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, flag in found.items():
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def _kept(buffers: tuple[Tensor, ...]) -> Iterator[None]:
    """Frozen buffers, such as running statistics, get their values back."""
    copies = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)


def _bar(steps: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, desc="realign", unit="step")
