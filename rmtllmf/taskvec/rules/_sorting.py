"""Order statistics of N tensors, entry by entry: a sorting network of minima and maxima instead of a sort."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..._state import all_finite
from .._engine import Fusion, Piece
from ..vector import TaskVector

CHUNK = 1 << 16  # entries: the wires of eight vectors stay in the cache of a core
CHUNK_ON_DEVICE = 1 << 24


class Comparator(NamedTuple):
    """Puts the smaller of two wires on `low` and the larger on `high`; what is not needed is not calculated."""

    low: int
    high: int
    needs_low: bool
    needs_high: bool


@lru_cache(maxsize=64)
def network(count: int, ranks: range) -> tuple[Comparator, ...]:
    """Comparators after which the wires `ranks` hold, in some order, what sorting `count` wires would put there.

    Batcher's odd-even merge sort (Knuth, "The art of computer programming", volume 3, 5.2.2, algorithm M), without what
    no wire of `ranks` depends on, and without the comparators at the end that only reorder `ranks` among themselves. A
    NaN on any wire reaches each of `ranks`.
    """
    needed, settled, kept = set(ranks), set(ranks), []
    for low, high in reversed(_batcher(count)):
        if low in settled and high in settled:
            continue
        needs_low, needs_high = low in needed, high in needed
        settled -= {low, high}
        if needs_low or needs_high:
            needed |= {low, high}
            kept.append(Comparator(low, high, needs_low, needs_high))
    return tuple(reversed(kept))


def _batcher(count: int) -> list[tuple[int, int]]:
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return pairs


def mean_of_ranks(fusion: Fusion, ranks: range, scale: float) -> TaskVector:
    """`scale` times the mean of the order statistics `ranks` (from 0, the smallest), entry by entry.

    Raises `NonFiniteError` for NaN or infinity in any vector, also where it would not be among `ranks`.
    """
    comparators = network(fusion.count, ranks)

    def combine(piece: Piece) -> None:
        longest = CHUNK if piece.into.device.type == "cpu" else CHUNK_ON_DEVICE
        spare = [piece.spare(slot, len(piece)) for slot in range(fusion.count + 1)]
        sums = []
        for start in range(0, len(piece), longest):
            cut = slice(start, min(start + longest, len(piece)))
            parts, into = [part[cut] for part in piece.parts], piece.into[cut]
            free = [memory[: len(into)] for memory in spare]
            if comparators:  # what is left out must be finite too: then so is the sum, unless it overflows
                total = torch.add(parts[0], parts[1], out=free[0])
                for part in parts[2:]:
                    total.add_(part)
                sums.append(total.sum())
            wires = _sorted(parts, free, comparators)
            if len(ranks) == 1:
                torch.mul(wires[ranks[0]], scale, out=into)
                continue
            # halved before they are added, so that two large numbers do not overflow; exact (but for denormals), unlike
            # a third
            torch.mul(wires[ranks[0]], 0.5, out=into)
            for rank in ranks[1:]:
                into.add_(wires[rank], alpha=0.5)
            if (factor := 2 * scale / len(ranks)) != 1:
                into.mul_(factor)
        if sums and not torch.isfinite(torch.stack(sums).sum()) and not all(map(all_finite, piece.parts)):
            raise fusion.blame(piece.key)

    return fusion.by_entry(combine)


def _sorted(parts: list[Tensor], free: list[Tensor], comparators: tuple[Comparator, ...]) -> list[Tensor]:
    """The wires after the network. `parts` are only read; `free` is memory for one tensor more than there are wires."""
    wires, own = list(parts), [False] * len(parts)
    for low, high, needs_low, needs_high in comparators:
        left, right = wires[low], wires[high]
        spent = [memory for memory, mine in ((left, own[low]), (right, own[high])) if mine]
        if needs_low and needs_high:
            wires[low] = torch.minimum(left, right, out=free.pop())
            wires[high] = torch.maximum(left, right, out=spent.pop() if spent else free.pop())
            own[low] = own[high] = True
        elif needs_low:
            wires[low], own[low] = torch.minimum(left, right, out=spent.pop() if spent else free.pop()), True
            own[high] = False
        else:
            wires[high], own[high] = torch.maximum(left, right, out=spent.pop() if spent else free.pop()), True
            own[low] = False
        free += spent
    return wires
