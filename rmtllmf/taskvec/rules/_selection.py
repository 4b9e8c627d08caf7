"""The largest magnitudes of task vectors: exact thresholds, without ever sorting a vector.

A strided sample brackets the k-th largest magnitude of n; one pass counts above the bracket and collects what is inside
(less than 2 %, of large tensors less than 1 %); a partial sort of that gives the threshold. Should the bracket miss, or
hold far more than it should, the bits of the threshold are found eight at a time, which takes a few more passes but
always the same memory. What is counted are whole numbers, so that threads and pieces change nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._state import all_finite
from ..._threads import share_out
from .._engine import BLOCK, Fusion, Piece
from .._sources import Source, Stored
from ._cut import Cut, Place, cut_after
from ._shares import how_many

DEVIATIONS = 3.5  # standard deviations of the sample's quantile between the threshold and the ends of its bracket
SAMPLE = 1 << 10  # entries of a sample at least; groups not much larger are collected as a whole
RUN = 256  # consecutive entries read at once for the sample of a source that has no memory to stride through
BATCH = 1 << 27  # entries of all vectors surveyed at once: bounds what is collected

Unit = tuple[int, int]  # group of names, and vector


def largest(
    fusion: Fusion, groups: Sequence[Sequence[str]], density: float | Callable[[int], int]
) -> dict[str, list[Cut]]:
    """For each name a cut of each vector, so that the share `density` of every group of names is kept.

    Instead of a share a function may say how many of n entries are kept, between 1 and n. The entries of a group are in
    the flat order of its sorted names: of those equal to the threshold the first stay.
    """
    cuts: dict[str, list[Cut]] = {}
    filled = [sorted(group) for group in groups if any(fusion.specs[key].size for key in group)]
    for batch in _batches(fusion, filled):
        found = _Batch(fusion, batch, density).cuts()
        for index, group in enumerate(batch):
            cuts |= {key: [found[index, vector] for vector in range(fusion.count)] for key in group}
    return cuts


def _batches(fusion: Fusion, groups: list[list[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    entries = 0
    for group in groups:
        batch.append(group)
        entries += fusion.count * sum(fusion.specs[key].size for key in group)
        if entries >= BATCH:
            yield batch
            batch, entries = [], 0
    if batch:
        yield batch


class _Bracket(NamedTuple):
    """Magnitudes between which the threshold should be, and how many strictly inside a piece are worth collecting."""

    low: float
    high: float
    most: int


class _Census(NamedTuple):
    """What a piece holds at, above and inside a bracket; `inside` is None if that is too much."""

    from_low: int
    above_low: int
    from_high: int
    above_high: int
    inside: Tensor | None


class _Batch:
    """Groups of names whose thresholds are looked for together."""

    def __init__(self, fusion: Fusion, groups: list[list[str]], density: float | Callable[[int], int]) -> None:
        self.fusion, self.groups = fusion, groups
        self.group = {key: index for index, keys in enumerate(groups) for key in keys}
        self.size = [sum(fusion.specs[key].size for key in keys) for keys in groups]
        self.kept = [density(size) if callable(density) else how_many(density, size) for size in self.size]
        kinds = [{fusion.compute[key] for key in keys} for keys in groups]
        self.dtype = [torch.float64 if torch.float64 in kind else torch.float32 for kind in kinds]

    def cuts(self) -> dict[Unit, Cut]:
        units = [(index, vector) for index in range(len(self.groups)) for vector in range(self.fusion.count)]
        cuts = self._look(self._each(units, self._bracket))
        missed = [unit for unit in units if unit not in cuts]
        if missed:
            cuts |= self._look({unit: _Bracket(exact, exact, 0) for unit, exact in self._by_bits(missed).items()})
        for group, vector in missed:
            if (group, vector) not in cuts:  # the threshold is NaN, which equals nothing
                source = self.fusion.sources[vector]
                raise self.fusion.blame(next(key for key in self.groups[group] if not all_finite(source.whole(key))))
        return cuts

    def _each(self, units: Sequence[Unit], work: Callable[[Unit], _Bracket]) -> dict[Unit, _Bracket]:
        done: dict[Unit, _Bracket] = {}

        def keep(unit: Unit) -> None:
            done[unit] = work(unit)

        share_out(lambda: keep, units, alone=self.fusion._alone)
        return done

    def _look(self, brackets: dict[Unit, _Bracket]) -> dict[Unit, Cut]:
        """The cuts of those brackets that hold what is looked for."""

        def look(piece: Piece) -> tuple[Place, list[tuple[Unit, _Census]]]:
            group, seen = self.group[piece.key], []
            for vector, part in enumerate(piece.parts):
                bracket = brackets.get((group, vector))
                if bracket is not None:
                    seen.append(((group, vector), _census(part, piece, bracket, self.dtype[group])))
            return (piece.key, piece.start), seen

        keys = [key for index in sorted({index for index, _ in brackets}) for key in self.groups[index]]
        collected: dict[Unit, list[tuple[Place, _Census]]] = defaultdict(list)
        for place, seen in self.fusion.survey(look, keys=keys, weighted=False):
            for unit, census in seen:
                collected[unit].append((place, census))
        cuts: dict[Unit, Cut] = {}

        def settle(unit: Unit) -> None:
            cut = _settled(brackets[unit], collected.pop(unit), self.kept[unit[0]])
            if cut is not None:
                cuts[unit] = cut

        share_out(lambda: settle, list(collected), alone=self.fusion._alone)
        return cuts

    def _bracket(self, unit: Unit) -> _Bracket:
        """The bracket of a group of names of one vector, from a sample."""
        group, vector = unit
        size, kept = self.size[group], self.kept[group]
        wanted = max(SAMPLE, round(2 * size ** (2 / 3)))
        if size <= 8 * wanted:
            return _Bracket(-1.0, math.inf, size)
        source, fusion = self.fusion.sources[vector], self.fusion
        parts = [_sample(source, key, fusion, size // wanted) for key in self.groups[group]]
        sample = torch.cat([part.to("cpu", self.dtype[group]) for part in parts]).abs_().numpy()
        sample.sort()
        rank, deviation = len(sample) * kept / size, math.sqrt(len(sample) * kept * (size - kept)) / size
        first, last = math.floor(rank - DEVIATIONS * deviation) - 1, math.ceil(rank + DEVIATIONS * deviation) + 1
        high = float(sample[len(sample) - first]) if first > 0 else math.inf
        low = float(sample[len(sample) - last]) if last <= len(sample) else -1.0
        expected = 2 * DEVIATIONS * deviation / len(sample)  # as a share
        return _Bracket(low, high, round(4096 + 16 * expected * self._longest(group)))

    def _longest(self, group: int) -> int:
        return max(stop - start for _, start, stop in self.fusion._pieces(self.groups[group]))

    def _by_bits(self, units: list[Unit]) -> dict[Unit, float]:
        """The thresholds exactly, from histograms of the bits of the magnitudes: eight bits a pass."""
        result: dict[Unit, float] = {}
        for dtype, whole, width in ((torch.float32, torch.int32, 32), (torch.float64, torch.int64, 64)):
            chosen = {unit: (0, self.kept[unit[0]]) for unit in units if self.dtype[unit[0]] == dtype}
            keys = [key for index in sorted({index for index, _ in chosen}) for key in self.groups[index]]
            for shift in range(width - 8, -1, -8) if chosen else ():

                def look(
                    piece: Piece, shift: int = shift, dtype: torch.dtype = dtype, whole: torch.dtype = whole
                ) -> list[tuple[Unit, Tensor]]:
                    seen, group = [], self.group[piece.key]
                    for vector, part in enumerate(piece.parts):
                        if (group, vector) in chosen:  # noqa: B023 (used before the next turn)
                            prefix, _ = chosen[group, vector]  # noqa: B023
                            counts = torch.zeros(256, dtype=torch.int64)
                            for block in part.split(BLOCK if part.device.type == "cpu" else len(part)):
                                bits = block.to(dtype).abs().view(whole) >> shift
                                digits = (bits[bits >> 8 == prefix] & 255).long()
                                counts += torch.bincount(digits, minlength=256).cpu()
                            seen.append(((group, vector), counts))
                    return seen

                totals: dict[Unit, Tensor] = {}
                for seen in self.fusion.survey(look, keys=keys, weighted=False):
                    for unit, counts in seen:
                        totals[unit] = totals[unit] + counts if unit in totals else counts
                for unit, total in totals.items():
                    prefix, left = chosen[unit]
                    for digit in range(255, -1, -1):  # from the largest magnitude down
                        if left <= int(total[digit]):
                            break
                        left -= int(total[digit])
                    chosen[unit] = (prefix << 8 | digit, left)
            for unit, (bits, _) in chosen.items():
                result[unit] = float(torch.tensor(bits, dtype=whole).view(dtype))
        return result


def _sample(source: Source, key: str, fusion: Fusion, stride: int) -> Tensor:
    """About every `stride`-th entry of a tensor."""
    while math.gcd(stride, 2 * 3 * 5 * 7 * 11 * 13) > 1:  # not the same columns of every row
        stride += 1
    dtype, spec = fusion.compute[key], source.specs[key]
    if isinstance(source, Stored) and source.sliceable(key):
        return source.tensors[key].view(-1)[stride // 2 :: stride].to(dtype)
    if not source.sliceable(key):
        return source.whole(key, dtype).reshape(-1)[stride // 2 :: stride]
    runs = []
    for start in range(0, spec.size, RUN * stride):
        stop = min(start + RUN, spec.size)
        buffer = torch.empty(stop - start, dtype=dtype, device=fusion.specs[key].device)
        runs.append(source.read(key, start, stop, buffer))
    return torch.cat(runs) if runs else torch.empty(0, dtype=dtype)


def _census(part: Tensor, piece: Piece, bracket: _Bracket, dtype: torch.dtype) -> _Census:
    size = torch.abs(part, out=piece.spare(0, len(piece)))
    if size.dtype != dtype:
        size = size.to(dtype)
    low, high, most = bracket
    if part.device.type != "cpu":
        return _census_by_torch(size, low, high, most)
    if low < 0 and math.isinf(high):
        return _Census(len(size), len(size), 0, 0, size.clone())
    values = size.numpy()
    entries = -(-len(piece) // 4)  # four bytes each, at least
    flags, others = (piece.spare(slot, entries).view(torch.bool).numpy()[: len(values)] for slot in (1, 2))
    from_low = int(np.count_nonzero(np.greater_equal(values, low, out=flags)))
    above_high = int(np.count_nonzero(np.greater(values, high, out=others)))
    if from_low - above_high <= most:  # nearly always: few enough to be looked at one by one
        closed = values[np.logical_xor(flags, others, out=flags)]
        at_low, at_high = int(np.count_nonzero(closed == low)), int(np.count_nonzero(closed == high))
        if at_low or at_high:
            closed = closed[(closed > low) & (closed < high)]
        return _Census(from_low, from_low - at_low, above_high + at_high, above_high, torch.from_numpy(closed))
    from_high = int(np.count_nonzero(np.greater_equal(values, high, out=flags)))
    above_low = int(np.count_nonzero(np.greater(values, low, out=others)))
    if above_low - from_high > most:
        inside = None
    elif above_low > from_high:
        inside = torch.from_numpy(values[np.logical_xor(flags, others, out=flags)])
    else:
        inside = size.new_empty(0)
    return _Census(from_low, above_low, from_high, above_high, inside)


def _census_by_torch(size: Tensor, low: float, high: float, most: int) -> _Census:
    """The same on any device."""
    inside = (size > low) & (size < high)
    counts = torch.stack([(size >= low).sum(), (size > low).sum(), (size >= high).sum(), (size > high).sum()])
    from_low, above_low, from_high, above_high = counts.tolist()
    return _Census(from_low, above_low, from_high, above_high, None if inside.sum() > most else size[inside])


def _settled(bracket: _Bracket, census: list[tuple[Place, _Census]], kept: int) -> Cut | None:
    """The cut after the `kept` largest, if the bracket holds their smallest."""
    from_low, above_low = sum(c.from_low for _, c in census), sum(c.above_low for _, c in census)
    from_high, above_high = sum(c.from_high for _, c in census), sum(c.above_high for _, c in census)
    if above_high < kept <= from_high:
        return cut_after(bracket.high, kept - above_high, [(place, c.from_high - c.above_high) for place, c in census])
    if from_high < kept <= above_low:
        inside = [c.inside for _, c in census if c.inside is not None]
        if len(inside) < len(census):
            return None
        threshold, left, equal = _among(torch.cat(inside), kept - from_high)
        if left == equal:
            return Cut(threshold, None)
        return cut_after(threshold, left, [(place, int((c.inside == threshold).sum())) for place, c in census])  # type: ignore[union-attr]
    if above_low < kept <= from_low:
        return cut_after(bracket.low, kept - above_low, [(place, c.from_low - c.above_low) for place, c in census])
    return None


def _among(values: Tensor, kept: int) -> tuple[float, int, int]:
    """The smallest of the `kept` largest values, how many equal to it are kept, and how many there are."""
    place = len(values) - kept
    if values.device.type != "cpu":
        return _among_by_torch(values, kept)
    array = values.numpy()
    array.partition(place)
    threshold = array[place]
    larger, equal = np.count_nonzero(array[place:] > threshold), np.count_nonzero(array == threshold)
    return float(threshold), kept - int(larger), int(equal)


def _among_by_torch(values: Tensor, kept: int) -> tuple[float, int, int]:
    """The same on any device."""
    threshold = values.sort().values[len(values) - kept]
    larger, equal = torch.stack([(values > threshold).sum(), (values == threshold).sum()]).tolist()
    return float(threshold), kept - larger, equal
