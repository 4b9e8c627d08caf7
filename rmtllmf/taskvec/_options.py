"""What every fusion rule can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from .._state import finite_number, quoted
from ..errors import InputError, ShapeError

Weights: TypeAlias = Sequence[float] | Tensor | Mapping[str, float | Sequence[float] | Tensor]


_SCALES_AND_PACKED = ("float8_e8m0fnu", "float4_e2m1fn_x2")  # of microscaling formats


class FusionOptions(TypedDict, total=False):
    r"""Keyword arguments that every rule takes beside its own.

    Attributes:
        weights: a number for each vector; or, for weights per layer, a mapping of name or glob pattern -> a number or N
            of them, of which the first that matches a name counts (1 where none does; a pattern that matches nothing is
            an error). A vector of weight w is fused as :math:`w \tau`, unless the rule says otherwise.
        skip: names or glob patterns that are left alone: the update does not name them, so they stay as in the base.
            In `fuse` and `fuse_files`, models need not agree about them.
        dtype: of the result; by default that of the vectors, the wider one where they differ.
        compute_dtype: torch.float32 or torch.float64, in which is calculated; by default float32, and float64 for
            entries that are.
        out: a mapping of name -> tensor, with exactly the names and shapes of the update, that is written to and that
            the update is made of: no fresh memory is needed. Must not share memory with the vectors, none of which
            may require gradients.
        progress: show a progress bar.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import task_arithmetic
        >>> a, b = ({"attn": torch.ones(1), "mlp": torch.ones(1)} for _ in range(2))
        >>> dict(task_arithmetic([a, b], 1.0, weights={"attn": [0.5, 0.0]}))
        {'attn': tensor([0.5000]), 'mlp': tensor([2.])}
        >>> dict(task_arithmetic([a, b], 1.0, skip="a*"))
        {'mlp': tensor([2.])}
    """

    weights: Weights | None
    skip: str | Iterable[str]
    dtype: torch.dtype | None
    compute_dtype: torch.dtype | None
    out: MutableMapping[str, Tensor] | None
    progress: bool


def checked_options(options: Mapping[str, Any]) -> FusionOptions:
    """Raise for a keyword that is none."""
    unknown = set(options) - set(FusionOptions.__annotations__)
    if unknown:
        raise TypeError(
            f"unexpected keyword {quoted(unknown)}; beside the rule's own there are "
            f"{quoted(FusionOptions.__annotations__, 9)}"
        )
    checked_dtype(options.get("dtype"))
    compute = checked_dtype(options.get("compute_dtype"), "compute_dtype")
    if compute not in (None, torch.float32, torch.float64):
        raise InputError(f"compute_dtype: expected torch.float32 or torch.float64, got {compute}")
    return FusionOptions(**options)  # type: ignore[typeddict-item]


def checked_dtype(value: object, argument: str = "dtype") -> torch.dtype | None:
    """Raise unless it is None, or a floating-point dtype with a sign and a number in each entry."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"{argument}: expected a floating-point torch.dtype or None, got {value!r}")
    if str(value).removeprefix("torch.") in _SCALES_AND_PACKED:
        raise InputError(f"{argument}: expected a dtype that holds any number, got {value}")
    return value


def plain_number(value: object, argument: str) -> float:
    """A finite number; an error for one that gradients should flow to."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise InputError(f"{argument}: gradients do not flow through it; pass {argument}.detach()")
    return finite_number(value, argument)


def weights_of(weights: Weights | None, count: int, keys: Sequence[str]) -> Callable[[str], list[float]]:
    """Name -> a weight for each of `count` vectors."""
    if weights is None:
        plain = [1.0] * count
        return lambda key: plain
    if not isinstance(weights, Mapping):
        same = _numbers(weights, count, "weights")
        return lambda key: same
    for pattern in weights:
        if not isinstance(pattern, str):
            raise TypeError(f"weights: expected names or glob patterns as keys, got {type(pattern).__name__}")
    patterns = [(pattern, _numbers(value, count, f"weights[{pattern!r}]")) for pattern, value in weights.items()]
    table: dict[str, list[float]] = {}
    used: set[str] = set()
    for key in keys:
        for pattern, numbers in patterns:
            if key == pattern or fnmatchcase(key, pattern):
                used.add(pattern)
                table.setdefault(key, numbers)
        table.setdefault(key, [1.0] * count)
    for pattern, _ in patterns:
        if pattern not in used:
            raise InputError(f"weights: {pattern!r} matches none of the {len(keys)} names: {quoted(keys, 8)}")
    return table.__getitem__


def _numbers(value: Any, count: int, argument: str) -> list[float]:
    if isinstance(value, Tensor) and value.requires_grad:
        raise InputError(f"{argument}: gradients do not flow through the weights; pass weights.detach()")
    if isinstance(value, set | frozenset | Mapping):
        raise TypeError(f"{argument}: expected a number or numbers in order, got {type(value).__name__}")
    if isinstance(value, str | bytes) or not (isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0):
        if argument == "weights":
            raise TypeError(f"weights: expected {count} numbers or a mapping, got {type(value).__name__}")
        return [finite_number(value, argument)] * count
    numbers = [finite_number(number, f"{argument}[{index}]") for index, number in enumerate(value)]
    if len(numbers) != count:
        raise ShapeError(f"{argument}: expected {count} numbers, one for each vector, got {len(numbers)}")
    return numbers


def one_or_each(value: float | Iterable[float], argument: str, count: int) -> list[float]:
    """A finite number for each vector, from one for all or as many as there are."""
    if isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", None) != 0:
        numbers = [finite_number(number, f"{argument}[{index}]") for index, number in enumerate(value)]
    else:
        numbers = [finite_number(value, argument)] * count
    if len(numbers) != count:
        raise ShapeError(f"{argument}: expected one number or {count}, one for each vector, got {len(numbers)}")
    return numbers
