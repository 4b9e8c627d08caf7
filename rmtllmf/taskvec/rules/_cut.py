"""What is kept of a vector: the entries above a threshold, and the first of those equal to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .._engine import Piece

Place = tuple[str, int]  # name and first entry of a piece


@dataclass
class Cut:
    """What is kept of one vector: all magnitudes above `threshold`, and of those equal to it the first ones.

    Attributes:
        threshold: the smallest magnitude that is kept.
        room: how many of the entries equal to the threshold are kept in a piece, None for all of them, and none in
            pieces that are not named; or None: all in every piece.
        ends: the first entry, in a piece with room for some, that finds none: known once it has been looked for.
    """

    threshold: float
    room: dict[Place, int | None] | None
    ends: dict[Place, int] = field(default_factory=dict)

    def keep(self, vector: int, piece: Piece, block: slice, out: Tensor) -> Tensor:
        """A block of a vector's part of `piece` with all other entries set to zero, in `out`; NaN stays NaN."""
        part = piece.parts[vector]
        room = None if self.room is None else self.room.get((piece.key, piece.start), 0)
        bound = at_most(self.threshold, part.dtype)
        strict = room == 0 or bound < self.threshold
        if not strict:
            bound = before(bound, part.dtype)
        torch.ops.aten.hardshrink.out(part[block], max(bound, 0.0), out=out)  # keeps |x| > bound
        if room and not strict:
            place = (piece.key, piece.start)
            if place not in self.ends:
                self.ends[place] = self._end(part, room, len(out))
            surplus = slice(max(self.ends[place] - block.start, 0), None)
            out[surplus].masked_fill_(part[block][surplus].abs() == self.threshold, 0.0)
        return out

    def _end(self, part: Tensor, room: int, step: int) -> int:
        """Where in `part` the entry is that equals the threshold when `room` others have."""
        for start in range(0, len(part), step):
            equal = part[start : start + step].abs() == self.threshold
            if (count := int(equal.sum())) > room:
                return start + int(equal.nonzero()[room, 0])
            room -= count
        return len(part)


def cut_after(threshold: float, left: int, equal: list[tuple[Place, int]]) -> Cut:
    """The first `left` of the entries equal to the threshold are kept; `equal` says how many each piece holds."""
    if threshold == 0 or left == sum(count for _, count in equal):
        return Cut(threshold, None)
    room: dict[Place, int | None] = {}
    for place, count in equal:
        if left > 0 and count:
            room[place] = left if left < count else None
            left -= count
    return Cut(threshold, room)


def at_most(value: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is not above `value`."""
    if dtype == torch.float64 or not math.isfinite(value):
        return value
    nearest = np.float32(value)
    return float(nearest) if float(nearest) <= value else float(np.nextafter(nearest, np.float32(-math.inf)))


def before(value: float, dtype: torch.dtype) -> float:
    """The number of `dtype` before `value`."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(kind(value), kind(-math.inf)))
