"""What a coefficient is divided by before it becomes half a symbol."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .._state import Tensors, all_finite, extrema, finite_number, inner_product
from ..errors import InputError, NonFiniteError

SCALES = ("rms", "peak", "tensor_rms", "tensor_peak")


def scales(vector: Tensors, keys: Sequence[str], scale: str | float, argument: str) -> dict[str, float]:
    """The scale of every tensor of one vector; checks on the way that the entries are finite."""
    if not isinstance(scale, str):
        number = finite_number(scale, "scale", positive=True)
        for key in keys:
            if not all_finite(vector[key]):
                raise _non_finite(argument, key)
        return dict.fromkeys(keys, number)
    if scale not in SCALES:
        raise InputError(f"scale: expected one of {', '.join(map(repr, SCALES))} or a positive number, got {scale!r}")
    measure = _sum_of_squares if scale.endswith("rms") else _peak
    measured = {}
    for key in keys:
        measured[key] = measure(vector[key])
        if not math.isfinite(measured[key]):
            raise _non_finite(argument, key)
    if scale.startswith("tensor"):
        found = {
            key: math.sqrt(value / vector[key].numel()) if scale.endswith("rms") else value
            for key, value in measured.items()
            if vector[key].numel() > 0
        }
        for key, value in found.items():
            if value == 0:
                raise InputError(
                    f"{argument}[{key!r}] is all zero and cannot be normalised; use scale='rms' or 'peak' of the "
                    "whole vector, a number, or leave the tensor out"
                )
        return {key: found.get(key, 1.0) for key in keys}
    if scale == "rms":
        whole = math.sqrt(math.fsum(measured.values()) / max(1, sum(vector[key].numel() for key in keys)))
    else:
        whole = max(measured.values(), default=0.0)
    if whole == 0:
        raise InputError(f"{argument} is all zero and cannot be normalised; use a number as scale, or leave it out")
    return dict.fromkeys(keys, whole)


def _non_finite(argument: str, key: str) -> NonFiniteError:
    return NonFiniteError(f"{argument}[{key!r}] holds NaN or infinity; expected finite numbers")


def _peak(tensor: Tensor) -> float:
    low, high = extrema(tensor)
    return max(abs(low), abs(high)) if math.isfinite(low) and math.isfinite(high) else math.nan


def _sum_of_squares(tensor: Tensor) -> float:
    return inner_product(tensor, tensor)
