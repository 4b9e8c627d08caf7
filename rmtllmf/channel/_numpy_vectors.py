"""NumPy vectors at the door: tensors that share their memory inside, and NumPy arrays again on the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arrays import Array, refuse_masked

Vector: TypeAlias = Mapping[str, Array]
"""A mapping of name -> tensor, or of name -> NumPy array."""


@dataclass
class ArrayDoor:
    """Replaces arrays by tensors, mapping by mapping, and remembers which kind came in: all must be of one."""

    array: str = ""  # the first of each kind, for an error to name
    tensor: str = ""
    made: dict[int, tuple[object, Tensor]] = field(default_factory=dict)  # one array, one tensor: ties stay ties

    def __call__(self, state: Mapping[Any, Any], argument: str) -> dict[Any, Any]:
        """The mapping with tensors in place of its arrays; what is neither is left to others."""
        result = {}
        for key, value in state.items():
            name = f"{argument}[{key!r}]"
            if isinstance(value, np.ndarray):
                self.array = self.array or name
                if id(value) not in self.made:
                    self.made[id(value)] = value, _tensor_of(value, name)
                value = self.made[id(value)][1]
            elif isinstance(value, Tensor):
                self.tensor = self.tensor or name
            if self.array and self.tensor:
                raise TypeError(
                    f"{self.array} is a NumPy array, but {self.tensor} is a tensor; expected one kind "
                    "(torch.from_numpy makes tensors of arrays)"
                )
            result[key] = value
        return result


def arrays_of(vector: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """A result as NumPy arrays, without copies."""
    return {key: tensor.numpy() for key, tensor in vector.items()}


def _tensor_of(array: NDArray[Any], name: str) -> Tensor:
    """In the same memory where torch can: it knows neither read-only, nor byte-swapped, nor reversed arrays."""
    refuse_masked(array, name)
    native = array.dtype.newbyteorder("=")
    if (
        not array.flags.writeable
        or array.dtype != native
        or any(step % array.itemsize or step < 0 for step in array.strides)
    ):
        array = np.array(array, dtype=native, order="C")
    try:
        return torch.from_numpy(np.asarray(array))
    except TypeError:
        raise TypeError(f"{name}: expected an array of numbers that torch knows, got dtype {array.dtype}") from None
