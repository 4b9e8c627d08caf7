"""Fisher merging: an average, entry by entry, in which those tasks count that need the entry."""

from __future__ import annotations

from collections.abc import Iterable
from math import fsum, sqrt

import torch
from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from ...errors import InputError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from .._sources import Stored
from ..vector import TaskVector
from ._distances import squared_norms
from ._statistics import beside

__all__ = ["fisher"]


def fisher(
    vectors: Iterable[Tensors],
    information: Iterable[Tensors],
    *,
    normalize: bool = True,
    floor: float = 1e-6,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of Fisher merging: the average weighted by what every task needs each entry for.

    .. math:: \tau_j = \lambda \, \frac{\sum_q w_q \hat F_{q,j} \, \tau_{q,j}}{\sum_q w_q \hat F_{q,j}}, \qquad
              \hat F_{q,j} = \max\Big( \frac{c_q F_{q,j}}{u}, \epsilon \Big)

    The models' own weighted average, as the base cancels: the most likely parameters if each model's are normally
    distributed with the precision :math:`F_q`. With :math:`c_q = 1 / \|F_q\|` all tasks count the same, whatever the
    units of their losses; u is the root mean square of all :math:`c_q F_{q,j}`, so that :math:`\epsilon` is a share of
    it. What is below it for all tasks is averaged: nobody needs it.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        information: for each vector :math:`F_q`, a number of at least 0 for every entry: `fisher_information` of the
            fine-tuned model. Tied names need one entry; other names do not matter.
        normalize: whether :math:`c_q` is :math:`1 / \|F_q\|` (the norm over all that is fused) as in the authors' code,
            or 1 as in the paper's formula.
        floor: :math:`\epsilon > 0`.
        scale: :math:`\lambda`, 1 for the average itself.
        options: as for every rule, see `FusionOptions`. Weights are the :math:`w_q` of the average, at least 0, which
            the paper tunes on validation data.

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: a `floor` that is not positive, negative information or weights, or weights of which none is
        positive. ShapeError: not as much information as vectors. StateMismatchError: keys or shapes disagree, or
        information lacks a name. NonFiniteError: NaN or infinity in a vector or the information.

    Note:
        The authors' code takes ``max(F, 1e-6)`` of the first model's information only, whatever its units. FusionBench
        adds 1e-6 to everybody's, and squares sums of gradients over classes and samples in place of each gradient.

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", 2022, eq. 4.

    Example:
        >>> import torch
        >>> vectors = [{"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([3.0, 3.0, 3.0])}]
        >>> information = [{"w": torch.tensor([4.0, 0.0, 0.0])}, {"w": torch.tensor([4.0, 4.0, 0.0])}]
        >>> fisher(vectors, information, normalize=False)["w"]  # needed by both, by the second, by none
        tensor([2.0000, 3.0000, 2.0000])
    """
    factor, epsilon = finite_number(scale, "scale"), finite_number(floor, "floor", positive=True)
    fusion = Fusion(vectors, options)
    for key in fusion.keys:
        weights = fusion.weights(key)
        if min(weights) < 0 or max(weights) == 0:
            raise InputError(f"weights: expected at least 0, and one above, for {key!r}, got {weights}")
    given = beside(fusion, information, "information")
    sources = [Stored(each, "information") for each in given]
    units = _units(sources, normalize)

    def combine(piece: Piece) -> None:
        total, needed = piece.spare(0, len(piece)).zero_(), piece.spare(1, len(piece))
        into = piece.into.zero_()
        for index, weight in enumerate(fusion.weights(piece.key)):
            read = sources[index].read(piece.key, piece.start, piece.stop, needed)
            torch.mul(read, units[index], out=needed).clamp_min_(epsilon)
            if weight != 1:
                needed.mul_(weight)
            total += needed
            into.addcmul_(needed, piece.read(index, index))
        into.div_(total)
        if factor != 1:
            into.mul_(factor)

    return fusion.by_entry(combine, weighted=False, positional=True)


def _units(information: list[Stored], normalize: bool) -> list[float]:
    """By what to multiply each: c_q / u."""
    squares = squared_norms(Fusion(information, {})).tolist()
    entries = sum(spec.size for each in information for spec in each.specs.values())
    scales = [1 / sqrt(square) if normalize and square > 0 else 1.0 for square in squares]
    unit = sqrt(fsum(c * c * square for c, square in zip(scales, squares, strict=True)) / max(1, entries))
    return [c / unit if unit > 0 else 0.0 for c in scales]
