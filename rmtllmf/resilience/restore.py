"""Put chosen parameters of a fused model back to what they were in the base model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .._state import StateLike, as_state, check_dtypes, check_shapes, identity, map_tied, quoted, select_names
from ..errors import StateMismatchError

__all__ = ["restore"]


def restore(state: StateLike, base: StateLike, keys: str | Iterable[str]) -> dict[str, Tensor]:
    r"""The parameters of `state`, except that those named by `keys` are the base model's.

    .. math:: \theta_j \leftarrow \theta_{\text{base}, j} \quad \text{for } j \in \mathcal{E}

    Args:
        state: the fused model: a module, a state dict or the path of a checkpoint.
        base: the base model, likewise.
        keys: names or glob patterns (``"visual.*embedding*"``), matched against the names of `state`. A name that
            shares its memory with another in `state` brings the other along, so that ties hold.

    Returns:
        A new dict with the keys of `state`, in its order. Restored tensors are copies on the device of `state`, tied
        where they were tied in both; all others are the tensors of `state` themselves.

    Raises:
        InputError: a pattern matches nothing.
        StateMismatchError: a key is missing in `base`, or has another shape or dtype there.

    Source: R-MTLLMF, section III, step "reload the frozen parameters".

    Example:
        >>> import torch
        >>> fused = {"embed.weight": torch.ones(2), "mlp.weight": torch.ones(2)}
        >>> base = {"embed.weight": torch.zeros(2), "mlp.weight": torch.zeros(2)}
        >>> restore(fused, base, ["embed.*"])
        {'embed.weight': tensor([0., 0.]), 'mlp.weight': tensor([1., 1.])}
    """
    fused, original = as_state(state, "state"), as_state(base, "base")
    named = select_names(fused, keys, "keys")
    memory = {identity(fused[key]) for key in named}
    chosen = {key: fused[key] for key in fused if identity(fused[key]) in memory}
    missing = chosen.keys() - original.keys()
    if missing:
        raise StateMismatchError(f"base lacks {quoted(missing)}, which keys ask to restore")
    check_shapes(chosen, original, "state", "base")
    check_dtypes(chosen, original, "state", "base")
    return {**fused, **map_tied(_copy, chosen, chosen, original)}


def _copy(fused: Tensor, original: Tensor) -> Tensor:
    return original.detach().to(fused.device, copy=True)
