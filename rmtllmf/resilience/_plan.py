"""A realignment in two halves: all arguments checked before anything is touched, and then the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._display import counted, course
from .._loss import loss_of
from .._state import StateLike, finite_number, quoted, select_names, whole_number
from .._tasks import Task, Tasks, as_tasks, device_of, logits_of, mode, pairs
from ..errors import InputError, NonFiniteError, ShapeError
from ._anchor import Anchor, AnchorWeight
from ._training import check_finite, kept, only_trained, progress_bar, warmup_cosine
from ._validation import Validation

Loss: TypeAlias = Callable[[Any, Any], Tensor]
MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class TrainingOptions(TypedDict, total=False):
    """Keyword arguments of everything that trains, with the meaning that they have for `realign`."""

    loss: Loss
    lr: float | None
    weight_decay: float | None
    warmup: float | None
    schedule_steps: int | None
    optimizer: MakeOptimizer | None
    progress: bool


class RealignOptions(TrainingOptions, total=False):
    """Keyword arguments of `realign` that also say what is trained."""

    frozen: str | Iterable[str]
    trainable: str | Iterable[str] | None
    anchor: StateLike | None
    anchor_weight: AnchorWeight


def check_keywords(options: Mapping[str, Any], known: type) -> None:
    """Raise for a keyword that is none of `known`, a TypedDict."""
    names = known.__annotations__
    unknown = set(options) - set(names)
    if unknown:
        raise TypeError(f"unexpected keyword {quoted(unknown)}; expected some of {quoted(names, 20)}")


@dataclass(frozen=True)
class Realignment:
    """What a realignment did.

    Attributes:
        losses: the mean loss over the tasks before each step, one number a step; without the penalty.
        trained: names of the parameters that were trained; tied ones under their first name.
        seconds: wall-clock time of all steps.
        penalties: the penalty of the anchor before each step; empty without an anchor.
        validation: the mean validation loss before the first step and after each step that was evaluated; empty
            without validation.
        kept: number of steps up to the smallest validation loss, after which the model was left; None without
            validation, where it was left after all steps.

    Example:
        >>> Realignment(losses=(0.7, 0.5), trained=("weight",), seconds=0.1).losses[-1]
        0.5
    """

    losses: tuple[float, ...]
    trained: tuple[str, ...]
    seconds: float
    penalties: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()
    kept: int | None = None

    def __repr__(self) -> str:
        kept = "" if self.kept is None else f", the model of step {self.kept} kept"
        return (
            f"Realignment({course(self.losses)}{kept}, {counted(len(self.trained), 'parameter')} trained, "
            f"{self.seconds:.2g} s)"
        )


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
    anchor: Anchor | None = None
    validation: Validation | None = None

    def run(self) -> Realignment:
        """All steps, after which flags, modes, gradients and frozen buffers are as they were."""
        start, losses, penalties = time.perf_counter(), [], []
        parameters = list(self.trained.values())
        tasks = [*self.tasks.values(), *(self.validation.tasks.values() if self.validation else ())]
        heads = [task.head for task in tasks if isinstance(task.head, nn.Module)]
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
            pull = self.anchor.pull(self.trained, self.optimizer) if self.anchor and self.optimizer else None
            watch = self.validation.watch(self.model, self.trained, self.loss) if self.validation else None
            batches = {name: _endless(task, name, device) for name, task in self.tasks.items()}
            bar = stack.enter_context(progress_bar(self.steps)) if self.progress else None
            for step in range(self.steps):
                for parameter in parameters:
                    parameter.grad = None
                total = 0.0
                for name, task in self.tasks.items():
                    inputs, targets = next(batches[name])
                    value = loss_of(self.loss, logits_of(self.model, task.head, inputs), targets, _named(name))
                    total += _check_loss(value, step, name)
                    # `inputs=`: a head that hides parameters in a closure gets no gradients either
                    (value / len(self.tasks)).backward(inputs=parameters)
                losses.append(total / len(self.tasks))
                if pull is not None:
                    penalties.append(pull.penalty())
                    pull.before_step()
                gradients = _single([parameter.grad for parameter in parameters])
                check_finite(gradients, self.trained, f"gradient in step {step}")
                assert self.optimizer is not None  # there are steps
                self.optimizer.step()
                if pull is not None:
                    pull.after_step()
                if scheduler is not None:
                    scheduler.step()
                if bar is not None:
                    bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                    bar.update()
                if watch is not None and watch.enough(step + 1, self.steps):
                    break
            if watch is not None:
                watch.restore()
            check_finite(_single(parameters), self.trained, "value after the last step")
        return Realignment(
            tuple(losses),
            tuple(self.trained),
            time.perf_counter() - start,
            tuple(penalties),
            tuple(watch.losses) if watch else (),
            watch.best if watch else None,
        )

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
    frozen: str | Iterable[str] = (),
    trainable: str | Iterable[str] | None = None,
    loss: Loss = cross_entropy,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup: float | None = None,
    optimizer: MakeOptimizer | None = None,
    progress: bool = False,
    schedule_steps: int | None = None,
    anchor: StateLike | None = None,
    anchor_weight: AnchorWeight = 1.0,
    validation: Tasks | None = None,
    validate_every: int = 1,
    patience: int | None = None,
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
    trained, fixed = choose(model, frozen, trainable, needed=steps > 0)
    schedule = None
    if optimizer is None:
        half = [name for name, parameter in trained.items() if parameter.dtype in (torch.float16, torch.bfloat16)]
        if half and steps:
            raise InputError(
                f"model: {half[0]!r} is {trained[half[0]].dtype}, in which small steps round to nothing; realign in "
                "float32, both the model (model.float()) and a `base` or `anchor` of half precision, and back "
                "afterwards; or give an `optimizer` that keeps float32 copies"
            )
        peak = 1e-4 if lr is None else finite_number(lr, "lr", positive=True)
        decay = 0.0 if weight_decay is None else finite_number(weight_decay, "weight_decay")
        share = 0.1 if warmup is None else finite_number(warmup, "warmup")
        if decay < 0:
            raise InputError(f"weight_decay: expected a number >= 0, got {decay}")
        if not 0 <= share <= 1:
            raise InputError(f"warmup: expected a share of the steps between 0 and 1, got {share}")
        length = steps if schedule_steps is None else whole_number(schedule_steps, "schedule_steps", at_least=steps)
        schedule = warmup_cosine(length, share)

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=peak, weight_decay=decay)

    elif not callable(optimizer):
        raise TypeError(f"optimizer: expected a function parameters -> optimizer, got {type(optimizer).__name__}")
    else:
        given = {"lr": lr, "weight_decay": weight_decay, "warmup": warmup, "schedule_steps": schedule_steps}
        clash = [name for name, value in given.items() if value is not None]
        if clash:
            raise InputError(f"{', '.join(clash)}: belong to the default optimizer; give them to your own `optimizer`")
    if anchor is None and not (isinstance(anchor_weight, int | float) and anchor_weight == 1):
        raise InputError("anchor_weight: needs an `anchor`, what the parameters are pulled to")
    pulled = None if anchor is None else Anchor.of(model, trained, anchor, anchor_weight)
    watched = Validation.of(validation, validate_every, patience)
    made = _made(optimizer, list(trained.values()), model) if steps else None
    return Plan(model, tasks, steps, trained, fixed, loss, made, schedule, progress, pulled, watched)


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


def choose(
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
    modules = dict(model.named_modules(remove_duplicate=False))
    return trained, tuple((modules[owner], last) for owner, last in places)


def _endless(task: Task, name: str, device: torch.device | None) -> Iterator[tuple[Any, Any]]:
    while True:
        yield from pairs(task.batches, _named(name), device)


def _named(task: str) -> str:
    return f"tasks_or_batches[{task!r}]" if task else "tasks_or_batches"


def _single(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Float64 as float32, in which `check_finite` adds up."""
    return [t.detach().float() if t is not None and t.dtype == torch.float64 else t for t in tensors]


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
