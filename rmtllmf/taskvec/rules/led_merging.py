"""LED-Merging: locate what a task needs, elect what base and fine-tuned model agree on, give it to that task alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, all_finite, check_keys, finite_number, select_names
from ...errors import InputError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from .._sources import Stored
from ..vector import TaskVector
from ._cut import Cut, at_most
from ._selection import largest
from ._statistics import beside, checked, listed, shares

__all__ = ["led_masks", "led_merging"]

Unit: TypeAlias = Literal["entry", "neuron"]
Within: TypeAlias = Literal["tensor", "model"]


def led_merging(
    vectors: Iterable[Tensors],
    base_scores: Iterable[Tensors],
    finetuned_scores: Iterable[Tensors],
    ratios: float | Sequence[float],
    *,
    unit: Unit = "entry",
    within: Within = "tensor",
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of LED-Merging: every task alone where it alone is elected, the base everywhere else.

    .. math:: \tau = \lambda \sum_{q=1}^{N} m_q \odot \tau_q, \qquad
              m_q = e_q \odot \prod_{p \ne q} (1 - e_p), \qquad
              e_q = \operatorname{top}_{r_q}(s_q^{\text{base}}) \odot \operatorname{top}_{r_q}(s_q^{\text{ft}})

    where :math:`\operatorname{top}_r(s)` is 1 for the share r of the entries with the largest scores and 0 for all
    others (location), :math:`e_q` is what the scores of both models agree on (election), and :math:`m_q` has lost what
    another task elects too (disjoint). Masks of different tasks never overlap. See `led_masks`.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        base_scores: for each vector the importance of every entry of the base model for that vector's task, at least 0:
            `snip_scores` of the base model on the task's data. Tied names need one entry; other names do not matter.
        finetuned_scores: the same of the model that was fine-tuned for the task.
        ratios: :math:`r_q` in (0, 1], one for all tasks or one for each. The authors take .1 for safety, .4 for
            mathematics and .5 for code with Llama 3.
        unit, within: of the selection, see `led_masks`.
        scale: :math:`\lambda`; 1, as no two tasks add up anywhere. For one of its own for each task use ``weights``.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors; they elect nothing.

    Returns:
        The update, a `TaskVector`. With one task and a ratio of 1 it is the task's vector.

    Raises:
        InputError: a ratio outside (0, 1], a negative score, or an option that is none. ShapeError: not as many scores
        or ratios as vectors. StateMismatchError: keys or shapes disagree, or scores lack a name. NonFiniteError: NaN or
        infinity in a vector or a score.

    Note:
        Scores are read piece by piece beside the vectors and no mask is kept: the memory is that of `ties`.

    Source: Ma et al., "LED-Merging: mitigating safety-utility conflicts in model merging with
    location-election-disjoint", 2025.

    Example:
        >>> import torch
        >>> vectors = [{"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"w": torch.tensor([10.0, 20.0, 30.0, 40.0])}]
        >>> base = [{"w": torch.tensor([9.0, 8.0, 1.0, 0.0])}, {"w": torch.tensor([0.0, 9.0, 8.0, 1.0])}]
        >>> tuned = [{"w": torch.tensor([5.0, 7.0, 1.0, 0.0])}, {"w": torch.tensor([0.0, 7.0, 6.0, 2.0])}]
        >>> dict(led_merging(vectors, base, tuned, 0.5))  # both elect the second entry; nobody the last one
        {'w': tensor([ 1.,  0., 30.,  0.])}
    """
    factor = finite_number(scale, "scale")
    fusion = Fusion(vectors, options)
    numbers = shares(ratios, "ratios", fusion.count)
    shapes = {key: fusion.specs[key].shape for key in fusion.keys}
    base, finetuned = beside(fusion, base_scores, "base_scores"), beside(fusion, finetuned_scores, "finetuned_scores")
    election = _Election(shapes, base, finetuned, numbers, unit, within)

    def combine(piece: Piece) -> None:
        if not all(map(all_finite, piece.parts)):  # what is masked could not be blamed any more
            raise fusion.blame(piece.key)
        into = piece.into.zero_()
        for part, mask in zip(piece.parts, election.alone(piece.key, piece.start, piece.stop), strict=True):
            torch.where(mask.to(into.device), part, into, out=into)
        if factor != 1:
            into.mul_(factor)

    return fusion.by_entry(combine, positional=True)


