"""EMR-Merging: elect one vector for all tasks, and for each task a mask and a factor that take it back from there."""

from __future__ import annotations

from collections.abc import Iterable
from math import fsum
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from ...errors import InputError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..masked_vectors import MaskedVectors, MaskRecorder
from ..vector import TaskVector

__all__ = ["emr", "emr_unified"]

Rescale = Literal["entries", "tensors"]


def emr(vectors: Iterable[Tensors], *, rescale: Rescale = "entries", **options: Unpack[FusionOptions]) -> MaskedVectors:
    r"""EMR-Merging: the vector of `emr_unified`, and what takes each task's own vector back from it.

    .. math:: m_q = [\tau_q \odot \tau > 0], \qquad
              \lambda_q = \frac{\sum_j |\tau_{q,j}|}{\sum_j |(m_q \odot \tau)_j|}, \qquad
              \tau_q \approx \lambda_q \, m_q \odot \tau

    so that task q's model, ``result.task_vector(q).apply_to(base)``, moves each weight the way its own fine-tuning did
    or not at all, and as far in the mean.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        rescale: sums over all "entries", as in the paper, or of the means of the "tensors", so that a bias counts as
            much as a matrix (the authors' code, FusionBench).
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, which are what is taken back.

    Returns:
        A `MaskedVectors`: the vector, N masks of one bit an entry, and N factors. A task of which no entry has the
        elected sign has the factor 0. Tied names count once. Memory is that of the result and a few pieces a thread.

    Raises:
        InputError: no vectors, or `rescale` is neither; or called by ``fuse``, which needs the rule, `emr_unified`.
        StateMismatchError: keys or shapes disagree. NonFiniteError: NaN or infinity in a vector.

    Source: Huang et al., "EMR-Merging: tuning-free high-performance model merging", 2024.

    Example:
        >>> import torch
        >>> stored = emr([{"w": torch.tensor([4.0, -1.0, 2.0])}, {"w": torch.tensor([2.0, 3.0, -1.0])}])
        >>> dict(stored.unified), stored.rescalers
        ({'w': tensor([4., 3., 2.])}, (1.1666666666666667, 0.8571428571428571))
        >>> stored.task_vector(0)["w"]
        tensor([4.6667, 0.0000, 2.3333])
    """
    if rescale not in get_args(Rescale):
        raise InputError(f"rescale: expected 'entries' or 'tensors', got {rescale!r}")
    fusion = Fusion(vectors, options)
    recorder = MaskRecorder(fusion)
    sums: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def combine(piece: Piece) -> None:
        largest, sign = _elected(piece)
        found = []
        for task, part in enumerate(piece.parts):
            spare = torch.mul(part, sign, out=piece.spare(1, len(piece)))
            chosen = spare > 0
            recorder.put(task, piece, chosen)
            own = torch.abs(part, out=spare).sum(dtype=torch.float64)
            shared = torch.mul(largest, chosen, out=spare).sum(dtype=torch.float64)
            found.append((float(own), float(shared)))
        sums[piece.key, piece.start] = found
        piece.into.mul_(sign)

    unified = fusion.by_entry(combine, positional=True)
    terms: list[tuple[list[float], list[float]]] = [([], []) for _ in range(fusion.count)]
    for (key, _), found in sorted(sums.items()):
        share = 1.0 if rescale == "entries" else 1.0 / fusion.specs[key].size
        for (owns, shareds), (own, shared) in zip(terms, found, strict=True):
            owns.append(share * own)
            shareds.append(share * shared)
    rescalers = tuple(fsum(owns) / total if (total := fsum(shareds)) else 0.0 for owns, shareds in terms)
    return MaskedVectors(unified, recorder.done(), rescalers)


def emr_unified(vectors: Iterable[Tensors], *, scale: float = 1.0, **options: Unpack[FusionOptions]) -> TaskVector:
    r"""The vector that EMR-Merging elects for all tasks: the sign of the sum, the largest magnitude of that sign.

    .. math:: \tau = \lambda \, \gamma \odot \epsilon, \qquad \gamma = \operatorname{sgn} \sum_{q=1}^N \tau_q, \qquad
              \epsilon = \max_{q:\, \operatorname{sgn} \tau_q = \gamma} |\tau_q|

    entry by entry. EMR-Merging uses it with a mask and a factor for each task, see `emr`; alone it is a rule like any
    other, for ``fuse``, ``fuse_files`` and ``resilient_fusion``.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, before signs are elected.

    Returns:
        The update, a `TaskVector`; 0 where the sum is 0 (the authors' code elects the negative sign there).

    Raises:
        InputError: no vectors, or a `scale` that is not finite. StateMismatchError: keys or shapes disagree.
        NonFiniteError: NaN or infinity in a vector, or overflow.

    Source: Huang et al., "EMR-Merging: tuning-free high-performance model merging", 2024.

    Example:
        >>> import torch
        >>> dict(emr_unified([{"w": torch.tensor([4.0, -1.0, 2.0])}, {"w": torch.tensor([2.0, 3.0, -1.0])}]))
        {'w': tensor([4., 3., 2.])}
    """
    factor = finite_number(scale, "scale")
    fusion = Fusion(vectors, options)

    def combine(piece: Piece) -> None:
        largest, sign = _elected(piece)
        torch.mul(largest, sign, out=piece.into)
        if factor != 1:
            piece.into.mul_(factor)

    return fusion.by_entry(combine)


def _elected(piece: Piece) -> tuple[Tensor, Tensor]:
    """The elected magnitudes, in ``piece.into``, and signs; the magnitudes are not finite where a vector is not."""
    sign = piece.spare(0, len(piece)).copy_(piece.parts[0])
    for part in piece.parts[1:]:
        sign.add_(part)
    sign.sign_()
    largest = piece.into.zero_()
    for part in piece.parts:
        torch.maximum(largest, torch.mul(part, sign, out=piece.spare(1, len(piece))), out=largest)
    return largest, sign
