"""A routed model from its state dict or file, without the vectors that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from ..._call import check_model
from ..._state import StateLike, as_state, check_keys, check_shapes
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
        StateMismatchError: `source` is of no routed model, or of one of another base.

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
    for name in experts:
        prefix, layer = f"{name}." if name else "", layers.get(name)
        if not isinstance(layer, nn.Linear):
            raise StateMismatchError(f"source has experts for {name!r}, which is no linear layer of model")
        right, left, shift = inner[prefix + "right"], inner[prefix + "left"], inner.get(prefix + "shift")
        if twin:
            swaps[id(layer)] = TwinLinear(layer, right, left, shift, mixture)
        else:
            gate_rank, top_k = inner[prefix + "routing"].tolist()
            swaps[id(layer)] = SmileLinear(layer, right, left, shift, gate_rank, top_k)
    result = swapped(copy, swaps)
    if twin:
        count = right.shape[1]  # of any layer
        result = TwinMerged(result, count, mixture, router or _router(state), embed)
    own = result.state_dict()
    check_keys(state, own, "source", "model with its experts")
    check_shapes(state, own, "source", "model with its experts")
    result.load_state_dict(state)
    return result.train(model.training)


def _is_open(name: str, module: nn.Module, state: dict[str, Tensor]) -> bool:
    prefix = f"{name}." if name else ""
    return isinstance(module, nn.MultiheadAttention) and prefix + "q.weight" in state


def _router(state: dict[str, Tensor]) -> nn.Module | None:
    first, last = state.get("router.0.weight"), state.get("router.8.weight")
    if first is None or last is None:
        return None
    return Router(first.shape[1], len(last), len(first)).to(first.device).requires_grad_(False)
