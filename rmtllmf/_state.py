"""Mappings of name -> tensor: strict key, shape and dtype checks, and arithmetic that respects tied tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from operator import index as index_of
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ._model_files import load_model
from ._sharded import full, is_sharded, largest_of_all, local
from .errors import InputError, NonFiniteError, ShapeError, StateMismatchError

Tensors: TypeAlias = Mapping[str, Tensor]
StateLike: TypeAlias = Tensors | nn.Module | str | os.PathLike[str]
Door: TypeAlias = Callable[[Mapping[Any, Any], str], dict[Any, Any]]  # a mapping as it came in -> one of tensors

RUNNING_STATISTICS = ("running_mean", "running_var")
"""Last part of the names of normalisation statistics: carried from the base, never bent, never scaled."""


def as_state(source: StateLike, argument: str, *, vectors: bool = False) -> dict[str, Tensor]:
    """A plain dict from a module, a state dict (no tensor is copied) or the path of a checkpoint.

    With `vectors` that may be a file of `TaskVector.save`, too.
    """
    if isinstance(source, nn.Module):
        # what modules put into their state dict beside tensors (get_extra_state) is theirs to keep
        return {key: value for key, value in source.state_dict().items() if isinstance(value, Tensor)}
    if isinstance(source, str | os.PathLike):
        return load_model(source, argument, vectors=vectors)
    if not isinstance(source, Mapping):
        raise TypeError(
            f"{argument}: expected a torch.nn.Module, a mapping of name -> tensor or the path of a checkpoint, "
            f"got {type(source).__name__}"
        )
    return _checked(source, argument)


def _checked(source: Mapping[Any, Any], argument: str, door: Door | None = None) -> dict[str, Tensor]:
    """A dict of the mapping, read once (it may make its tensors on access), with names and tensors for sure."""
    state = dict(source.items())
    if door is not None:
        state = door(state, argument)
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"{argument}: expected names as keys, got {key!r} of type {type(key).__name__}")
        if not isinstance(value, Tensor):
            hint = "; torch.from_numpy makes one of it" if isinstance(value, np.ndarray) else ""
            raise TypeError(f"{argument}[{key!r}]: expected a tensor, got {type(value).__name__}{hint}")
    return state


def is_bendable(key: str, dtype: torch.dtype) -> bool:
    """Whether an entry is a parameter that fusion may change: floating, and no running statistic."""
    if dtype.is_complex:
        raise TypeError(f"{key!r}: complex entries are not supported; split it into real and imaginary part")
    return dtype.is_floating_point and key.rpartition(".")[2] not in RUNNING_STATISTICS


def quoted(keys: Iterable[str], limit: int = 5) -> str:
    """Keys for an error message: the first few, and how many more."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(map(repr, ordered[:limit])) + more


ALIGNED = "; aligned(vectors) brings vectors that change different layers, as adapters do, to the same names"


def check_keys(state: Iterable[str], expected: Iterable[str], argument: str, reference: str, hint: str = "") -> None:
    """Raise unless both have exactly the same keys; the `hint` is the end of the message."""
    have, want = set(state), set(expected)
    problems = []
    if want - have:
        problems.append(f"lacks {quoted(want - have)}")
    if have - want:
        problems.append(f"has the unexpected {quoted(have - want)}")
    if problems:
        raise StateMismatchError(f"{argument} {' and '.join(problems)}; its keys must be those of {reference}{hint}")


def check_shapes(state: Tensors, expected: Tensors, argument: str, reference: str) -> None:
    """Raise unless every tensor of `state` has the shape of its namesake in `expected`."""
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise StateMismatchError(
                f"{argument}[{key!r}] has shape {tuple(value.shape)}; {reference} has {tuple(expected[key].shape)}"
            )


def check_dtypes(state: Tensors, expected: Tensors, argument: str, reference: str) -> None:
    """Raise unless every tensor of `state` has the dtype of its namesake in `expected`."""
    for key, value in state.items():
        if value.dtype != expected[key].dtype:
            raise StateMismatchError(
                f"{argument}[{key!r}] is {value.dtype}; {reference} has {expected[key].dtype}. "
                "Convert one of them first: nothing is cast in silence"
            )


