"""CLIP image towers of Hugging Face transformers: the names of their weights to open_clip's, and back.

Both libraries compute the same function of the same numbers under other names: transformers keeps three matrices for
queries, keys and values that open_clip stacks, and the transpose of open_clip's projection.

The activation is no weight, so that no conversion can carry it: OpenAI's models and all that is fine-tuned from them
use QuickGELU. The base must be built with it, which for the paper's encoder means
``load("ViT-B-16-quickgelu", "openai")``. "ViT-B-16" has the same names and shapes and computes something else; recent
releases of open_clip only warn, and older ones switch for the tag "openai" alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .._state import StateLike, Tensors, as_state, check_keys, quoted
from ..errors import InputError, StateMismatchError

__all__ = ["from_hugging_face", "to_hugging_face"]

_PREFIX = "vision_model."
_NO_IMAGE_TOWER = ("text_model.", "text_projection.", "logit_scale")  # what a CLIPModel has beside it


class _Row(NamedTuple):
    """One tensor of open_clip, and the one or three of transformers that it is made of. Letters are sizes."""

    theirs: tuple[str, ...]
    their_shape: str
    ours: str
    our_shape: str


def from_hugging_face(state: StateLike, *, drop_text_tower: bool = False) -> dict[str, Tensor]:
    """The image tower of a transformers CLIP model in the names of open_clip's ``VisionTransformer``.

    Args:
        state: the state dict (or the module, or the path of its safetensors file) of a ``CLIPVisionModel``, a
            ``CLIPVisionModelWithProjection`` or a ``CLIPModel``. Names with the prefix ``vision_model.`` and without
            it (``CLIPVisionModel`` since transformers 5.6) are both read.
        drop_text_tower: leave out the text tower and the logit scale of a ``CLIPModel``; otherwise they are an error.

    Returns:
        Copies of all weights, bit by bit and in their dtypes. There is a ``proj`` if and only if `state` has a
        ``visual_projection.weight``: a ``CLIPVisionModel`` has none, and none is invented (see `load_finetuned`). The
        buffer ``embeddings.position_ids`` of old checkpoints is left out: it counts from 0, and is no weight.

    Raises:
        StateMismatchError: a missing, unexpected or misshaped entry, position ids that do not count from 0, or
            query, key and value of one layer in several dtypes or on several devices.
        InputError: a text tower, unless it is to be dropped. TypeError: an entry is no floating-point tensor.

    Source: ``transformers.CLIPVisionModel`` and ``open_clip.transformer.VisionTransformer``.

    Example:
        >>> from open_clip.transformer import VisionTransformer
        >>> tower = VisionTransformer(8, 4, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=8)
        >>> theirs = to_hugging_face(tower)
        >>> theirs["vision_model.encoder.layers.0.self_attn.q_proj.weight"].shape
        torch.Size([16, 16])
        >>> tower.load_state_dict(from_hugging_face(theirs))
        <All keys matched successfully>
    """
    return converted(as_state(state, "state"), "state", drop_text_tower)


def to_hugging_face(state: StateLike, *, prefix: str = _PREFIX, drop_text_tower: bool = False) -> dict[str, Tensor]:
    """The image tower of an open_clip model in the names of transformers: the inverse of `from_hugging_face`.

    Args:
        state: the state dict (or the module, or the path of its safetensors file) of an open_clip
            ``VisionTransformer``, alone (``model.visual``) or as part of a model, with the prefix ``visual.``.
        prefix: ``"vision_model."``, the names of all published checkpoints, which every version of
            ``CLIPVisionModel.from_pretrained`` reads; or ``""``, the names in memory of a ``CLIPVisionModel`` since
            transformers 5.6. ``visual_projection.weight`` never has one.
        drop_text_tower: leave out what `state` has beside ``visual.``; otherwise it is an error.

    Returns:
        Copies of all weights, bit by bit and in their dtypes. There is a ``visual_projection.weight`` if and only if
        `state` has a ``proj``; a ``CLIPVisionModel`` has no place for it, a ``CLIPVisionModelWithProjection`` has.

    Raises:
        StateMismatchError: a missing, unexpected or misshaped entry; towers with other parts (attentional pooling,
            layer scale) have no counterpart in transformers.
        InputError: another prefix, or a text tower, unless it is to be dropped.
        TypeError: an entry is no floating-point tensor.

    Source: ``transformers.CLIPVisionModel`` and ``open_clip.transformer.VisionTransformer``.

    Example:
        >>> from open_clip.transformer import VisionTransformer
        >>> tower = VisionTransformer(8, 4, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=8)
        >>> list(to_hugging_face(tower, prefix=""))[:2]
        ['embeddings.class_embedding', 'embeddings.position_embedding.weight']
    """
    if prefix not in (_PREFIX, ""):
        raise InputError(f"prefix: expected {_PREFIX!r} or '', got {prefix!r}")
    given = as_state(state, "state")
    start = "visual." if any(name.startswith("visual.") for name in given) else ""
    given = _image_tower(given, {name for name in given if not name.startswith(start)}, "state", drop_text_tower)
    tower = checked_tower({name.removeprefix(start): tensor for name, tensor in given.items()}, "state", start)
    result: dict[str, Tensor] = {}
    for row in _rows(_layers(tower, r"transformer\.resblocks"), "proj" in tower, prefix):
        parts = tower[row.ours].chunk(3) if len(row.theirs) == 3 else (_turned(row, tower[row.ours]),)
        result |= {name: copied(part) for name, part in zip(row.theirs, parts, strict=True)}
    return result


def _rows(layers: int, projection: bool, prefix: str) -> list[_Row]:
    """What belongs to what, in open_clip's order; sizes: W(idth), N(umber of positions), M(LP), D(imension of proj)."""

    def same(theirs: str, ours: str, weight: str, bias: str | None = "W") -> list[_Row]:
        rows = [_Row((f"{prefix}{theirs}.weight",), weight, f"{ours}.weight", weight)]
        return rows + ([] if bias is None else [_Row((f"{prefix}{theirs}.bias",), bias, f"{ours}.bias", bias)])

    embeddings = f"{prefix}embeddings"
    rows = [
        _Row((f"{embeddings}.class_embedding",), "W", "class_embedding", "W"),
        _Row((f"{embeddings}.position_embedding.weight",), "N W", "positional_embedding", "N W"),
        *([_Row(("visual_projection.weight",), "D W", "proj", "W D")] if projection else []),
        *same("embeddings.patch_embedding", "conv1", "W channels P Q", None),
        *same("pre_layrnorm", "ln_pre", "W"),
    ]
    for layer in range(layers):
        theirs, ours = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        rows += same(f"{theirs}.layer_norm1", f"{ours}.ln_1", "W")
        for kind, each, stacked in (("weight", "W W", "3W W"), ("bias", "W", "3W")):
            names = tuple(f"{prefix}{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            rows.append(_Row(names, each, f"{ours}.attn.in_proj_{kind}", stacked))
        rows += same(f"{theirs}.self_attn.out_proj", f"{ours}.attn.out_proj", "W W")
        rows += same(f"{theirs}.layer_norm2", f"{ours}.ln_2", "W")
        rows += same(f"{theirs}.mlp.fc1", f"{ours}.mlp.c_fc", "M W", "M")
        rows += same(f"{theirs}.mlp.fc2", f"{ours}.mlp.c_proj", "W M")
    return rows + same("post_layernorm", "ln_post", "W")


def _layers(names: Iterable[str], stem: str) -> int:
    """How many different layers are named, and at least 1, so that a tower without any lacks its first."""
    found = (re.match(rf"{stem}\.([0-9]+)\.", name) for name in names)
    return max(1, len({match[1] for match in found if match}))


def _image_tower(state: Tensors, others: Collection[str], argument: str, drop: bool) -> dict[str, Tensor]:
    """What is left of `state` without the others, if they may go."""
    if others and not drop:
        raise InputError(
            f"{argument} has {quoted(others)} beside the image tower; pass the image tower alone, or "
            "drop_text_tower=True to leave them out"
        )
    return {name: tensor for name, tensor in state.items() if name not in others}


def checked_tower(tower: Tensors, argument: str, start: str) -> dict[str, Tensor]:
    """open_clip's tower; `start` is what its names had before them, for the errors."""
    rows = _rows(_layers(tower, r"transformer\.resblocks"), "proj" in tower, "")
    check_keys([start + name for name in tower], [start + row.ours for row in rows], argument, _tower_of("open_clip"))
    _check_tensors(
        {start + name: tensor for name, tensor in tower.items()},
        argument,
        [(start + row.ours, row.our_shape) for row in rows],
    )
    return dict(tower)


def converted(state: Tensors, argument: str, drop_text_tower: bool) -> dict[str, Tensor]:
    """`from_hugging_face` for a mapping that errors call `argument`."""
    state = _image_tower(state, {n for n in state if n.startswith(_NO_IMAGE_TOWER)}, argument, drop_text_tower)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in state) else ""
    positions = state.pop(f"{prefix}embeddings.position_ids", None)
    layers = _layers(state, rf"{re.escape(prefix)}encoder\.layers")
    rows = _rows(layers, "visual_projection.weight" in state, prefix)
    check_keys(state, [name for row in rows for name in row.theirs], argument, _tower_of("transformers"))
    _check_tensors(state, argument, [(name, row.their_shape) for row in rows for name in row.theirs])
    if positions is not None and not positions.is_meta:
        count = state[f"{prefix}embeddings.position_embedding.weight"].shape[0]
        if positions.flatten().tolist() != list(range(count)):
            raise StateMismatchError(
                f"{argument}['{prefix}embeddings.position_ids'] does not count from 0 to {count - 1}: open_clip has no "
                "other order of the positions"
            )
    result = {}
    for row in rows:
        parts = [state[name] for name in row.theirs]
        for name, part in zip(row.theirs, parts, strict=True):
            if (part.dtype, part.device) != (parts[0].dtype, parts[0].device):
                raise StateMismatchError(
                    f"{argument}[{name!r}] is {part.dtype} on {part.device}, {row.theirs[0]!r} is {parts[0].dtype} on "
                    f"{parts[0].device}; open_clip has one tensor for both. Convert one of them first"
                )
        result[row.ours] = torch.cat([part.detach() for part in parts]) if parts[1:] else copied(_turned(row, parts[0]))
    return result


def _tower_of(library: str) -> str:
    return f"a CLIP image tower of {library} with as many layers"


def _check_tensors(state: Tensors, argument: str, shapes: list[tuple[str, str]]) -> None:
    """Raise unless all are floating and fit together; a size is what it is where its letter comes first."""
    sizes: dict[str, int] = {}
    for name, letters in shapes:
        tensor = state[name]
        if not tensor.is_floating_point():
            raise TypeError(f"{argument}[{name!r}] is {tensor.dtype}; expected a floating-point tensor")
        for letter, size in zip(letters.split(), tensor.shape, strict=False):
            if letter != "3W":
                sizes.setdefault(letter, size)
        expected = [3 * sizes["W"] if letter == "3W" else sizes.get(letter, letter) for letter in letters.split()]
        if list(tensor.shape) != expected:
            text = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
            raise StateMismatchError(f"{argument}[{name!r}] has shape {tuple(tensor.shape)}; expected ({text})")


def _turned(row: _Row, tensor: Tensor) -> Tensor:
    return tensor.t() if row.ours == "proj" else tensor


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy of its own, which safetensors can write."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
