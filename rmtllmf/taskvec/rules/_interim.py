"""For rules that need a whole vector of their own before they can write the update: one more vector in memory."""

from __future__ import annotations

from torch import Tensor

from ..._sharded import full
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..vector import TaskVector


def interim(fusion: Fusion, options: FusionOptions) -> Fusion:
    """A fusion of the same vectors, of which the result is kept in memory, in the dtype of the calculation."""
    kept: FusionOptions = {**options, "out": None}
    inner = Fusion(fusion.sources, kept, argument=fusion.argument)
    inner.specs = {key: spec._replace(dtype=inner.compute[key]) for key, spec in inner.specs.items()}
    return inner


def part_of(vector: TaskVector, piece: Piece) -> Tensor:
    """The entries of the interim vector where the piece is; for passes that are `positional`."""
    return full(vector[piece.key]).reshape(-1)[piece.start : piece.stop]