def check_finite(state: Tensors, argument: str) -> None:
    """Raise `NonFiniteError` naming the first tensor that holds NaN or infinity."""
    for key, value in state.items():
        if value.is_floating_point() and not all_finite(value):
            count = int((~torch.isfinite(wide(value))).sum())
            raise NonFiniteError(f"{argument}[{key!r}] holds {count} non-finite entries; expected finite numbers")


def all_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite."""
    if tensor.is_floating_point() and tensor.element_size() > 1 and not is_sharded(tensor):
        # the fastest look there is; large entries may add up to infinity
        if math.isfinite(tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
            return True
    low, high = extrema(tensor)
    return math.isfinite(low) and math.isfinite(high)


def overflows(wider: Tensor, narrow: Tensor) -> bool:
    """Whether something finite became infinite in the narrower dtype; what was infinite before may stay so."""
    wider = wide(wider.detach())
    if narrow.dtype == torch.float8_e4m3fn:  # has no infinity: torch takes the largest number instead
        low, high = extrema(wider)
        if max(-low, high) <= 464:  # what is larger would be rounded to more than 448
            return False
        lost = torch.isfinite(wider) & (wider.abs() > 464)
    elif all_finite(narrow):
        return False
    else:
        lost = torch.isfinite(wider) & ~torch.isfinite(wide(narrow))
    return bool(full(lost).any())


def unclipped(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor`, ready for a dtype: NaN where a dtype without infinity would take its largest number instead."""
    return torch.where(tensor.abs() > 464, torch.nan, tensor) if dtype == torch.float8_e4m3fn else tensor


def extrema(tensor: Tensor) -> tuple[float, float]:
    """The smallest and largest entry, (0, 0) if there is none; one pass, no mask, and NaN if there is a NaN."""
    if is_sharded(tensor):
        return _extrema_of_all(tensor)
    if tensor.numel() == 0:
        return 0.0, 0.0
    low, high = torch.aminmax(wide(tensor.detach()) if tensor.element_size() == 1 else tensor.detach())
    return float(low), float(high)


def _extrema_of_all(tensor: Tensor) -> tuple[float, float]:
    """The same for a DTensor: what all processes find together."""
    part = local(tensor)
    low, high = extrema(part) if part.numel() else (math.inf, -math.inf)
    nan = math.isnan(low) or math.isnan(high)
    found = [0.0, -math.inf, -math.inf] if nan else [-1.0, -low, high]
    nan_found, low, high = largest_of_all(found, tensor)
    if not tensor.numel():
        return 0.0, 0.0
    return (math.nan, math.nan) if nan_found >= 0 else (-low, high)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: half precision is for storage."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


def as_vectors(
    vectors: Iterable[Mapping[str, Any]], argument: str, door: Door | None = None
) -> list[dict[str, Tensor]]:
    """A list of dicts with the same keys, shapes and kinds of entries; an error unless there is at least one."""
    if isinstance(vectors, Mapping | str | bytes | Tensor | nn.Module) or not isinstance(vectors, Iterable):
        raise TypeError(
            f"{argument}: expected a sequence of mappings of name -> tensor, got a single {type(vectors).__name__}"
        )
    states = []
    for index, vector in enumerate(vectors):
        if not isinstance(vector, Mapping):
            raise TypeError(f"{argument}[{index}]: expected a mapping of name -> tensor, got {type(vector).__name__}")
        states.append(_checked(vector, f"{argument}[{index}]", door))
    if not states:
        raise InputError(f"{argument}: expected at least one mapping of name -> tensor, got an empty sequence")
    kinds = {key: is_bendable(key, tensor.dtype) for key, tensor in states[0].items()}
    for index, state in enumerate(states[1:], 1):
        check_keys(state, states[0], f"{argument}[{index}]", f"{argument}[0]", ALIGNED)
        check_shapes(state, states[0], f"{argument}[{index}]", f"{argument}[0]")
        for key, tensor in state.items():
            if is_bendable(key, tensor.dtype) != kinds[key]:
                raise StateMismatchError(
                    f"{argument}[{index}][{key!r}] is {tensor.dtype}; {argument}[0] has {states[0][key].dtype}"
                )
    return states


