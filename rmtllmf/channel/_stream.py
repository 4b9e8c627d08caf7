"""The stream of coefficients that a vector is sent as: its floating tensors one after another, in sorted-key order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .._state import Tensors, all_finite, as_vectors, identity, is_bendable
from ..errors import InputError, NonFiniteError


@dataclass(frozen=True)
class Stream:
    """Which entries of Q vectors go over the air, and where in the stream they lie."""

    given: Sequence[Tensors]  # in the caller's own form
    vectors: Sequence[dict[str, Tensor]]
    keys: list[str]
    alias: dict[str, str]  # tied to one of `keys` in every vector: not sent again
    starts: list[int]  # first position of every key, and the end of the last

    @classmethod
    def of(cls, vectors: Iterable[Tensors]) -> Stream:
        """Checked: same keys, shapes and kinds of entries in all vectors."""
        if isinstance(vectors, Iterator | ValuesView):  # they are gone through twice
            vectors = list(vectors)
        states = as_vectors(vectors, "vectors")
        keys, alias = _what_is_sent(states)
        if not keys:
            raise InputError("vectors: hold no floating-point entries, so there is nothing to send")
        sizes = [states[0][key].numel() for key in keys]
        return cls(list(vectors), states, keys, alias, [0, *accumulate(sizes)])

    @property
    def length(self) -> int:
        """Number of real coefficients."""
        return self.starts[-1]

    @property
    def dtype(self) -> torch.dtype:
        """In which to calculate: float64 if any entry is, else float32."""
        double = any(vector[key].dtype == torch.float64 for vector in self.vectors for key in self.keys)
        return torch.float64 if double else torch.float32

    @property
    def device(self) -> torch.device:
        """Of the first entry."""
        return self.vectors[0][self.keys[0]].device

    def flat(self) -> list[dict[str, Tensor]]:
        """Every vector's entries as one-dimensional tensors; copies only where memory is not contiguous."""
        return [{key: vector[key].reshape(-1) for key in self.keys} for vector in self.vectors]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, slice, slice]]:
        """(key, slice of that tensor, slice of [start, stop)) for every tensor that [start, stop) touches."""
        for index in range(bisect_right(self.starts, start) - 1, len(self.keys)):
            first, end = self.starts[index], self.starts[index + 1]
            low, high = max(start, first), min(stop, end)
            if low < high:
                yield self.keys[index], slice(low - first, high - first), slice(low - start, high - start)
            if end >= stop:
                return

    def rebuilt(self, flat: Sequence[Mapping[str, Tensor]], *, every_dtype: bool = False) -> list[Any]:
        """The received entries in the form of the vectors: a TaskVector through its own ``map``, else a dict."""
        result: list[Any] = []
        for index, (given, vector, parts) in enumerate(zip(self.given, self.vectors, flat, strict=True)):
            bent = {key: parts[key].view(vector[key].shape) for key in self.keys}
            for key, tensor in bent.items():
                if (every_dtype or tensor.dtype.itemsize < 4) and not all_finite(tensor):
                    raise NonFiniteError(f"vectors[{index}][{key!r}]: the received values overflow {tensor.dtype}")
            bent.update({key: bent[original] for key, original in self.alias.items()})
            if hasattr(given, "map"):
                result.append(given.map(lambda key, tensor, bent=bent: bent[key]))
            else:
                result.append({key: bent[key] if key in bent else vector[key].clone() for key in vector})
        return result


def fading_parts(start: int, stop: int, total: int, blocks: int) -> Iterator[tuple[int, int, int]]:
    """(block, start, stop) of the pieces of [start, stop) that lie in one of `blocks` equal parts of [0, total)."""
    at = start
    while at < stop:
        block = at * blocks // total
        end = min(stop, -(-(block + 1) * total // blocks))
        yield block, at, end
        at = end


def check_blocks(blocks: int, symbols: int, argument: str) -> None:
    """A block without a symbol would never be seen."""
    if blocks > max(1, symbols):
        raise InputError(f"{argument}: {blocks} blocks are more than the {symbols} symbols of a vector")


def _what_is_sent(vectors: Sequence[dict[str, Tensor]]) -> tuple[list[str], dict[str, str]]:
    sent: dict[Hashable, str] = {}
    alias: dict[str, str] = {}
    for key in sorted(key for key, tensor in vectors[0].items() if is_bendable(key, tensor)):
        original = sent.setdefault(tuple(identity(vector[key]) for vector in vectors), key)
        if original != key:
            alias[key] = original
    return list(sent.values()), alias
