"""A batch of inputs: how many there are, and one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError, ShapeError

__all__ = ["batch_size", "single"]


def batch_size(inputs: Any) -> int:
    """The common leading dimension of a tensor, or of all tensors of a tuple, list or mapping."""
    parts = _tensors(inputs)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"inputs: expected tensors with a leading batch dimension, got {type(part).__name__}")
    sizes = {part.shape[0] if part.ndim else None for part in parts}
    if len(sizes) != 1 or None in sizes:
        raise ShapeError(f"inputs: expected one leading batch dimension, got {[tuple(part.shape) for part in parts]}")
    (size,) = sizes
    if not size:
        raise InputError("inputs: expected at least one input, got an empty batch")
    return int(size)


def single(inputs: Any, index: int) -> Any:
    """A batch of one."""
    if isinstance(inputs, Tensor):
        return inputs[index : index + 1]
    if isinstance(inputs, Mapping):
        return {name: part[index : index + 1] for name, part in inputs.items()}
    return tuple(part[index : index + 1] for part in inputs)


def _tensors(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]
