"""From two models to their difference, and from a model and a difference to a model."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._state import (
    StateLike,
    Tensors,
    all_finite,
    as_state,
    check_shapes,
    finite_number,
    identity,
    is_bendable,
    map_tied,
    overflows,
    quoted,
    select_names,
    wide,
)
from ..errors import InputError, NonFiniteError, StateMismatchError
from ._agreement import check_specs
from ._sources import spec_of


def differences(
    base: StateLike, finetuned: StateLike, skip: str | Iterable[str] = (), *, mixed_dtypes: bool = False
) -> dict[str, Tensor]:
    """What `TaskVector.between` holds."""
    old, new = as_state(base, "base"), as_state(finetuned, "finetuned")
    skipped = set(select_names({**old, **new}, skip, "skip"))
    if skipped and skipped.issuperset(old):
        raise InputError("skip: leaves nothing of base")
    specs, expected = ({key: spec_of(tensor) for key, tensor in state.items()} for state in (new, old))
    check_specs(specs, expected, "finetuned", "base", skipped, mixed=mixed_dtypes)
    keys = [key for key in old if key not in skipped and is_bendable(key, old[key].dtype)]
    if not keys:
        raise InputError("base: holds no floating-point parameters, so there is nothing to fine-tune")
    deltas = map_tied(_difference, keys, old, new)
    for key, delta in deltas.items():
        if not all_finite(delta):
            raise NonFiniteError(
                f"finetuned[{key!r}] - base[{key!r}] holds NaN or infinity, which is not the same in both models"
            )
    return deltas


def applied(vector: Tensors, base: Any, scale: float) -> Any:
    """What `TaskVector.apply_to` returns: everything is checked and calculated before a module is written to."""
    factor = finite_number(scale, "scale")
    if isinstance(base, str | os.PathLike):
        raise TypeError("base: expected a module or a state dict; load the file first")
    state = as_state(base, "base")
    unknown = set(vector) - set(state)
    if unknown:
        raise StateMismatchError(f"base lacks {quoted(unknown)}, which the task vector changes")
    check_shapes(vector, state, "the task vector", "base")
    deltas: dict[Hashable, str] = {}  # one for each memory of the base: what is tied moves together
    for key in vector:
        if not is_bendable(key, state[key].dtype):
            raise TypeError(f"base[{key!r}] is {state[key].dtype} or a running statistic; it cannot be changed")
        twin = deltas.setdefault(identity(state[key]), key)
        if vector[key] is not vector[twin] and not torch.equal(vector[key], vector[twin]):
            raise StateMismatchError(
                f"{twin!r} and {key!r} are tied in base, but the task vector changes them differently; select() one"
            )
    moved = {memory: _moved(key, state[key], vector[key], factor) for memory, key in deltas.items()}
    if isinstance(base, nn.Module):
        with torch.no_grad():
            for memory, key in deltas.items():
                state[key].copy_(moved[memory])
        return base
    result = {}
    for key, tensor in state.items():
        memory = identity(tensor)
        if memory not in moved:
            moved[memory] = tensor.detach().clone()
        result[key] = moved[memory]
    return result


def _difference(before: Tensor, after: Tensor) -> Tensor:
    before, after = before.detach(), after.detach().to(before.device)
    delta = wide(after) - wide(before)
    if not all_finite(delta):
        same = (before == after) | (before.isnan() & after.isnan())
        delta = torch.where(same, torch.zeros_like(delta), delta)
    return delta


def _moved(key: str, old: Tensor, delta: Tensor, scale: float) -> Tensor:
    old = old.detach()
    total = torch.add(wide(old), delta.to(old.device), alpha=scale)
    new = total.to(old.dtype)
    if overflows(old, total) or (new is not total and overflows(total, new)):
        raise NonFiniteError(f"base[{key!r}] plus the task vector overflows {old.dtype}")
    return new
