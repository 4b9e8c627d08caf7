"""A copy of a model whose linear layers are replaced by others, made of what every vector changes in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._call import check_model
from ..._state import Tensors, all_finite, is_bendable, quoted, select_names, wide
from ..._threads import share_out
from ...errors import NonFiniteError, StateMismatchError
from .._models import applied
from .._sources import Source
from ..rules._spectral import leading, rounding_level, scaled
from ._attention import OpenAttention, can_open

__all__ = ["Change", "factored", "routed_copy", "swapped"]


class Change(NamedTuple):
    """What one vector changes in a linear layer: weight (m, n) and bias (m,), None where there is none."""

    weight: Tensor
    bias: Tensor | None


class _Part(NamedTuple):
    """A linear layer of the copy, and the names (and rows) of its weight and bias in the vectors."""

    module: nn.Linear
    weight: str
    bias: str
    rows: slice


Make = Callable[[nn.Linear, list[Change]], nn.Module]


def routed_copy(
    model: nn.Module, sources: Sequence[Source], make: Make, *, rest: Tensors | None, skip: str | Iterable[str]
) -> nn.Module:
    """A frozen copy of `model` with ``make(layer, changes)`` for every linear layer that a vector changes.

    ``nn.MultiheadAttention`` counts as four of them. `rest` is an update, which is applied to everything else.
    """
    check_model(model)
    specs = {key: spec for key, spec in sources[0].specs.items() if is_bendable(key, spec.dtype)}
    skipped = set(select_names(specs, skip, "skip"))
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    if unknown := set(specs) - set(state):
        raise StateMismatchError(f"model lacks {quoted(unknown)}, which the vectors change")
    for key, spec in specs.items():
        if spec.shape != tuple(state[key].shape):
            raise StateMismatchError(f"vectors[0][{key!r}] has shape {spec.shape}; model has {tuple(state[key].shape)}")
    changed = {key for key in specs if key not in skipped}
    copy = deepcopy(model).requires_grad_(False)
    chosen = [(prefix, module) for prefix, module in _routable(copy) if _names(prefix, module) & changed]
    routed = {key for prefix, module in chosen for key in _names(prefix, module)}
    left = {key: tensor for key, tensor in (rest or {}).items() if key not in routed | skipped}
    if left:
        applied(left, copy, 1.0)
    swaps: dict[int, nn.Module] = {}
    parts: list[_Part] = []
    for prefix, module in chosen:
        if isinstance(module, nn.Linear):
            parts.append(_Part(module, prefix + "weight", prefix + "bias", slice(None)))
        else:
            swaps[id(module)] = opened = OpenAttention(module)
            parts += _parts_of(opened, prefix, whole=module.in_proj_weight is not None)

    def worker() -> Callable[[_Part], None]:
        def work(part: _Part) -> None:
            changes = [_change(source, part, changed) for source in sources]
            if any(bool(tensor.any()) for change in changes for tensor in change if tensor is not None):
                swaps[id(part.module)] = make(part.module, changes).train(part.module.training)

        return work

    parts.sort(key=lambda part: (-part.module.weight.numel(), part.weight, part.rows.start or 0))
    share_out(worker, parts, alone=any(part.module.weight.device.type != "cpu" for part in parts))
    return swapped(copy, swaps)


def factored(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors of a matrix (m, n), as rows (count, n), left ones times their values (count, m).

    Rows are zero where only rounding is left.
    """
    (part,), unit = scaled([matrix])
    U, s, V = leading(part, count, rounding_level([part]), part.dtype, quick=True)
    right, left = (matrix.new_zeros(count, size) for size in reversed(matrix.shape))
    right[: len(s)] = V.mT
    left[: len(s)] = (U * (s * unit)).mT
    return right, left


def _routable(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.MultiheadAttention]]:
    """Prefix and module of all that can be replaced: no other kind of layer, no matrix that two modules share."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    inside: set[int] = set()  # of attention: its layers are never called
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside.update(id(child) for child in module.modules())
            usable = type(module).forward is nn.MultiheadAttention.forward and can_open(module)
        else:
            usable = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
            weight = module._parameters.get("weight")
            usable = usable and id(module) not in inside and weight is not None and weight.numel() > 0
        if usable and all(len(owners[id(parameter)]) == 1 for parameter in module.parameters()):
            assert isinstance(module, nn.Linear | nn.MultiheadAttention)
            yield (f"{name}." if name else ""), module


def _names(prefix: str, module: nn.Module) -> set[str]:
    return {prefix + key for key, _ in module.named_parameters()}


def _parts_of(opened: OpenAttention, prefix: str, *, whole: bool) -> list[_Part]:
    parts = [_Part(opened.out, prefix + "out_proj.weight", prefix + "out_proj.bias", slice(None))]
    for index, letter in enumerate("qkv"):
        layer = getattr(opened, letter)
        rows = slice(index * layer.out_features, (index + 1) * layer.out_features)
        weight = "in_proj_weight" if whole else f"{letter}_proj_weight"
        parts.append(_Part(layer, prefix + weight, prefix + "in_proj_bias", rows))
    return parts


def _change(source: Source, part: _Part, changed: set[str]) -> Change:
    layer = part.module

    def read(key: str, like: Tensor) -> Tensor:
        if key not in changed:
            return torch.zeros_like(wide(like))
        whole = source.whole(key)
        whole = whole[part.rows] if len(whole) != len(like) else whole
        if not all_finite(whole):
            count = int((~torch.isfinite(whole)).sum())
            raise NonFiniteError(f"{source.label}[{key!r}] holds {count} non-finite entries; expected finite numbers")
        return whole.to(like.device)

    return Change(read(part.weight, layer.weight), None if layer.bias is None else read(part.bias, layer.bias))


def swapped(model: nn.Module, swaps: dict[int, nn.Module]) -> nn.Module:
    """`model` with the modules of these ids replaced, in place; what replaces it, if it is one of them itself."""
    for module in [*model.modules(), *swaps.values()]:
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in swaps:
                module._modules[name] = swaps[id(child)]
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # else torch takes matrices past their layers
    return swaps.get(id(model), model)
