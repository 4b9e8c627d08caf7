"""The variance that a disturbance test tolerates, for every parameter of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .._state import Tensors, check_finite, finite_number, identity, is_bendable, quoted
from ..errors import InputError, ShapeError

__all__ = ["Tolerated", "Variance", "variances_of"]

Variance: TypeAlias = float | Tensor
Tolerated: TypeAlias = float | Mapping[str, float | Tensor]


def variances_of(model: nn.Module, state: Tensors, tolerated: Tolerated) -> dict[str, Variance]:
    """Name -> variance where it is positive; tied entries under the last of their names, as in `WithState`.

    A variance is a number, or a float64 tensor of the shape of its entry and on its device.
    """
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    last = {identity(tensor): name for name, tensor in own.items()}
    bendable = [name for name in state if is_bendable(name, state[name].dtype)]
    if isinstance(tolerated, Mapping):
        unknown = [str(name) for name in tolerated if name not in bendable]
        if unknown:
            raise InputError(
                f"tolerated_variance: {quoted(unknown)} is no floating-point entry of the model, which has "
                f"{quoted(bendable, 8)}"
            )
        named = {name: _of_entry(value, state[name], name) for name, value in tolerated.items()}
    else:
        named = dict.fromkeys(bendable, _number(tolerated, "tolerated_variance"))
    result: dict[str, Variance] = {}
    for name, value in named.items():
        kept = last[identity(own[name])]
        if not _same(result.setdefault(kept, value), value):
            shown = value if isinstance(value, float) else "the tensor"
            raise InputError(f"tolerated_variance[{name!r}]: {shown} differs from that of {kept!r}, its tied twin")
    return {name: value for name, value in result.items() if bool(torch.as_tensor(value).any())}


def _same(left: Variance, right: Variance) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return bool((torch.as_tensor(left) == torch.as_tensor(right)).all())


def _of_entry(value: object, entry: Tensor, name: str) -> Variance:
    argument = f"tolerated_variance[{name!r}]"
    if not isinstance(value, Tensor) or not value.ndim:
        return _number(value, argument)
    if value.is_complex():
        raise TypeError(f"{argument}: expected real variances, got {value.dtype}")
    if value.shape != entry.shape:
        raise ShapeError(
            f"{argument}: expected one number or a tensor of the entry's shape {tuple(entry.shape)}, got "
            f"{tuple(value.shape)}"
        )
    variance = value.detach().to(entry.device, torch.float64)
    check_finite({name: variance}, "tolerated_variance")
    if bool((variance < 0).any()):
        raise InputError(f"{argument}: expected variances >= 0, got {float(variance.min())}")
    return variance


def _number(value: object, argument: str) -> float:
    number = finite_number(value, argument)
    if number < 0:
        raise InputError(f"{argument}: expected a variance >= 0, got {number}")
    return number
