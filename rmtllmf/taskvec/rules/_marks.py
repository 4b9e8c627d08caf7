"""Cuts through single tensors, for rules that read them in other pieces than those in which the cuts were found."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._engine import BLOCK, Fusion
from ._cut import Cut, at_most, before
from ._selection import largest


class Mark(NamedTuple):
    """A cut through one tensor: all magnitudes above `threshold`, and of those equal to it the ones before `end`."""

    threshold: float
    end: int  # entry of the flattened tensor

    def keep(self, part: Tensor, start: int, out: Tensor) -> Tensor:
        """Entries from `start` on with all others set to zero, in `out`; NaN stays NaN. May be the memory of `part`."""
        bound = at_most(self.threshold, part.dtype)
        if bound == self.threshold:
            bound = before(bound, part.dtype)
        torch.ops.aten.hardshrink.out(part, max(bound, 0.0), out=out)  # keeps |x| > bound
        if self.end < start + len(out):
            surplus = out[max(self.end - start, 0) :]
            surplus.masked_fill_(surplus.abs() == self.threshold, 0.0)
        return out


def marks(fusion: Fusion, how_many: Callable[[int], int]) -> dict[str, list[Mark]]:
    """For each name a mark in each vector: of n entries exactly ``how_many(n)`` are kept, of equal ones the first.

    Names of which nothing is kept are left out.
    """
    found: dict[str, list[Mark]] = {}
    for key, cuts in largest(fusion, [[k] for k in fusion.keys if how_many(fusion.specs[k].size)], how_many).items():
        found[key] = [Mark(cut.threshold, _end(fusion, key, vector, cut)) for vector, cut in enumerate(cuts)]
    return found


def _end(fusion: Fusion, key: str, vector: int, cut: Cut) -> int:
    """The first entry of the tensor from which on none is kept that equals the threshold."""
    end = 0
    for _, start, stop in fusion._pieces([key]):
        room = None if cut.room is None else cut.room.get((key, start), 0)
        if room is None:
            end = stop
        elif room:
            buffer = torch.empty(stop - start, dtype=fusion.compute[key], device=fusion.specs[key].device)
            part = fusion.sources[vector].read(key, start, stop, buffer)
            end = start + cut._end(part, room, BLOCK)
    return end
