"""Consensus merging: what only few tasks need is left out of the sum; and the masks that say which task needs what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, all_finite, finite_number, heuristic_scale, whole_number
from ...errors import InputError, NonFiniteError
from .._engine import Fusion, Piece
from .._options import FusionOptions, Weights, one_or_each
from .._sources import Source
from ..vector import TaskVector
from ._companion import companion

__all__ = ["consensus", "tall_masks"]

Threshold: TypeAlias = float | Sequence[float]


def consensus(
    vectors: Iterable[Tensors],
    threshold: Threshold = 0.4,
    agreement: int = 2,
    *,
    merged: Tensors | None = None,
    scale: float | None = None,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The sum of the task vectors, where at least k tasks need it.

    .. math:: \tau = \lambda_N \, \tau_{\text{MTL}} \odot \Big[ \sum_{q=1}^{N} m_q \ge k \Big], \qquad
              \tau_{\text{MTL}} = \sum_{q=1}^{N} \tau_q

    with the masks :math:`m_q` of `tall_masks`. k = 1 removes "catastrophic" entries, that help no task; k = 2 also
    "selfish" ones, that help a single task; k = N keeps what helps all; k = 0 is task arithmetic.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        threshold: of the masks, see `tall_masks`.
        agreement: k, between 0 and N; 2, as in the source.
        merged: what takes the place of :math:`\tau_{\text{MTL}}`, in the masks and in the sum. The source's second
            variant is ``consensus(vectors, merged=ties(vectors, combine="sum"))``. Not written to.
        scale: :math:`\lambda_N`; None: `heuristic_scale` of N. The source tunes it on validation data.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors (not `merged`).

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: `agreement` is more than N (nothing would be left), or `threshold` is negative.
        StateMismatchError: `merged` has other names, shapes or ties. Otherwise as `task_arithmetic`.

    Source: Wang et al., "Localizing task information for improved model merging and compression", 2024, sections 4 and
    5.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([1.0, 1.0, 3.0])}, {"w": torch.tensor([1.0, -1.0, 0.0])}
        >>> dict(consensus([a, b], scale=1.0))
        {'w': tensor([2., 0., 0.])}
    """
    factor = None if scale is None else finite_number(scale, "scale")
    fusion = Fusion(vectors, options)
    election = Election(fusion, threshold, merged)
    agreement = whole_number(agreement, "agreement", at_least=0)
    if agreement > fusion.count:
        raise InputError(f"agreement: {agreement} tasks cannot agree, there are {fusion.count}; nothing would be left")
    factor = heuristic_scale(fusion.count) if factor is None else factor

    def combine(piece: Piece) -> None:
        total = election.total(piece, piece.into)  # known to be finite: what is masked could not be blamed any more
        votes = torch.zeros(len(piece), dtype=torch.int32, device=total.device)
        for elected in election.elected(piece, total):
            votes += elected
        torch.mul(total, factor, out=piece.into)
        piece.into.masked_fill_(votes < agreement, 0.0)

    return fusion.by_entry(combine, positional=merged is not None)


def tall_masks(
    vectors: Iterable[Tensors],
    threshold: Threshold = 0.4,
    *,
    merged: Tensors | None = None,
    weights: Weights | None = None,
    skip: str | Iterable[str] = (),
) -> list[dict[str, Tensor]]:
    r"""Which entries of the sum carry each task: where it is not much further from the task than the base is.

    .. math:: m_q = \big[ |\tau_q| \ge \lambda_q \, |\tau_{\text{MTL}} - \tau_q| \big], \qquad
              \tau_{\text{MTL}} = \sum_{q=1}^{N} \tau_q

    The sum with task q's mask on it comes close to task q's own vector.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes.
        threshold: :math:`\lambda_q`, a number or one for each task; the larger, the sparser the mask. The source picks
            each of .2, .3, .4, .5, .6 that is best on the task's validation data; the default is the middle one.
        merged: what takes the place of :math:`\tau_{\text{MTL}}`, for example a TIES sum.
        weights, skip: as in `FusionOptions`.

    Returns:
        For each vector a mapping of name -> boolean tensor in the shape of the entry.

    Raises:
        InputError: `threshold` is negative. NonFiniteError: NaN or infinity in a vector. Otherwise as
            `task_arithmetic`.

    Source: Wang et al., "Localizing task information for improved model merging and compression", 2024, section 4. The
    paper has :math:`\ge`, the authors' code :math:`>`; they differ where an entry of all tasks is 0, which is counted
    here as elected and changes nothing, and where both sides happen to be equal.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([1.0, 1.0, 3.0])}, {"w": torch.tensor([1.0, -1.0, 0.0])}
        >>> [mask["w"].tolist() for mask in tall_masks([a, b])]
        [[True, True, True], [True, True, False]]
    """
    fusion = Fusion(vectors, {"weights": weights, "skip": skip})
    election = Election(fusion, threshold, merged)
    masks = [
        {key: torch.empty(s.shape, dtype=torch.bool, device=s.device) for key, s in fusion.specs.items()}
        for _ in range(fusion.count)
    ]

    def look(piece: Piece) -> None:
        total = election.total(piece, piece.spare(2, len(piece)))
        for mask, elected in zip(masks, election.elected(piece, total), strict=True):
            mask[piece.key].view(-1)[piece.start : piece.stop] = elected

    fusion.survey(look)
    for mask in masks:
        mask |= {key: mask[original] for key, original in fusion.alias.items()}
    return [{key: mask[key] for key in fusion.sources[0].specs if key in mask} for mask in masks]


class Election:
    """The multi-task vector, and what each task elects of it, piece by piece."""

    def __init__(self, fusion: Fusion, threshold: Threshold, merged: Tensors | None) -> None:
        self.fusion, self.thresholds = fusion, _thresholds(threshold, fusion.count)
        self.merged: Source | None = None
        if merged is not None:
            self.merged = companion(merged, "merged", fusion)

    def total(self, piece: Piece, into: Tensor) -> Tensor:
        """The multi-task vector, finite like the vectors, not to be written to; `into` may hold it."""
        if self.merged is not None:
            total = self.merged.read(piece.key, piece.start, piece.stop, into)
            if not all_finite(total):
                raise NonFiniteError(f"merged[{piece.key!r}] holds non-finite entries; expected finite numbers")
        else:
            total = into.copy_(piece.parts[0])
            for part in piece.parts[1:]:
                total.add_(part)
        if not all(map(all_finite, piece.parts if self.merged is not None else [total])):
            raise self.fusion.blame(piece.key)
        return total

    def elected(self, piece: Piece, total: Tensor) -> Iterable[Tensor]:
        """For each vector where it elects `total`."""
        for part, threshold in zip(piece.parts, self.thresholds, strict=True):
            apart = torch.sub(total, part, out=piece.spare(0, len(piece))).abs_().mul_(threshold)
            yield torch.abs(part, out=piece.spare(1, len(piece))) >= apart


def _thresholds(threshold: Threshold, count: int) -> list[float]:
    numbers = one_or_each(threshold, "threshold", count)
    if min(numbers) < 0:
        raise InputError(f"threshold: expected a number of at least 0, got {min(numbers)}")
    return numbers
