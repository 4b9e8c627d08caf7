"""What all linear rules end in: a weighted sum of the vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._state import all_finite
from ...errors import InputError
from .._engine import Fusion, Piece
from .._sinks import Memory
from .._sources import Stored
from ..vector import TaskVector


def weighted_sum(fusion: Fusion, coefficients: Callable[[str], Sequence[float]]) -> TaskVector:
    """``sum_q coefficients(name)[q] * vector_q[name]``; the fusion's own weights are not applied beside them.

    A vector of coefficient 0 is left out, whatever it holds.
    """
    if fusion.differentiable:
        return _differentiable(fusion, coefficients)

    def combine(piece: Piece) -> None:
        terms = [(index, a) for index, a in enumerate(coefficients(piece.key)) if a != 0]
        if not terms:
            piece.into.zero_()
            return
        (first, a), *rest = terms
        equal = all(b == a for _, b in rest)  # then they are added up first and scaled afterwards, as the formulas say
        if equal and rest:
            torch.add(piece.read(first, 0), piece.read(rest.pop(0)[0], 1), out=piece.into)
        else:
            torch.mul(piece.read(first, 0), a, out=piece.into)
        for index, b in rest:
            piece.into.add_(piece.read(index, 0), alpha=1.0 if equal else b)
        if equal and len(terms) > 1 and a != 1:
            piece.into.mul_(a)

    fusion.lengthen(2)
    return fusion.by_entry(combine, weighted=False)


def _differentiable(fusion: Fusion, coefficients: Callable[[str], Sequence[float]]) -> TaskVector:
    """The same with torch's own operations on whole tensors, through which gradients flow."""
    if not isinstance(fusion.sink, Memory) or fusion.sink.out is not None:
        raise InputError(
            f"{fusion.argument}: gradients do not flow through fuse() or into out=...; detach the vectors, or call "
            "the rule without `out` and apply_to(base)"
        )
    result: dict[str, Tensor] = {}
    for key in fusion.keys:
        spec, dtype = fusion.specs[key], fusion.compute[key]
        total: Tensor | None = None
        for source, a in zip(fusion.sources, coefficients(key), strict=True):
            if a != 0:
                given = source.given[key] if isinstance(source, Stored) else source.whole(key)
                term = a * given.to(spec.device, dtype)
                total = term if total is None else total + term
        if total is None:
            like = fusion.templates.get(key, torch.empty(spec.shape, device=spec.device))
            total = torch.zeros_like(like, dtype=dtype)
        result[key] = total.to(spec.dtype)
        if not all_finite(result[key]):
            raise fusion.blame(key)
    result |= {key: result[original] for key, original in fusion.alias.items()}
    return TaskVector._of({key: result[key] for key in fusion.sources[0].specs if key in result})
