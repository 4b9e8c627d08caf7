"""PCB-Merging: entries of the task vectors compete, in their vector and with the others, for a part in the mean."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, all_finite, finite_number
from ...errors import InputError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from .._sources import Source
from ..vector import TaskVector
from ._selection import largest
from ._shares import ceil_of, floor_of

__all__ = ["pcb_merging"]


def pcb_merging(
    vectors: Iterable[Tensors],
    density: float = 0.1,
    *,
    clip: float = 1e-4,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""A mean of the vectors, entry by entry weighted by how well each fares in the competition of parameters.

    .. math:: \tau = \lambda \, \frac{\sum_q \hat\beta_q \odot \tau_q}{\sum_q \hat\beta_q}, \qquad
              \hat\beta_q = \operatorname{norm}(\max(\beta_q, r_q)), \qquad
              \beta_q = e^{N \operatorname{norm}(|\tau_q|)^2} \odot \tanh\Big(\tau_q \odot \sum_{p=1}^{N} \tau_p\Big)

    The first factor of :math:`\beta_q` (intra-balancing) prefers what is large in its own vector, the second one
    (inter-balancing) what agrees with the sum of all. :math:`r_q` is the smallest of the ``ceil(density n)`` largest of
    all n entries of :math:`\beta_q`, so that the others, and it itself, have no weight; where no vector has any,
    :math:`\tau = 0`. :math:`\operatorname{norm}` moves and scales the entries of a whole vector to [0, 1].

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        density: r, in (0, 1], the share of entries of each vector that takes part.
        clip: the share of entries at either end of the magnitudes of a vector that is first set to the next one: of n,
            ``ceil(clip n)`` largest and ``floor(clip n)`` smallest.
        scale: :math:`\lambda`. The source searches it, or one for each task, on validation data.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors in the mean only, like the
            source's coefficients of the tasks: they do not change who wins.

    Returns:
        The update, a `TaskVector`. Nothing is held as a whole; the vectors are read about six times.

    Raises:
        InputError: a `density` outside (0, 1] or a `clip` outside [0, 0.5), no vectors, or a `scale` that is not
            finite. StateMismatchError: keys or shapes disagree. NonFiniteError: NaN or infinity in a vector.

    Source: Du et al., "Parameter competition balancing for model merging", 2024, section 3, as in the authors' code:
    the paper writes both factors as a softmax of normalised products. As there the second one is not free of scale: it
    is linear for the small entries of real task vectors, and a sign for large ones.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([3.0, 1.0, 0.1, 0.2])}, {"w": torch.tensor([-1.0, 2.0, 4.0, 0.1])}
        >>> dict(pcb_merging([a, b], 0.5, clip=0.0))
        {'w': tensor([3., 0., 4., 0.])}
    """
    share, cut, factor = finite_number(density, "density"), finite_number(clip, "clip"), finite_number(scale, "scale")
    if not 0 < share <= 1:
        raise InputError(f"density: expected a share in (0, 1], where 1 keeps all, got {share:g}")
    if not 0 <= cut < 0.5:
        raise InputError(f"clip: expected a share in [0, 0.5), got {cut:g}")
    fusion = Fusion(vectors, options)
    _check_finite(fusion)
    ranges = _ranges(fusion, cut)
    bounds = _bounds(fusion, ranges, share, options)

    def merge(piece: Piece) -> None:
        total, score, spare, sign, weights = (piece.spare(slot, len(piece)) for slot in range(5))
        total.zero_()
        for part in piece.parts:
            total.add_(part)
        piece.into.zero_()
        weights.zero_()
        for index, weight in enumerate(fusion.weights(piece.key)):
            part, (low, high), (lowest, highest) = piece.parts[index], ranges[index], bounds[index]
            _score(part, total, ranges[index], fusion.count, score, spare)
            if highest > lowest:
                score.sub_(lowest).clamp_min_(0).div_(highest - lowest)
            else:
                torch.ge(score, highest, out=score)
            weights.add_(score)
            torch.abs(part, out=spare).clamp_(low, high).mul_(torch.sign(part, out=sign))
            piece.into.addcmul_(score, spare, value=weight)
        piece.into.div_(weights.masked_fill_(weights == 0, 1.0))
        if factor != 1:
            piece.into.mul_(factor)

    return fusion.by_entry(merge, weighted=False)


Range = tuple[float, float]


def _check_finite(fusion: Fusion) -> None:
    """What is not finite would win, and leave no trace."""

    def look(piece: Piece) -> None:
        if not all(map(all_finite, piece.parts)):
            raise fusion.blame(piece.key)

    fusion.survey(look, weighted=False)