def led_masks(
    base_scores: Iterable[Tensors],
    finetuned_scores: Iterable[Tensors],
    ratios: float | Sequence[float],
    *,
    unit: Unit = "entry",
    within: Within = "tensor",
    disjoint: bool = True,
    skip: str | Iterable[str] = (),
) -> list[dict[str, Tensor]]:
    r"""The masks :math:`m_q` of `led_merging`: for each task the entries that it, and no other task, elects.

    Of n entries exactly ``max(1, floor(r n))`` are located; of those that equal the smallest score located, the first,
    in the flat order of the sorted names. But an entry of score 0, on which the task does not depend, is located by a
    ratio of 1 only: it would keep others from what they need.

    Args:
        base_scores, finetuned_scores, ratios: as for `led_merging`.
        unit: "entry", as the authors' code has it; or "neuron": whole rows of matrices (all that has the same first
            index), which are scored with the sum of their entries' scores. Each entry of a vector (a bias, a norm) is a
            row of its own.
        within: the share is that of each "tensor", as the authors' code has it; or of the "model" as a whole, where
            scores of different tensors compete.
        disjoint: False for what is elected, :math:`e_q`, before conflicts are left out.
        skip: names or glob patterns that are left alone.

    Returns:
        For each task a mapping of name -> boolean tensor in the shape of the scores.

    Raises:
        As `led_merging`.

    Source: Ma et al., "LED-Merging: mitigating safety-utility conflicts in model merging with
    location-election-disjoint", 2025. The authors' code locates all entries that equal the smallest score.

    Example:
        >>> import torch
        >>> scores = [{"w": torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])}]
        >>> led_masks(scores, scores, 0.34, unit="neuron")[0]["w"].tolist()
        [[True, True], [False, False], [False, False]]
    """
    base = listed(base_scores, "base_scores")
    finetuned = listed(finetuned_scores, "finetuned_scores", len(base))
    skipped = set(select_names(base[0], skip, "skip"))
    shapes = {key: tuple(tensor.shape) for key, tensor in base[0].items() if key not in skipped}
    if not shapes:
        raise InputError("skip: leaves nothing to elect")

    def of(mappings: list[Tensors], argument: str) -> list[dict[str, Tensor]]:
        wanted = [{key: mapping[key] for key in mapping if key not in skipped} for mapping in mappings]
        for index, scores in enumerate(wanted):
            check_keys(scores, shapes, f"{argument}[{index}]", "base_scores[0]")
        return [checked(scores, shapes, f"{argument}[{index}]") for index, scores in enumerate(wanted)]

    numbers = shares(ratios, "ratios", len(base))
    election = _Election(shapes, of(base, "base_scores"), of(finetuned, "finetuned_scores"), numbers, unit, within)
    choose = election.alone if disjoint else election.elected
    masks: list[dict[str, Tensor]] = [{} for _ in base]
    for key, shape in shapes.items():
        for mask, chosen in zip(masks, choose(key, 0, prod(shape)), strict=True):
            mask[key] = chosen.view(shape)
    return masks


