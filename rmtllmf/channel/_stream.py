"""The stream of coefficients that a vector is sent as: its floating tensors one after another, in sorted-key order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .._sharded import is_sharded
from .._state import all_finite, as_vectors, identity, is_bendable
from ..errors import InputError, NonFiniteError
from ._numpy_vectors import ArrayDoor, Vector, arrays_of


@dataclass(frozen=True)
class Stream:
    """Which entries of Q vectors go over the air, and where in the stream they lie."""

    given: Sequence[Vector]  # in the caller's own form
    vectors: Sequence[dict[str, Tensor]]
    keys: list[str]
    alias: dict[str, str]  # tied to one of `keys` in every vector: not sent again
    starts: list[int]  # first position of every key, and the end of the last
    numpy: bool = False  # whether they came as NumPy arrays, and go back as such

    @classmethod
    def of(cls, vectors: Iterable[Vector], *, numpy_too: bool = False) -> Stream:
        """Checked: same keys, shapes and kinds of entries in all vectors; NumPy arrays only if `numpy_too`."""
        if isinstance(vectors, Iterator | ValuesView):  # they are gone through twice
            vectors = list(vectors)
        door = ArrayDoor()
        states = as_vectors(vectors, "vectors", door if numpy_too else None)
        spread = next((key for state in states for key, tensor in state.items() if is_sharded(tensor)), None)
        if spread is not None:
            raise InputError(
                f"vectors: {spread!r} is a DTensor, and the channel needs whole vectors; send tensor.full_tensor()"
            )
        keys, alias = _what_is_sent(states)
        if not keys:
            raise InputError("vectors: hold no floating-point entries, so there is nothing to send")
        sizes = [states[0][key].numel() for key in keys]
        return cls(list(vectors), states, keys, alias, [0, *accumulate(sizes)], bool(door.array))

    def check_out(self, out: object, traced: bool) -> None:
        """What NumPy vectors cannot have: memory to write to, and gradients."""
        if self.numpy and out is not None:
            raise InputError("out: NumPy vectors come back in fresh memory; leave it out, or pass tensors")
        if self.numpy and traced:
            raise InputError(
                "reception: asks for a gradient, which NumPy vectors cannot carry; pass tensors, or use torch.no_grad()"
            )

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

    def start_of(self, key: str) -> int:
        """Position of a tensor's first coefficient."""
        return self.starts[bisect_left(self.keys, key)]

    def sent(self) -> Iterator[Tensor]:
        """All tensors of all vectors that go over the air."""
        return (vector[key] for vector in self.vectors for key in self.keys)

    def flat(self) -> list[dict[str, Tensor]]:
        """Every vector's entries as one-dimensional tensors; copies only where memory is not contiguous."""
        return [{key: vector[key].reshape(-1) for key in self.keys} for vector in self.vectors]

    def place(self, part: Tensor, out: Tensor | None) -> Tensor:
        """Where a result like the flat `part` is written: into `out` if that is flat, else into fresh memory."""
        return torch.empty_like(part) if out is None or not out.is_contiguous() else out.view(-1)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, slice, slice]]:
        """(key, slice of that tensor, slice of [start, stop)) for every tensor that [start, stop) touches."""
        for index in range(bisect_right(self.starts, start) - 1, len(self.keys)):
            first, end = self.starts[index], self.starts[index + 1]
            low, high = max(start, first), min(stop, end)
            if low < high:
                yield self.keys[index], slice(low - first, high - first), slice(low - start, high - start)
            if end >= stop:
                return

    def rebuilt(
        self,
        flat: Sequence[Mapping[str, Tensor]],
        *,
        every_dtype: bool = False,
        out: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> list[Any]:
        """The received entries in the form of the vectors, in the memory of `out` if there is any."""
        result: list[Any] = []
        for index, parts in enumerate(flat):
            for key in self.keys:
                tensor = parts[key]
                if (every_dtype or tensor.dtype.itemsize < 4) and not all_finite(tensor):
                    raise NonFiniteError(f"vectors[{index}][{key!r}]: the received values overflow {tensor.dtype}")
            result.append(self.formed(index, parts, None if out is None else out[index]))
        return result

    def formed(self, index: int, parts: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> Any:
        """Flat entries in the form of the vector `index`: a TaskVector through its own ``map``, else a dict.

        Ties stay ties, what is not sent is copied. With `out` everything ends there.
        """
        given, vector = self.given[index], self.vectors[index]
        bent = {key: parts[key].view(vector[key].shape) for key in self.keys}
        if out is not None:
            bent = {key: settled(out[key], tensor) for key, tensor in bent.items()}
        for key, original in self.alias.items():
            bent[key] = bent[original] if out is None else settled(out[key], bent[original])
        if hasattr(given, "map") and not self.numpy:
            return given.map(lambda key, tensor: bent[key])
        for key in vector:
            if key not in bent:
                bent[key] = vector[key].clone() if out is None else settled(out[key], vector[key])
        result = {key: bent[key] for key in vector}
        return arrays_of(result) if self.numpy else result


def settled(place: Tensor, value: Tensor) -> Tensor:
    """`place`, holding `value`: copied unless it is that memory already."""
    same = place.data_ptr() == value.data_ptr() and place.stride() == value.stride()
    return place if same else place.copy_(value)


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
    for key in sorted(key for key, tensor in vectors[0].items() if is_bendable(key, tensor.dtype)):
        original = sent.setdefault(tuple(identity(vector[key]) for vector in vectors), key)
        if original != key:
            alias[key] = original
    return list(sent.values()), alias
