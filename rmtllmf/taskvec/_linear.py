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
        (total, a), *rest = terms
        equal = all(b == a for _, b in rest)  # then they are added up first and scaled afterwards, as the formulas say
        if not (equal and rest):
            total = torch.mul(total, a, out=piece.into)
        for part, b in rest:
            total = torch.add(total, part, alpha=1.0 if equal else b, out=piece.into)
        if equal and rest and a != 1:
            piece.into.mul_(a)

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
