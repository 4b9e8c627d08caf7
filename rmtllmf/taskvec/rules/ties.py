"""TIES-Merging: trim each task vector, elect signs, and merge what agrees with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, all_finite, finite_number
from ...errors import InputError
from .._engine import BLOCK, Fusion, Piece
from .._options import FusionOptions
from ..vector import TaskVector
from ._cut import Cut
from ._selection import largest

__all__ = ["ties"]

Trim = Literal["global", "tensor"]
Combine = Literal["mean", "sum", "weighted mean"]
Elect = Literal["mass", "count"]
Voters = Literal["weighted", "trimmed"]
Undecided = Literal["zero", "positive", "majority"]


def ties(
    vectors: Iterable[Tensors],
    density: float = 0.2,
    *,
    scale: float = 1.0,
    trim: Trim = "global",
    combine: Combine = "mean",
    elect: Elect = "mass",
    voters: Voters = "weighted",
    undecided: Undecided = "zero",
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of TIES-Merging: trim, elect signs, disjoint merge.

    .. math:: \tau = \lambda \, \frac{1}{|A|} \sum_{q \in A} \hat\tau_q, \qquad
              A = \{q : \operatorname{sgn} \hat\tau_q = \gamma \neq 0\}, \qquad
              \gamma = \operatorname{sgn} \sum_q \hat\tau_q

    entry by entry, where :math:`\hat\tau_q` is :math:`\tau_q` with all but its largest magnitudes set to zero; where
    :math:`A` is empty :math:`\tau = 0`. Of n entries exactly ``max(1, floor(density n))`` are kept; of those that equal
    the smallest magnitude kept, the first, in the flat order of the sorted names. Tied names count once.

    The paper's choices are the defaults; the options are what the implementations in use do otherwise.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        density: the share of entries that is kept, in (0, 1]; 1 is all of them, not one percent.
        scale: :math:`\lambda`, which the paper tunes on held-out data (1 where there is none).
        trim: "global": one threshold for a whole vector (the paper, the authors' code, FusionBench), or "tensor": one
            for each tensor of it (PEFT and mergekit).
        combine: "mean" of those that agree (the paper, PEFT); their "sum" (an option of the authors' code and of
            FusionBench; mergekit without ``normalize``); or "weighted mean", the sum divided by the weights of those
            that agree, by 1 where these add up to 0 (mergekit with ``normalize``). Without weights this is the mean.
        elect: by "mass", as in the formula, or by "count": each nonzero entry is one vote ("frequency" in PEFT, "count"
            in mergekit).
        voters: who has weights elects with the "weighted" values (mergekit), or with the values "trimmed" but not yet
            weighted (PEFT). All weight what is then merged, and divide the mean by how many agree. The paper has none.
        undecided: the sign where the election is an exact draw. "zero": none, so that the update is 0 there (the
            paper); "positive" (PEFT, mergekit); "majority": the sign that most entries of the whole update have, and
            none if even these are even (the authors' code, FusionBench).
        options: as for every rule, see `FusionOptions`. Weights apply after trimming; with weighted voters and the same
            weight for all names of a vector, or with ``trim="tensor"``, this is TIES of :math:`w_q \tau_q`.

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: a `density` outside (0, 1], an option that is none, no vectors, or a `scale` that is not finite.
        StateMismatchError: keys or shapes disagree. NonFiniteError: NaN or infinity in a vector, or overflow.

    Source: Yadav et al., "TIES-Merging: resolving interference when merging models", 2023, algorithm 1.

    Example:
        >>> import torch
        >>> a = {"w": torch.tensor([4.0, 0.1, -3.0, 0.0])}
        >>> b = {"w": torch.tensor([2.0, 0.2, 5.0, 0.3])}
        >>> dict(ties([a, b], density=0.5))  # 4 and 2 agree; 5 outvotes -3
        {'w': tensor([3., 0., 5., 0.])}
        >>> dict(ties([a, b], density=0.5, combine="sum", scale=0.5))
        {'w': tensor([3.0000, 0.0000, 2.5000, 0.0000])}
    """
    for argument, value, choices in (
        ("trim", trim, Trim),
        ("combine", combine, Combine),
        ("elect", elect, Elect),
        ("voters", voters, Voters),
        ("undecided", undecided, Undecided),
    ):
        if value not in get_args(choices):
            expected = ", ".join(repr(choice) for choice in get_args(choices))
            raise InputError(f"{argument}: expected one of {expected}, got {value!r}")
    density, factor = finite_number(density, "density"), finite_number(scale, "scale")
    if not 0 < density <= 1:
        raise InputError(f"density: expected a share in (0, 1], where 1 keeps all, got {density:g}")
    fusion = Fusion(vectors, options)
    fusion.lengthen(4)
    groups = [fusion.keys] if trim == "global" else [[key] for key in fusion.keys]
    cuts = largest(fusion, groups, density) if density < 1 else {}
    trimmed = _trimmer(fusion, cuts, weighted=voters == "weighted")
    election = _Election(fusion, trimmed, elect, undecided)

    def merge(piece: Piece) -> None:
        for block in _blocks(piece):
            values = trimmed(piece, block)
            sign = election.signs(piece, values)
            agreeing, votes = (piece.spare(fusion.count + slot, len(sign)) for slot in (1, 2))
            into = piece.into[block].zero_()
            votes.zero_()
            for value, weight in zip(values, fusion.weights(piece.key), strict=True):
                torch.mul(value, sign, out=agreeing).clamp_min_(0)
                into.add_(agreeing, alpha=1.0 if voters == "weighted" else weight)
                if combine != "sum":
                    votes.add_(agreeing.gt_(0), alpha=weight if combine == "weighted mean" else 1.0)
            into.mul_(sign)
            if combine == "weighted mean":
                into.div_(votes.masked_fill_(votes == 0, 1.0))
            elif combine == "mean":
                into.div_(votes.clamp_min_(1))
            if factor != 1:
                into.mul_(factor)

    surplus = any(cut.room is not None for row in cuts.values() for cut in row)  # equal magnitudes: the first are kept
    return fusion.by_entry(merge, weighted=False, positional=surplus)


