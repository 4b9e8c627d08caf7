"""LiNeS: an update scaled by depth, so that the early layers stay close to the base."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..._sharded import is_sharded, local, same_layout
from ..._state import Tensors, as_state, check_finite, check_keys, finite_number, identity, is_bendable, quoted
from ...errors import InputError, StateMismatchError
from .._sinks import check_out
from .._sources import Spec
from ..vector import TaskVector
from ._depths import relative_depths

__all__ = ["lines"]


def lines(
    update: Tensors,
    *,
    beta: float = 1.0,
    alpha: float | None = None,
    depth: Mapping[str, float] | None = None,
    out: MutableMapping[str, Tensor] | None = None,
) -> TaskVector:
    r"""The update with every layer scaled in proportion to its depth.

    .. math:: \tau^{(l)} \leftarrow \Big( \alpha + \beta \, \frac{l - 1}{L - 1} \Big) \, \tau^{(l)}

    for the layers l = 1, ..., L. A transform of one vector, single or fused by any rule, not a rule for several. Early
    layers hold what all tasks share: leaving them close to the base loses less of it.

    Args:
        update: a `TaskVector` or any mapping of name -> tensor. Entries that are no parameters (integers, running
            statistics) are left out.
        beta: :math:`\beta`, from the first layer to the last. 1, as in the authors' example.
        alpha: :math:`\alpha`, the scale of the first layer; None: :math:`1 - \beta`, so that the last layer is
            kept as it is, as the source does for a single task. For a vector :math:`\tau` fused of N tasks it takes
            :math:`\alpha = \lVert \sum_q \tau_q \rVert_1 / (N \lVert \tau \rVert_1)`, which is 1 / N for a plain sum,
            and searches :math:`\beta` in (0, 1].
        depth: name or glob pattern -> relative depth :math:`(l - 1)/(L - 1)`, 0 for the first layer and 1 for the last,
            for names that are not recognised or to be treated otherwise; of several patterns the first counts.
        out: a mapping of name -> tensor that is written to and that the result is made of; may be `update` itself.

    Returns:
        A `TaskVector`, in the dtypes of `update`. Gradients flow, unless `out` is given.

    The depth of a name is the number in front of its block: ``resblocks.7.``, ``blocks.7.``, ``layers.7.``,
    ``encoder.layer.7.``, ``h.7.``, stages of blocks as in Swin, ConvNeXt and ResNet; every tower (prefix) counts for
    itself, and its highest number is its last layer, so do not leave out the last layers before. What is outside the
    blocks is scaled by :math:`\alpha` as the authors' code does: patch, position and token embeddings before them, and
    also final norms, projections and heads after them.

    Raises:
        InputError: names whose depth cannot be told, or that are tied but differ in depth; a pattern that matches
            nothing; a depth outside [0, 1]. NonFiniteError: NaN or infinity. StateMismatchError: `out` does not fit.

    Source: Wang et al., "LiNeS: post-training layer scaling prevents forgetting and enhances model merging", 2024, and
    the authors' code.

    Example:
        >>> import torch
        >>> update = {f"blocks.{block}.weight": torch.ones(1) for block in range(3)} | {"pos_embed": torch.ones(1)}
        >>> {name: float(tensor) for name, tensor in lines(update, beta=0.5, alpha=0.125).items()}
        {'blocks.0.weight': 0.125, 'blocks.1.weight': 0.375, 'blocks.2.weight': 0.625, 'pos_embed': 0.125}
    """
    slope = finite_number(beta, "beta")
    start = 1 - slope if alpha is None else finite_number(alpha, "alpha")
    state = {key: tensor for key, tensor in as_state(update, "update").items() if is_bendable(key, tensor.dtype)}
    if not state:
        raise InputError("update: holds no floating-point entries, so there is nothing to scale")
    factors = {key: start + slope * (place or 0.0) for key, place in _depths(state, depth or {}).items()}
    alias = _ties(state, factors)
    if out is not None:
        _check_out(out, state, alias)
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in alias:
            continue
        result[key] = tensor * factors[key] if out is None else _scaled_into(out[key], tensor, factors[key])
    for key, original in alias.items():
        if out is None or identity(out[key]) == identity(out[original]):
            result[key] = result[original]
        else:
            result[key] = _scaled_into(out[key], result[original], 1.0)
    check_finite(result, "the result")
    return TaskVector._of({key: result[key] for key in state})


def _depths(state: Mapping[str, Tensor], given: Mapping[str, float]) -> dict[str, float | None]:
    known = relative_depths(state)
    told: dict[str, float | None] = {}
    if not isinstance(given, Mapping):
        raise TypeError(f"depth: expected a mapping of name -> relative depth, got {type(given).__name__}")
    for pattern, value in given.items():
        place = finite_number(value, f"depth[{pattern!r}]")
        if not 0 <= place <= 1:
            raise InputError(f"depth[{pattern!r}]: expected (l - 1) / (L - 1), between 0 and 1, got {place}")
        matches = [key for key in state if key == pattern or fnmatchcase(key, pattern)]
        if not matches:
            raise InputError(f"depth: {pattern!r} matches none of the {len(state)} names: {quoted(state, 8)}")
        for key in matches:
            told.setdefault(key, place)
    unknown = [key for key in state if key not in known and key not in told]
    if unknown:
        raise InputError(
            f"update: the depth of {quoted(unknown)} cannot be told from the name; say it, for example "
            f"depth={{{unknown[0]!r}: 0.0}}"
        )
    if not told and all(place is None for place in known.values()):
        raise InputError(f"update: no name has a block number, so there are no layers: {quoted(state)}")
    return known | told


def _ties(state: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, str]:
    """Name -> the first name of the same memory."""
    known: dict[Hashable, str] = {}
    alias: dict[str, str] = {}
    for key, tensor in state.items():
        original = known.setdefault(identity(tensor), key)
        if original != key:
            if factors[key] != factors[original]:
                raise InputError(
                    f"update: {original!r} and {key!r} are one tensor, but would be scaled by {factors[original]:g} "
                    f"and {factors[key]:g}; say their depth"
                )
            alias[key] = original
    return alias


def _check_out(out: object, state: Mapping[str, Tensor], alias: Mapping[str, str]) -> None:
    if not isinstance(out, Mapping):
        raise TypeError(f"out: expected a mapping of name -> tensor, got {type(out).__name__}")
    check_keys(out, state, "out", "the result")
    for key, tensor in state.items():
        if is_sharded(tensor) != is_sharded(out[key]) or (is_sharded(tensor) and not same_layout(tensor, out[key])):
            raise StateMismatchError(f"out[{key!r}] is not spread over the processes as update[{key!r}] is")
    parts, places = ({key: local(tensors[key]) for key in state} for tensors in (state, out))
    specs = {key: Spec(tuple(t.shape), t.dtype, t.device) for key, t in parts.items() if key not in alias}
    check_out(places, specs, alias, [])
    own = {part.untyped_storage().data_ptr() for part in parts.values() if part.numel()}
    for key, place in places.items():
        if place.numel() and place.untyped_storage().data_ptr() in own and identity(place) != identity(parts[key]):
            raise InputError(f"out[{key!r}] shares memory with another entry of update")


@torch.no_grad()
def _scaled_into(place: Tensor, tensor: Tensor, factor: float) -> Tensor:
    place = place.detach()
    torch.mul(local(tensor.detach()), factor, out=local(place))
    return place
