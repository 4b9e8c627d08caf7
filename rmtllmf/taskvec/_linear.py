"""What all linear rules end in: a weighted sum of the vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._state import all_finite
from ._engine import Fusion, Piece
from ._sources import Stored
from .vector import TaskVector


def weighted_sum(fusion: Fusion, coefficients: Callable[[str], Sequence[float]]) -> TaskVector:
    """``sum_q coefficients(name)[q] * vector_q[name]``; the fusion's own weights are not applied beside them.

    A vector of coefficient 0 is left out, whatever it holds.
    """

    if fusion.differentiable:
        return _differentiable(fusion, coefficients)

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


def _differentiable(fusion: Fusion, coefficients: Callable[[str], Sequence[float]]) -> TaskVector:
    """The same with torch's own operations on whole tensors, through which gradients flow."""
    result: dict[str, Tensor] = {}
    for key in fusion.keys:
        spec, dtype = fusion.specs[key], fusion.compute[key]
        total = torch.zeros(spec.shape, dtype=dtype, device=spec.device)
        for source, a in zip(fusion.sources, coefficients(key), strict=True):
            if a != 0:
                given = source.given[key] if isinstance(source, Stored) else source.whole(key)
                total = total + a * given.to(spec.device, dtype)
        result[key] = total.to(spec.dtype)
        if not all_finite(result[key]):
            raise fusion.blame(key)
    result |= {key: result[original] for key, original in fusion.alias.items()}
    return TaskVector._of({key: result[key] for key in fusion.sources[0].specs if key in result})
