"""A model at a scale of an update: ``base + scale * update`` in memory that is used again for every scale."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._state import (
    StateLike,
    Tensors,
    as_state,
    check_dtypes,
    check_finite,
    check_keys,
    check_shapes,
    identity,
    is_bendable,
    quoted,
    wide,
)
from ..errors import InputError, StateMismatchError
from ..taskvec import TaskVector


class Entry(NamedTuple):
    """A tensor that the model is called with, and what it is made of: ``base + scale * step``."""

    place: Tensor
    base: Tensor
    step: Tensor | None


class Moved(NamedTuple):
    """A model as a function, with parameters that are written anew for every scale."""

    model: nn.Module
    state: dict[str, Tensor]
    written: list[Entry]

    @classmethod
    def of(cls, model: nn.Module, base: StateLike, update: Tensors) -> Moved:
        """Checked; entries that are tied in the model are one."""
        everything = model.state_dict(keep_vars=True)  # the parameters themselves, which tells ties
        current = {name: tensor for name, tensor in everything.items() if isinstance(tensor, Tensor)}
        original = as_state(base, "base")
        check_keys(original, current, "base", "model")
        check_shapes(original, current, "base", "model")
        check_dtypes(original, current, "base", "model")
        steps = _steps(update, original)
        tied: dict[Hashable, list[str]] = {}
        for name, tensor in current.items():
            tied.setdefault(identity(tensor), []).append(name)
        state, written = {}, []
        for names in tied.values():
            _check_one([original[name] for name in names], names, "base")
            moving = [name for name in names if name in steps]
            _check_one([steps[name] for name in moving], moving, "update")
            first, device = names[0], current[names[0]].device
            old = original[first].detach().to(device)
            if moving or not isinstance(current[first], nn.Parameter):  # a module may write to its buffers
                step = steps[moving[0]].detach().to(device) if moving else None
                written.append(Entry(torch.empty_like(old), old, step))
                old = written[-1].place
            state[first] = old
        for name, buffer in model.named_buffers():
            if name not in current:  # not persistent
                written.append(Entry(torch.empty_like(buffer), buffer, None))
                state[name] = written[-1].place
        return cls(model, state, written)

    def at(self, scale: float) -> Callable[..., Any]:
        """The model at this scale, until the next call."""
        for place, base, step in self.written:
            if step is None or scale == 0:
                place.copy_(base)
            elif base.dtype == step.dtype and base.element_size() >= 4:
                torch.add(base, step, alpha=scale, out=place)
            else:
                place.copy_(torch.add(wide(base), step, alpha=scale))
        return lambda *args, **kwargs: functional_call(self.model, self.state, args, kwargs)


def _steps(update: Tensors, base: Tensors) -> dict[str, Tensor]:
    if not isinstance(update, Mapping):
        raise TypeError(f"update: expected a mapping of name -> tensor, got {type(update).__name__}")
    given = as_state(update, "update")
    unknown = set(given) - set(base)
    if unknown:
        raise StateMismatchError(f"base lacks {quoted(unknown)}, which update names")
    check_shapes(given, base, "update", "base")
    steps = {name: tensor for name, tensor in given.items() if is_bendable(name, tensor.dtype)}
    if not steps:
        raise InputError("update: holds no floating-point parameters, so that no scale changes anything")
    for name in steps:
        if not is_bendable(name, base[name].dtype):
            raise StateMismatchError(f"update[{name!r}] is {steps[name].dtype}; base has {base[name].dtype}")
    if not isinstance(update, TaskVector):
        check_finite(steps, "update")
    return steps


def _check_one(tensors: list[Tensor], names: list[str], argument: str) -> None:
    for name, tensor in zip(names[1:], tensors[1:], strict=True):
        if identity(tensor) != identity(tensors[0]) and not torch.equal(tensor, tensors[0]):
            raise StateMismatchError(
                f"{names[0]!r} and {name!r} are one tensor in the model, but not the same in {argument}"
            )