def identity(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are the same view of the same memory: tied parameters."""
    if tensor.numel() == 0 or tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return id(tensor)
    return (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())


def memory_of(tensor: Tensor) -> tuple[str, int, int]:
    """Device, address of the first byte, and of the byte after the last; these are the same for an empty tensor."""
    start = tensor.data_ptr()
    if tensor.is_contiguous() or not tensor.numel():
        return str(tensor.device), start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), start, start + (last + 1) * tensor.element_size()


def map_tied(function: Callable[..., Tensor], keys: Iterable[str], *states: Tensors) -> dict[str, Tensor]:
    """``{key: function(states[0][key], states[1][key], ...)}``, where entries tied in *all* states stay tied."""
    known: dict[Hashable, tuple[Tensor, tuple[Tensor, ...]]] = {}
    result = {}
    for key in keys:
        tensors = tuple(state[key] for state in states)
        memory = tuple(identity(tensor) for tensor in tensors)
        if memory not in known:
            known[memory] = function(*tensors), tensors  # kept alive: freed memory would be taken for a tie
        result[key] = known[memory][0]
    return result


def select_names(names: Iterable[str], patterns: str | Iterable[str], argument: str) -> list[str]:
    """The `names` that match at least one of `patterns`: a name, or a glob such as ``"*.attn.*"``.

    A pattern that matches nothing is an error, because it is most likely a misspelt one.
    """
    known = list(names)
    exact = set(known)
    chosen: set[str] = set()
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{argument}: expected names or glob patterns, got {type(patterns).__name__}")
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: expected names or glob patterns, got {type(pattern).__name__}")
        matches = {pattern} if pattern in exact else {name for name in known if fnmatchcase(name, pattern)}
        if not matches:
            raise InputError(f"{argument}: {pattern!r} matches none of the {len(known)} names: {quoted(known, 8)}")
        chosen |= matches
    return [name for name in known if name in chosen]


def heuristic_scale(num_tasks: int) -> float:
    r"""The scale :math:`\lambda_N` of task arithmetic when none is tuned: 1 for one task, 0.3 from two on.

    Task arithmetic reports .3 to .5 as the values that hold across numbers of tasks without tuning, and R-MTLLMF
    (eq. 6) uses a scale that depends on the number of tasks only.

    Args:
        num_tasks: the number of task vectors that are added up, at least 1.

    Raises:
        InputError: `num_tasks` is less than 1.
        TypeError: `num_tasks` is not an int.

    Source: Ilharco et al., "Editing models with task arithmetic", 2023, section 4.2; R-MTLLMF eq. 6.

    Example:
        >>> from rmtllmf.taskvec import heuristic_scale
        >>> heuristic_scale(1), heuristic_scale(8)
        (1.0, 0.3)
    """
    return 1.0 if whole_number(num_tasks, "num_tasks", at_least=1) == 1 else 0.3


def finite_number(value: object, argument: str, *, positive: bool = False) -> float:
    """`value` as a float; an error unless it is one finite (and, on request, positive) real number."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        if value.ndim:
            raise ShapeError(f"{argument}: expected one number, got an array of shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument}: expected a real number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (positive and number <= 0):
        raise InputError(f"{argument}: expected a {'positive ' if positive else ''}finite number, got {number}")
    return number


def whole_number(value: object, argument: str, *, at_least: int) -> int:
    """`value` as an int; an error unless it is a whole number that is large enough."""
    if isinstance(value, bool | np.bool_ | Tensor | np.ndarray) or not hasattr(value, "__index__"):
        raise TypeError(f"{argument}: expected an int, got {type(value).__name__}")
    number = index_of(value)
    if number < at_least:
        raise InputError(f"{argument}: expected a whole number of at least {at_least}, got {number}")
    return number


_ROW = 4096  # entries summed at once
_ROWS = 64  # rows converted to float64 at once


def inner_product(left: Tensor, right: Tensor) -> float:
    """Sum of products in float64, over fixed rows, each summed by one thread: the same bits for any number of them."""
    same = left is right
    left, right = full(left), full(right)
    left, right = left.detach().reshape(-1), right.detach().reshape(-1)
    whole = left.numel() // _ROW
    parts: list[float] = []
    for start in range(0, whole * _ROW, _ROW * _ROWS):
        cut = slice(start, min(start + _ROW * _ROWS, whole * _ROW))
        block = left[cut].view(-1, _ROW).to(torch.float64)
        parts += (block * (block if same else right[cut].view(-1, _ROW).to(torch.float64))).sum(-1).tolist()
    rest = left[whole * _ROW :].to(torch.float64)
    parts.append(float((rest * right[whole * _ROW :].to(torch.float64)).sum()))
    return math.fsum(parts) if all(map(math.isfinite, parts)) else math.nan
