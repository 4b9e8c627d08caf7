"""Optimal brain iterative merging: tasks take what they need most, one after another, and never the same entry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, all_finite, finite_number, quoted
from ...errors import InputError, StateMismatchError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..vector import TaskVector
from ._cut import Cut
from ._saliency import Saliency, in_place_of
from ._selection import largest
from ._statistics import checked, listed, shares

__all__ = ["optimal_brain_merging"]

Within = Literal["tensor", "model"]


def optimal_brain_merging(
    vectors: Iterable[Tensors],
    curvature: Iterable[Tensors],
    density: float | Sequence[float] = 0.2,
    *,
    within: Within = "tensor",
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of optimal brain iterative merging (OBIM).

    .. math::
        \tau = \lambda \sum_{q=1}^N m_q \odot \tau_q, \qquad m_p \odot m_q = 0 \text{ for } p \ne q, \qquad
        s_{qj} = \tfrac12 h_{qj} \, \tau_{qj}^2

    where :math:`s_{qj}` is how much the loss of task q changes without the entry, to second order and with a diagonal
    Hessian. In the order of the vectors, each :math:`m_q` is the entries of the largest saliency among those that no
    task before has taken: ``max(1, floor(density n))`` of a tensor of n, or all that are left; of equal ones the first;
    never one of saliency 0. No two tasks are averaged, so that none weakens another.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes, the most important task first. Not written
            to.
        curvature: for each vector :math:`h_q`, at least 0: the mean squares of the inputs of each linear layer of the
            fine-tuned model, name -> (n,) for a weight (m, n), with which h is the diagonal of the Hessian of the
            layer's squared error, as in the source: the diagonals of `input_grams`. Or any other diagonal, as a tensor
            in the entry's shape. Names that are missing (biases, norms) have the curvature 1; tied names need one
            entry.
        density: the share of entries that each task may take, in (0, 1]: one number, or one for each vector. The sum
            over the tasks should be at most 1, so that the last ones are not left with what nobody wanted. The source's
            own share could not be verified; .2 is TIES'.
        within: a share of each "tensor", because the errors of different layers have different units; or of the whole
            "model".
        scale: :math:`\lambda`.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, in the saliency too.

    Returns:
        The update, a `TaskVector`. Memory beside it: two bytes an entry, for whose it is.

    Raises:
        InputError: a `density` outside (0, 1], `within` is neither, or negative curvature. ShapeError: not as many
            curvatures or densities as vectors. StateMismatchError: keys or shapes disagree, or curvature has a name
            that the vectors lack. NonFiniteError: NaN or infinity in a vector or the curvature.

    Source: Wang et al., "Optimal brain iterative merging: mitigating interference in LLM merging", 2025.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([[3.0, 2.0], [1.0, 4.0]])}, {"w": torch.tensor([[9.0, 1.0], [2.0, 5.0]])}
        >>> moments = [{"w": torch.tensor([1.0, 0.01])}, {"w": torch.tensor([1.0, 1.0])}]  # a hardly sees input 2
        >>> optimal_brain_merging([a, b], moments, 0.25)["w"]
        tensor([[3., 0.],
                [0., 5.]])
    """
    if within not in get_args(Within):
        raise InputError(f"within: expected 'tensor' or 'model', got {within!r}")
    factor = finite_number(scale, "scale")
    fusion = Fusion(vectors, options)
    numbers = shares(density, "density", fusion.count)
    given = _curvature(fusion, curvature)
    groups = [fusion.keys] if within == "model" else [[key] for key in fusion.keys]
    owner = {key: torch.zeros(s.size, dtype=torch.int16, device=s.device) for key, s in fusion.specs.items()}

    for task, number in enumerate(numbers):
        inner = in_place_of(fusion, [Saliency(fusion, task, given[task], owner)])
        cuts = largest(inner, groups, number)

        def take(piece: Piece, task: int = task, cuts: dict[str, list[Cut]] = cuts) -> None:
            whole = slice(0, len(piece))
            kept = cuts[piece.key][0].keep(0, piece, whole, piece.spare(0, len(piece)))
            owner[piece.key][piece.start : piece.stop].add_(kept != 0, alpha=task + 1)  # 0 before

        inner.survey(take, weighted=False)

    def combine(piece: Piece) -> None:
        if not all(map(all_finite, piece.parts)):  # what is not taken could not be blamed any more
            raise fusion.blame(piece.key)
        owners, into = owner[piece.key][piece.start : piece.stop], piece.into.zero_()
        for task, part in enumerate(piece.parts, 1):
            torch.where(owners == task, part, into, out=into)
        if factor != 1:
            into.mul_(factor)

    return fusion.by_entry(combine, positional=True)


def _curvature(fusion: Fusion, curvature: Iterable[Tensors]) -> list[dict[str, Tensor]]:
    """For each vector the tensors of the names that are fused, as far as they are given."""
    names = {**{key: key for key in fusion.keys}, **fusion.alias}
    unused = set(fusion.sources[0].specs)
    result = []
    for index, mapping in enumerate(listed(curvature, "curvature", fusion.count)):
        label = f"curvature[{index}]"
        unknown = set(mapping) - set(names) - unused
        if unknown:
            raise StateMismatchError(f"{label} has the unexpected {quoted(unknown)}; the vectors lack it")
        found = {names[key]: tensor for key, tensor in mapping.items() if key in names}
        shapes = {key: fusion.specs[key].shape for key in found}
        for key, tensor in found.items():
            if len(shapes[key]) == 2 and getattr(tensor, "ndim", None) == 1:
                shapes[key] = shapes[key][1:]
        result.append(checked(found, shapes, label))
    return result
