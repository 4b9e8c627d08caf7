"""What a coefficient is divided by before it becomes half a symbol."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .._coefficients import ROW, SCALES, sums_of_rows
from .._state import Tensors, extrema, finite_number
from .._threads import share_out
from ..errors import InputError, NonFiniteError

_PIECE = 64 * ROW  # entries looked at by one thread: a piece is worth its overhead, and most of it stays in the cache
_PIECE_ON_DEVICE = 64 * ROW
_SAFE = 1e-15, 1e15  # norms whose squares neither vanish nor overflow in float32


class Gauge:
    """Learns the scales of Q vectors from looks at their pieces, in any order, by any number of threads.

    On the way it sees whether all entries are finite. With `quick` the rms of float32 entries comes from norms of rows
    in float32, added up in float64: three times as fast, which is as fast as memory can be read, and good to 1e-6.
    """

    def __init__(
        self,
        vectors: Sequence[Tensors],
        keys: Sequence[str],
        scale: str | float,
        names: Sequence[str],
        *,
        quick: bool = False,
    ) -> None:
        self.number = None if isinstance(scale, str) else finite_number(scale, "scale", positive=True)
        if self.number is None and scale not in SCALES:
            raise InputError(
                f"scale: expected one of {', '.join(map(repr, SCALES))} or a positive number, got {scale!r}"
            )
        self.kind, self.quick = str(scale), quick
        self.squares = self.number is None and self.kind.endswith("rms")
        self.vectors, self.keys, self.names = vectors, keys, names
        self.found: list[dict[str, list[float]]] = [{key: [] for key in keys} for _ in vectors]

    def pieces(self, key: str) -> Iterator[tuple[int, int]]:
        """(start, stop) of what may be looked at together, for one flat tensor."""
        tensor = self.vectors[0][key]
        length = _PIECE if tensor.device.type == "cpu" else _PIECE_ON_DEVICE
        for start in range(0, tensor.numel(), length):
            yield start, min(start + length, tensor.numel())

    def looker(self) -> Callable[[int, str, Tensor], None]:
        """``look(q, key, piece)`` with scratch memory of its own: one for each thread."""
        space: dict[torch.device, Tensor] = {}

        def look(q: int, key: str, piece: Tensor) -> None:
            found = self.found[q][key]
            if not self.squares:
                found.append(_peak(piece))
                return
            if self.quick and piece.dtype == torch.float32 and (quick := _quick_squares(piece)):
                found.extend(quick)
                return
            if piece.device not in space:
                space[piece.device] = torch.empty(max(_PIECE, len(piece)), dtype=torch.float64, device=piece.device)
            double = space[piece.device][: len(piece)].copy_(piece)
            double.mul_(double)
            found.extend(sums_of_rows(double))

        return look

    def scales(self) -> list[dict[str, float]]:
        """The scale of every tensor of every vector, after all pieces have been looked at."""
        return [self._scales(q, name) for q, name in enumerate(self.names)]

    def _scales(self, q: int, argument: str) -> dict[str, float]:
        vector, measured = self.vectors[q], {}
        for key in self.keys:
            found = self.found[q][key]
            finite = all(map(math.isfinite, found))
            measured[key] = (math.fsum(found) if self.squares else max(found, default=0.0)) if finite else math.nan
            if not math.isfinite(measured[key]):
                raise NonFiniteError(f"{argument}[{key!r}] holds NaN or infinity; expected finite numbers")
        if self.number is not None:
            return dict.fromkeys(self.keys, self.number)
        if self.kind.startswith("tensor"):
            return self._of_tensors(vector, measured, argument)
        if self.squares:
            whole = math.sqrt(math.fsum(measured.values()) / max(1, sum(vector[key].numel() for key in self.keys)))
        else:
            whole = max(measured.values(), default=0.0)
        if whole == 0:
            raise InputError(f"{argument} is all zero and cannot be normalised; use a number as scale, or leave it out")
        return dict.fromkeys(self.keys, whole)

    def _of_tensors(self, vector: Tensors, measured: Mapping[str, float], argument: str) -> dict[str, float]:
        found = {
            key: math.sqrt(value / vector[key].numel()) if self.squares else value
            for key, value in measured.items()
            if vector[key].numel() > 0
        }
        for key, value in found.items():
            if value == 0:
                raise InputError(
                    f"{argument}[{key!r}] is all zero and cannot be normalised; use scale='rms' or 'peak' of the "
                    "whole vector, a number, or leave the tensor out"
                )
        return {key: found.get(key, 1.0) for key in self.keys}


def scales_of(
    vectors: Sequence[Tensors],
    flat: Sequence[Mapping[str, Tensor]],
    keys: Sequence[str],
    scale: str | float,
    names: Sequence[str],
) -> list[dict[str, float]]:
    """The scale of every tensor of every vector, `flat` being the same without shape; checks that all is finite."""
    gauge = Gauge(vectors, keys, scale, names)
    pieces = [(q, key, cut) for q in range(len(flat)) for key in keys for cut in gauge.pieces(key)]

    def worker() -> Callable[[tuple[int, str, tuple[int, int]]], None]:
        look = gauge.looker()

        def work(item: tuple[int, str, tuple[int, int]]) -> None:
            q, key, (start, stop) = item
            look(q, key, flat[q][key][start:stop].detach())

        return work

    small = sum(stop - start for _, _, (start, stop) in pieces) <= _PIECE  # not worth a thread
    alone = small or any(part[key].device.type != "cpu" for part in flat for key in keys)
    share_out(worker, pieces, alone=alone)
    return gauge.scales()


def scales(vector: Tensors, keys: Sequence[str], scale: str | float, argument: str) -> dict[str, float]:
    """The scale of every tensor of one vector; checks on the way that the entries are finite."""
    flat = {key: vector[key].detach().reshape(-1) for key in keys}
    return scales_of([vector], [flat], keys, scale, [argument])[0]


def _quick_squares(piece: Tensor) -> list[float]:
    """Sums of squares of rows; none where float32 may not do: zeros, extremes, NaN or infinity."""
    whole = len(piece) // ROW * ROW
    norms: list[float] = torch.linalg.vector_norm(piece[:whole].view(-1, ROW), dim=-1).tolist() if whole else []
    if whole < len(piece):
        norms.append(float(torch.linalg.vector_norm(piece[whole:])))
    low, high = _SAFE
    return [norm * norm for norm in norms] if all(low < norm < high for norm in norms) else []


def _peak(tensor: Tensor) -> float:
    low, high = extrema(tensor)
    return max(abs(low), abs(high)) if math.isfinite(low) and math.isfinite(high) else math.nan