def _ranges(fusion: Fusion, clip: float) -> list[Range]:
    """The smallest and the largest magnitude of every vector, after clipping."""
    size = _size(fusion)
    highest = _thresholds(fusion, min(size, 1 + ceil_of(clip, size)))
    lowest = _thresholds(fusion, size - floor_of(clip, size))
    return list(zip(lowest, highest, strict=True))


def _size(fusion: Fusion) -> int:
    return sum(fusion.specs[key].size for key in fusion.keys)


def _thresholds(fusion: Fusion, kept: int) -> list[float]:
    """For every vector the smallest of its `kept` largest magnitudes."""
    cuts = largest(fusion, [fusion.keys], lambda size: kept)
    return [cut.threshold for cut in next(iter(cuts.values()), [])] or [0.0] * fusion.count


def _score(part: Tensor, total: Tensor, size: Range, count: int, out: Tensor, spare: Tensor) -> Tensor:
    """The beta of a part of a vector; `out` and `spare` are written to, and must not be the memory of the others."""
    low, high = size
    torch.abs(part, out=spare).clamp_(low, high)
    if high > low:
        spare.sub_(low).div_(high - low).square_().mul_(count).exp_()
    else:
        spare.fill_(1.0)
    return torch.mul(part, total, out=out).tanh_().mul_(spare)


def _bounds(fusion: Fusion, ranges: Sequence[Range], density: float, options: FusionOptions) -> list[Range]:
    """For every vector the threshold of its scores and their maximum."""
    survey = FusionOptions(skip=options.get("skip", ()), compute_dtype=options.get("compute_dtype"))
    sums = _Sums(fusion)
    scores = [_Scores(sums, index, size) for index, size in enumerate(ranges)]

    def look(piece: Piece) -> list[tuple[float, int, int]]:
        return [(float(s.max()), int((s > 0).sum()), int((s >= 0).sum())) for s in piece.parts]

    found = Fusion(scores, survey).survey(look)
    entries = _size(fusion)
    kept = max(1, ceil_of(density, entries))
    maxima = [max((row[index][0] for row in found), default=0.0) for index in range(fusion.count)]
    thresholds = [0.0] * fusion.count
    above: list[int] = []
    below: list[int] = []
    for index in range(fusion.count):
        positive, nonnegative = (sum(row[index][slot] for row in found) for slot in (1, 2))
        if kept <= positive:
            above.append(index)
        elif kept > nonnegative:
            below.append(index)
    # a selection goes by magnitude: from the positive scores, or from the other end of the negative ones
    for chosen, sign, count in ((above, 1.0, kept), (below, -1.0, entries - kept + 1)):
        if chosen:
            some = Fusion([_Scores(sums, index, ranges[index], sign) for index in chosen], survey)
            for index, threshold in zip(chosen, _thresholds(some, count), strict=True):
                thresholds[index] = sign * threshold
    return list(zip(thresholds, maxima, strict=True))


class _Sums:
    """Sums of all vectors; the last piece of a thread is kept, for the scores of each of them."""

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion
        self._last = threading.local()

    def read(self, key: str, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The piece and as much scratch memory, until the same thread asks for another."""
        last, wanted = self._last, (key, start, stop, like.dtype, like.device)
        if getattr(last, "piece", None) != wanted:
            last.piece = None
            if getattr(last, "memory", None) is None or last.memory.shape[1] < stop - start or last.kind != wanted[3:]:
                last.memory, last.kind = torch.empty(2, stop - start, dtype=like.dtype, device=like.device), wanted[3:]
            last.total, last.spare = last.memory[:, : stop - start]
            last.total.zero_()
            for source in self.fusion.sources:
                last.total.add_(source.read(key, start, stop, last.spare))
            last.piece = wanted
        return last.total, last.spare


@dataclass(eq=False)
class _Scores(Source):
    """The beta of one vector, made where it is read; with a sign only what has it, as a magnitude."""

    sums: _Sums
    index: int
    size: Range
    sign: float = 0.0

    def __post_init__(self) -> None:
        self.inner = self.sums.fusion.sources[self.index]
        self.label, self.specs = self.inner.label, self.inner.specs

    def sliceable(self, key: str) -> bool:
        return all(source.sliceable(key) for source in self.sums.fusion.sources)

    def identity(self, key: str) -> Hashable:
        return (id(self), self.sums.fusion.alias.get(key, key))

    def template(self, key: str) -> Tensor | None:
        return self.inner.template(key)

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        total, spare = self.sums.read(key, start, stop, buffer)
        part = self.inner.read(key, start, stop, buffer)
        if part.data_ptr() == buffer.data_ptr():
            part = part.clone()
        score = _score(part, total, self.size, self.sums.fusion.count, buffer, spare)
        return score if self.sign == 0 else score.mul_(self.sign).clamp_min_(0)
