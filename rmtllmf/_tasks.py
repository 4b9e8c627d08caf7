"""The tasks of a multi-task model, ``Mapping[name, (head, batches)]``, and what all that iterate over them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .errors import InputError

LABELS = "labels"  # the key of the targets in a batch that is a mapping

Head: TypeAlias = Callable[[Any], Any]
Batches: TypeAlias = Iterable[Any]
Tasks: TypeAlias = Mapping[str, tuple[Head, Batches]] | Mapping[str, Batches] | Batches


class Task(NamedTuple):
    """One task: `head` turns the encoder's output into logits (None: the model is complete), `batches` its data."""

    head: Head | None
    batches: Batches


def as_tasks(tasks: Tasks, argument: str) -> dict[str, Task]:
    """A dict of `Task` from a mapping name -> (head, batches) or name -> batches, or from bare batches (one task)."""
    if not isinstance(tasks, Mapping):
        _check_batches(tasks, argument)
        if isinstance(tasks, list | tuple) and _is_task(tasks[0]):
            raise TypeError(
                f"{argument}: expected tasks as a mapping of name -> (head, batches), or of name -> batches for a "
                f"complete model, or the batches of one task; got a {type(tasks).__name__} of {len(tasks)} tasks "
                "without names"
            )
        return {"": Task(None, tasks)}
    if not tasks:
        raise InputError(f"{argument}: expected at least one task, got an empty mapping")
    result = {}
    for name, value in tasks.items():
        if isinstance(value, tuple) and len(value) == 2 and callable(value[0]):
            task = Task(*value)
        else:
            task = Task(None, value)
        _check_batches(task.batches, f"{argument}[{name!r}]")
        result[name] = task
    return result


def named_tasks(tasks: Tasks, argument: str) -> dict[str, Task]:
    """`as_tasks` of a mapping only."""
    if not isinstance(tasks, Mapping):
        raise TypeError(f"{argument}: expected a mapping of name -> (head, batches), got {type(tasks).__name__}")
    return as_tasks(tasks, argument)


def _is_task(value: Any) -> bool:
    """Whether it can be no batch, but is all batches of a task."""
    if isinstance(value, DataLoader) or (isinstance(value, tuple) and len(value) == 2 and callable(value[0])):
        return True
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(item, Mapping) for item in value):  # two of them with different keys are inputs and targets
        return len(value) != 2 or value[0].keys() == value[1].keys()
    # collators make lists, and so a batch of nested pairs is a list of two lists, or of a tuple and a tensor
    return all(isinstance(item, tuple if len(value) == 2 else tuple | list) and len(item) == 2 for item in value)


def _check_batches(batches: object, argument: str) -> None:
    if isinstance(batches, Tensor | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{argument}: expected batches, an iterable of (inputs, targets) such as a DataLoader or a list, or "
            f"(head, batches); got {type(batches).__name__}"
        )
    try:
        known_empty = len(batches) == 0  # type: ignore[arg-type]
    except TypeError:  # a stream
        known_empty = False
    if known_empty:
        raise InputError(f"{argument}: expected at least one batch, got none (a DataLoader with drop_last?)")


def pairs(batches: Batches, argument: str, device: torch.device | None = None) -> Iterator[tuple[Any, Any]]:
    """The (inputs, targets) of every batch, moved to `device`; an error if there is none or one is no pair."""
    empty = True
    for batch in batches:
        empty = False
        inputs, targets = _split(batch, argument)
        yield moved(inputs, device), moved(targets, device)
    if empty:
        raise InputError(
            f"{argument}: expected at least one batch, got none; an iterator that is used up cannot start again: "
            "pass a list or a DataLoader"
        )


def inputs_of(batches: Batches, argument: str, device: torch.device | None = None) -> Iterator[Any]:
    """The inputs of every batch, moved to `device`, for what needs no labels; an error if there is none.

    A batch that is a pair, a tuple or list of two, is (inputs, targets), and a mapping with the key "labels" is (the
    rest, targets), as everywhere; anything else is inputs.
    """
    empty = True
    for batch in batches:
        empty = False
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        yield moved(batch[0] if pair else without_labels(batch), device)
    if empty:
        raise InputError(
            f"{argument}: expected at least one batch, got none; an iterator that is used up cannot start again: "
            "pass a list or a DataLoader"
        )


def without_labels(inputs: Any) -> Any:
    """Inputs as the model gets them: of a mapping with the key "labels" the rest."""
    if isinstance(inputs, Mapping) and LABELS in inputs:
        return {key: value for key, value in inputs.items() if key != LABELS}
    return inputs


def _split(batch: Any, argument: str) -> tuple[Any, Any]:
    """The inputs and the targets of a batch: a pair, or a mapping as Hugging Face's collators make it."""
    if isinstance(batch, Mapping) and LABELS in batch:
        return without_labels(batch), batch[LABELS]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        without = f"; a mapping needs the targets under the key {LABELS!r}" * isinstance(batch, Mapping)
        raise TypeError(f"{argument}: expected batches (inputs, targets), got {describe(batch)}{without}")
    return batch[0], batch[1]


def describe(value: object) -> str:
    """What a wrong batch was, in a few words."""
    if isinstance(value, Tensor):
        return f"a bare tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value)) or 'nothing'}"
    return type(value).__name__


def moved(value: Any, device: torch.device | None) -> Any:
    """`value` with the tensors in it (also inside tuples, lists and mappings) on `device`."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a namedtuple
        return type(value)(*(moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    return value


def forward(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``, with tuples as positional and mappings as keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def logits_of(model: Callable[..., Any], head: Head | None, inputs: Any) -> Any:
    """What losses and metrics see: ``head(model(inputs))``, or the model's output, or its attribute ``logits``."""
    output = forward(model, inputs)
    if head is not None:
        output = head(output)
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def device_of(model: Callable[..., Any]) -> torch.device | None:
    """Where the first parameter or buffer lives; None if there is none."""
    if not isinstance(model, nn.Module):
        return None
    for parameter in model.parameters():
        return parameter.device
    for buffer in model.buffers():
        return buffer.device
    return None


@contextmanager
def mode(training: bool, *modules: object) -> Iterator[None]:
    """Training or evaluation mode for all `modules`, each sub-module put back afterwards as it was found."""
    found = [(part, part.training) for module in modules if isinstance(module, nn.Module) for part in module.modules()]
    try:
        for module in modules:
            if isinstance(module, nn.Module):
                module.train(training)
        yield
    finally:
        for part, was in found:
            part.training = was
