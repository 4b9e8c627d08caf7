"""Pairs of matrices between which there is a hidden layer: queries and keys, values and outputs, both of an MLP."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor

from .._state import Tensors

__all__ = ["Pair", "hidden_pairs"]


Cut = Callable[[Tensor], Tensor]  # a tensor of the state -> the matrix in it, hidden units first


class Pair(NamedTuple):
    """Two matrices whose rows are the same hidden units; of a model only their product counts, :math:`A^T B`."""

    kind: str
    keys: tuple[str, str]
    cuts: tuple[Cut, Cut]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.keys))

    def matrices(self, state: Tensors) -> tuple[Tensor, Tensor]:
        """A (m, a) and B (m, b)."""
        first, second = (cut(state[key]) for key, cut in zip(self.keys, self.cuts, strict=True))
        return first, second


_ROLES = {
    "q": r"(?:to_)?q(?:uery)?(?:_proj|_lin)?\.weight|wq\.weight|q_proj_weight",
    "k": r"(?:to_)?k(?:ey)?(?:_proj|_lin)?\.weight|wk\.weight|k_proj_weight",
    "v": r"(?:to_)?v(?:alue)?(?:_proj|_lin)?\.weight|wv\.weight|v_proj_weight",
    "qkv": r"in_proj_weight|(?:in_proj|qkv|qkv_proj|wqkv|c_attn)\.weight",
    "by_head": r"query_key_value\.weight",
    "o": r"(?:to_out\.0|out_proj|o_proj|out_lin|wo|o|proj|c_proj|dense)\.weight",
}
_ATTENTION = re.compile(
    r"(?P<block>(?:.*?\.)?\w*(?:attn|attention)\w*)\.(?:(?:self|attention|output)\.)?(?:"
    + "|".join(f"(?P<{role}>{pattern})" for role, pattern in _ROLES.items())
    + ")",
    re.IGNORECASE,
)
_MLP = (
    ("c_fc", "c_proj"),  # open_clip, GPT-2
    ("fc1", "fc2"),  # timm, OpenAI's CLIP and OPT at Hugging Face
    ("intermediate.dense", "output.dense"),  # BERT, ViT
    ("linear1", "linear2"),  # torch
    ("lin1", "lin2"),  # DistilBERT
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, BLOOM
    ("up_proj", "down_proj"),  # Llama; the gate beside it moves with it
    ("wi", "wo"),  # T5
    ("wi_1", "wo"),
    ("w3", "w2"),  # EVA, Llama as Meta has it
    ("linear_1", "linear_2"),  # torchvision, once
    ("0", "3"),  # torchvision
)


def hidden_pairs(state: Tensors, head_size: int | None) -> tuple[list[Pair], list[str]]:
    """The pairs in the order of the state, and the names of matrices that look like parts of one that is not found."""
    blocks: dict[str, dict[str, str]] = {}
    for key, tensor in state.items():
        match = _ATTENTION.fullmatch(key)
        if match and tensor.ndim == 2:
            blocks.setdefault(match["block"], {})[str(match.lastgroup)] = key
    pairs: list[Pair] = []
    unknown: list[str] = []
    for names in blocks.values():
        found = list(_attention(state, names, head_size))
        pairs += found
        covered = {name for pair in found for name in pair.names}
        unknown += [name for name in names.values() if name not in covered]
    pairs += _mlps(state)
    order = {key: index for index, key in enumerate(state)}
    return sorted(pairs, key=lambda pair: order[pair.names[0]]), sorted(unknown, key=order.__getitem__)


def _attention(state: Tensors, names: dict[str, str], head_size: int | None) -> Iterator[Pair]:
    parts: dict[str, tuple[str, Cut]] = {}
    turned = False
    if "qkv" in names:
        rows, columns = state[names["qkv"]].shape
        turned = columns == 3 * rows  # GPT-2 stores (in, out)
        if turned or rows % 3 == 0:
            parts = {role: (names["qkv"], partial(_third, index=i, turned=turned)) for i, role in enumerate("qkv")}
    elif "by_head" in names:
        rows = state[names["by_head"]].shape[0]
        if head_size is not None and rows % (3 * head_size) == 0:
            parts = {
                role: (names["by_head"], partial(_third_of_heads, index=i, size=head_size))
                for i, role in enumerate("qkv")
            }
    else:
        parts = {role: (names[role], _whole) for role in "qkv" if role in names}
    if "o" in names:
        parts["o"] = (names["o"], _whole if turned else _transposed)
    for kind, left, right in (("query and key", "q", "k"), ("value and output", "o", "v")):
        if left not in parts or right not in parts:
            continue
        (first, of_first), (second, of_second) = parts[left], parts[right]
        units, fewer = len(of_first(state[first])), len(of_second(state[second]))
        if units == fewer:
            yield Pair(kind, (first, second), (of_first, of_second))
        elif of_second is _whole and head_size is not None and fewer % head_size == 0 and units % fewer == 0:
            # several heads of queries share one of keys
            repeated = partial(_repeated, times=units // fewer, size=head_size)
            yield Pair(kind, (first, second), (of_first, repeated))


def _mlps(state: Tensors) -> Iterator[Pair]:
    for key, tensor in state.items():
        for first, second in _MLP:
            if not (key == f"{first}.weight" or key.endswith(f".{first}.weight")) or tensor.ndim != 2:
                continue
            other = key.removesuffix(f"{first}.weight") + f"{second}.weight"
            if other not in state or state[other].ndim != 2:
                continue
            if tensor.shape[0] == state[other].shape[1]:
                yield Pair("MLP", (other, key), (_transposed, _whole))
            elif tensor.shape[1] == state[other].shape[0]:
                yield Pair("MLP", (other, key), (_whole, _transposed))


def _whole(matrix: Tensor) -> Tensor:
    return matrix


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.mT


def _third(matrix: Tensor, *, index: int, turned: bool) -> Tensor:
    return (matrix.mT if turned else matrix).chunk(3)[index]


def _third_of_heads(matrix: Tensor, *, index: int, size: int) -> Tensor:
    return matrix.unflatten(0, (-1, 3, size))[:, index].flatten(0, 1)


def _repeated(matrix: Tensor, *, times: int, size: int) -> Tensor:
    return matrix.unflatten(0, (-1, size)).repeat_interleave(times, 0).flatten(0, 1)
