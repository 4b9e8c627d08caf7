"""A routed model from its state dict or file, without the vectors that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._call import check_model
from ..._state import StateLike, as_state, check_finite, check_keys, check_shapes, quoted
from ...errors import StateMismatchError
from ._attention import OpenAttention
from ._replace import swapped
from .smile import SmileLinear
from .train_router import Router
from .twin_merging import TwinLinear, TwinMerged, mixture_of

__all__ = ["load_routed"]


def load_routed(
    model: nn.Module,
    source: StateLike,
    *,
    router: nn.Module | None = None,
    embed: Callable[[Any], Tensor] | None = None,
) -> nn.Module:
    """The result of `smile` or `twin_merging` again, from what was saved of it.

    Args:
        model: one of the class and shapes of the base model, whose parameters do not matter. Not written to.
        source: the routed model's state dict, or the path of a safetensors file of it, such as
            ``safetensors.torch.save_model(routed, path)`` writes.
        router, embed: as for `twin_merging`; a router from `train_router` need not be given.

    Returns:
        The routed model, in the mode of `model`.

    Raises:
        StateMismatchError: `source` is of no routed model, of one of another base, or contradicts itself.
        InputError: the file is damaged. NonFiniteError: NaN or infinity in a parameter, an expert or the router.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import smile
        >>> vectors = [{"weight": torch.ones(2, 3)}, {"weight": -torch.ones(2, 3)}]
        >>> routed = smile(nn.Linear(3, 2), vectors, rank=1, gate_rank=1)
        >>> again = load_routed(nn.Linear(3, 2), routed.state_dict())
        >>> x = torch.ones(4, 3)
        >>> torch.equal(again(x), routed(x))
        True
    """
    check_model(model)
    state = as_state(source, "source")
    copy = deepcopy(model).requires_grad_(False)
    twin = not any(key.rpartition(".")[2] == "routing" for key in state)
    inner = state
    if twin:
        inner = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    experts = {key.rpartition(".")[0] for key in inner if key.rpartition(".")[2] == "right"}
    if not experts:
        raise StateMismatchError("source: holds no experts; expected the state of what smile or twin_merging returned")
    copy = swapped(copy, {id(m): OpenAttention(m) for name, m in copy.named_modules() if _is_open(name, m, inner)})
    mixture = mixture_of(model)
    layers = dict(copy.named_modules())
    swaps: dict[int, nn.Module] = {}
    experts_of: dict[str, _Experts] = {}
    for name in sorted(experts):
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear):
            raise StateMismatchError(f"source has experts for {name!r}, which is no linear layer of model")
        experts_of[name] = _experts(inner, name, layer, twin=twin)
        right, left, shift, routing = experts_of[name]
        if routing is None:
            swaps[id(layer)] = TwinLinear(layer, right, left, shift, mixture)
        else:
            swaps[id(layer)] = SmileLinear(layer, right, left, shift, *routing)
    counts = {parts.right.shape[1 if twin else 0] for parts in experts_of.values()}
    if len(counts) > 1:
        raise StateMismatchError(f"source: its layers have {sorted(counts)} experts; expected the same number in all")
    result = swapped(copy, swaps)
    if twin:
        (count,) = counts
        result = TwinMerged(result, count, mixture, router or _router(state, count), embed)
    own = result.state_dict()
    check_keys(state, own, "source", "model with its experts")
    check_shapes(state, own, "source", "model with its experts")
    for key, tensor in state.items():
        if tensor.is_floating_point() != own[key].is_floating_point():
            raise StateMismatchError(f"source[{key!r}] is {tensor.dtype}; model with its experts has {own[key].dtype}")
    check_finite({key: state[key] for key, _ in result.named_parameters() if key in state}, "source")
    result.load_state_dict(state)
    return result.train(model.training)


def _is_open(name: str, module: nn.Module, state: dict[str, Tensor]) -> bool:
    prefix = f"{name}." if name else ""
    return isinstance(module, nn.MultiheadAttention) and prefix + "q.weight" in state


class _Experts(NamedTuple):
    """What the state of a routed layer holds beside the layer's own; no routing for `TwinLinear`."""

    right: Tensor
    left: Tensor
    shift: Tensor | None
    routing: tuple[int, int] | None