class _Election:
    """What each task elects, for any part of a tensor."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        base: Sequence[dict[str, Tensor]],
        finetuned: Sequence[dict[str, Tensor]],
        ratios: Sequence[float],
        unit: Unit,
        within: Within,
    ) -> None:
        for argument, value, choices in ("unit", unit, Unit), ("within", within, Within):
            if value not in get_args(choices):
                expected = " or ".join(repr(choice) for choice in get_args(choices))
                raise InputError(f"{argument}: expected {expected}, got {value!r}")
        self.length = {key: prod(shape[1:]) if unit == "neuron" else 1 for key, shape in shapes.items()}
        self.located = [
            _Located([by_row(scores) if unit == "neuron" else scores for scores in pair], ratio, within)
            for *pair, ratio in zip(base, finetuned, ratios, strict=True)
        ]

    def elected(self, key: str, start: int, stop: int) -> list[Tensor]:
        """For each task which of the flattened entries [start, stop) both of its models locate."""
        length = self.length[key]
        if length == 1:
            return [located.by_both(key, start, stop) for located in self.located]
        if start == stop:
            return [torch.empty(0, dtype=torch.bool) for _ in self.located]
        first, last = start // length, -(-stop // length)
        cut = slice(start - first * length, stop - first * length)
        return [located.by_both(key, first, last).repeat_interleave(length)[cut] for located in self.located]

    def alone(self, key: str, start: int, stop: int) -> list[Tensor]:
        """The same without what several tasks elect."""
        masks = self.elected(key, start, stop)
        once = masks[0].clone()
        twice = torch.zeros_like(once)
        for mask in masks[1:]:
            twice |= once & mask
            once |= mask
        return [mask.logical_and_(~twice) for mask in masks]


def by_row(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of the rows of matrices and of what has more dimensions; all else as it is."""
    return {k: t.flatten(1).sum(1, dtype=torch.float64) if t.ndim > 1 else t for k, t in scores.items()}


class _Located:
    """Where the scores of two models, for one task, are among the largest."""

    def __init__(self, models: Sequence[Mapping[str, Tensor]], ratio: float, within: Within) -> None:
        self.scores = Fusion([Stored(scores, "scores") for scores in models], {})
        fusion = self.scores
        self.lines: dict[str, list[_Line]] = {}
        cuts: dict[str, list[Cut]] = {}
        if ratio < 1:
            cuts = largest(fusion, [fusion.keys] if within == "model" else [[key] for key in fusion.keys], ratio)
        for key in fusion.keys:
            lines = [_line(fusion, key, index, cut) for index, cut in enumerate(cuts.get(key, ()))]
            self.lines[key] = lines or [_Line(-1.0, fusion.specs[key].size)] * len(models)

    def by_both(self, key: str, start: int, stop: int) -> Tensor:
        """Which of the entries [start, stop) all models locate."""
        fusion = self.scores
        name = fusion.alias.get(key, key)
        dtype, device = fusion.compute[name], fusion.specs[name].device
        found: Tensor | None = None
        for source, line in zip(fusion.sources, self.lines[name], strict=True):
            part = source.view(name, start, stop, dtype, device)
            if part is None:
                part = source.read(name, start, stop, torch.empty(stop - start, dtype=dtype, device=device))
            located = line.located(part, start)
            found = located if found is None else found.logical_and_(located)
        return found  # type: ignore[return-value]


class _Line(NamedTuple):
    """Scores above `threshold` are located, and those equal to it at entries before `end`."""

    threshold: float
    end: int

    def located(self, scores: Tensor, start: int) -> Tensor:
        """Which of the scores of entries from `start` on are."""
        end = self.end - start
        if end >= len(scores):
            return scores >= self.threshold
        found = scores > self.threshold
        if end > 0:
            found[:end] |= scores[:end] == self.threshold
        return found


def _line(fusion: Fusion, key: str, index: int, cut: Cut) -> _Line:
    """The same as a cut, for pieces of any length, and without entries of score 0."""
    if cut.threshold <= 0:
        return _Line(0.0, 0)
    threshold = at_most(cut.threshold, fusion.compute[key])
    if threshold < cut.threshold:  # found in a tensor of higher precision: nothing here equals it
        return _Line(threshold, 0)
    if cut.room is None:
        return _Line(threshold, fusion.specs[key].size)
    end = 0
    for _, start, stop in fusion._pieces([key]):
        room = cut.room.get((key, start), 0)
        if room is None:
            end = stop
        elif room:
            part = fusion.sources[index].whole(key, fusion.compute[key]).reshape(-1)[start:stop]
            equal = (part == threshold).nonzero()
            end = start + int(equal[room, 0]) if len(equal) > room else stop
    return _Line(threshold, end)