def _blocks(piece: Piece) -> Iterator[slice]:
    """Parts of the piece of which the trimmed values of all vectors stay in the cache of a core."""
    longest = BLOCK if piece.into.device.type == "cpu" else len(piece)
    for start in range(0, len(piece), longest):
        yield slice(start, min(start + longest, len(piece)))


def _trimmer(
    fusion: Fusion, cuts: Mapping[str, Sequence[Cut]], *, weighted: bool
) -> Callable[[Piece, slice], list[Tensor]]:
    """Piece, block -> the trimmed values of all vectors, in the piece's spare memory or untouched."""

    def trimmed(piece: Piece, block: slice) -> list[Tensor]:
        values = []
        for vector, weight in enumerate(fusion.weights(piece.key)):
            spare = piece.spare(vector, block.stop - block.start)
            value = piece.parts[vector][block]
            if cuts:
                value = cuts[piece.key][vector].keep(vector, piece, block, spare)
            values.append(torch.mul(value, weight, out=spare) if weighted and weight != 1 else value)
        return values

    return trimmed


class _Election:
    """The elected signs, and who decides a draw."""

    def __init__(
        self, fusion: Fusion, trimmed: Callable[[Piece, slice], list[Tensor]], elect: Elect, undecided: Undecided
    ) -> None:
        self.fusion, self.by_count, self.draw = fusion, elect == "count", undecided
        self.majority = 0.0
        if undecided == "majority":

            def lead(piece: Piece) -> float:
                signs = (self.signs(piece, trimmed(piece, block)) for block in _blocks(piece))
                return sum(float(sign.sum(dtype=torch.float64)) for sign in signs)

            total = sum(fusion.survey(lead, weighted=False))
            self.majority = float((total > 0) - (total < 0))

    def signs(self, piece: Piece, values: Sequence[Tensor]) -> Tensor:
        """1, -1 or 0 for each entry, in the piece's spare memory."""
        total, vote = (piece.spare(self.fusion.count + slot, len(values[0])) for slot in (0, 1))
        total.zero_()
        for value in values:
            if self.by_count and not all_finite(value):  # infinite mass wins or is NaN, but it might lose by count
                raise self.fusion.blame(piece.key)
            total.add_(torch.sign(value, out=vote) if self.by_count else value)
        if self.draw == "positive":
            return total.ge_(0).mul_(2).sub_(1)
        total.sign_()
        return total.masked_fill_(total == 0, self.majority) if self.majority else total