def _experts(state: dict[str, Tensor], name: str, layer: nn.Linear, *, twin: bool) -> _Experts:
    """Those of a layer, if they fit it and each other."""
    prefix = f"{name}." if name else ""
    needed = ["right", "left"] if twin else ["right", "left", "routing"]
    if missing := {prefix + part for part in needed} - set(state):
        raise StateMismatchError(f"source lacks {quoted(missing)}, which belongs to the experts of {name!r}")
    own = {key: state[key] for key in (prefix + "weight",) if key in state}
    check_shapes(own, dict.fromkeys(own, layer.weight), "source", "model with its experts")
    right, left, shift = state[prefix + "right"], state[prefix + "left"], state.get(prefix + "shift")
    found = {prefix + "right": right, prefix + "left": left} | ({} if shift is None else {prefix + "shift": shift})
    for key, tensor in found.items():
        if not tensor.is_floating_point():
            raise StateMismatchError(f"source[{key!r}] is {tensor.dtype}; expected floating-point entries")
    check_finite(found, "source")
    m, n = layer.weight.shape
    fits = right.ndim == left.ndim == 3 and min(*right.shape, *left.shape) > 0
    if twin:
        count = right.shape[1] if fits else 0
        fits = fits and right.shape[2] == n and tuple(left.shape) == (right.shape[0], count, m)
    else:
        count = len(right) if fits else 0
        fits = fits and right.shape[2] == n and left.shape[:2] == (count, m) and left.shape[2] <= right.shape[1]
    if not fits or (shift is not None and tuple(shift.shape) != (count, m)):
        shapes = ", ".join(f"{key!r} {tuple(tensor.shape)}" for key, tensor in found.items())
        raise StateMismatchError(f"source has {shapes}, which do not fit each other and a layer ({m}, {n})")
    return _Experts(right, left, shift, None if twin else _routing(state[prefix + "routing"], prefix, right))


def _routing(routing: Tensor, prefix: str, right: Tensor) -> tuple[int, int]:
    numbers = routing.tolist() if routing.dtype == torch.int64 and tuple(routing.shape) == (2,) else [0, 0]
    count, most = right.shape[:2]
    if not (1 <= numbers[0] <= most and 1 <= numbers[1] <= count):
        raise StateMismatchError(
            f"source[{prefix + 'routing'!r}] is {routing.flatten()[:4].tolist()} of shape {tuple(routing.shape)}; "
            f"expected a gate rank of 1 to {most} and a number of experts of 1 to {count}"
        )
    return numbers[0], numbers[1]


def _router(state: dict[str, Tensor], count: int) -> nn.Module | None:
    """That of `train_router`, if there is one: nothing is made that is larger than what is there."""
    parts = {f"router.{index}.weight": state.get(f"router.{index}.weight") for index in (0, 4, 8)}
    first, middle, last = parts.values()
    if first is None or middle is None or last is None:
        return None
    check_finite({key: tensor for key, tensor in state.items() if key.startswith("router.")}, "source")
    hidden = middle.shape[0] if middle.ndim == 2 else 0
    fits = first.ndim == 2 and first.shape[0] == hidden and first.numel() > 0
    if not fits or tuple(middle.shape) != (hidden, hidden) or tuple(last.shape) != (count, hidden):
        shapes = ", ".join(f"{key!r} {tuple(tensor.shape)}" for key, tensor in state.items() if key in parts)
        raise StateMismatchError(f"source has {shapes}, which make no router between {count} experts")
    return Router(first.shape[1], count, hidden).to(first.device).requires_grad_(False)
