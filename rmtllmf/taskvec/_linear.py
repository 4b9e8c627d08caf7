"""What all linear rules end in: a weighted sum of the vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ._engine import Fusion, Piece
from .vector import TaskVector


def weighted_sum(fusion: Fusion, coefficients: Callable[[str], Sequence[float]]) -> TaskVector:
    """``sum_q coefficients(name)[q] * vector_q[name]``; the fusion's own weights are not applied beside them.

    A vector of coefficient 0 is left out, whatever it holds.
    """

    def combine(piece: Piece) -> None:
        terms = [(part, a) for part, a in zip(piece.parts, coefficients(piece.key), strict=True) if a != 0]
        if not terms:
            piece.into.zero_()
            return
        same = terms[0][1] if all(a == terms[0][1] for _, a in terms) else None
        if same is not None:  # added up first and scaled then, as the formulas say
            terms = [(part, 1.0) for part, _ in terms]
        torch.mul(*terms[0], out=piece.into)
        for part, a in terms[1:]:
            piece.into.add_(part, alpha=a)
        if same is not None and same != 1:
            piece.into.mul_(same)

    return fusion.by_entry(combine, weighted=False)
