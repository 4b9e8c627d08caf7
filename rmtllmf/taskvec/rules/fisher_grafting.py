"""Fast Fisher grafting: of each task keep what its loss needs, by curvature that its optimiser has known all along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from ...errors import InputError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..vector import TaskVector
from ._saliency import Saliency, in_place_of
from ._selection import largest
from ._statistics import beside

__all__ = ["fisher_grafting"]

Within = Literal["model", "tensor"]
Combine = Literal["curvature", "mean", "sum"]


def fisher_grafting(
    vectors: Iterable[Tensors],
    curvature: Iterable[Tensors],
    density: float = 0.1,
    *,
    within: Within = "model",
    combine: Combine = "curvature",
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of OTA merging: of every task the entries of the largest saliency, weighted by curvature.

    .. math::
        \tau_j = \lambda \, \frac{\sum_q m_{qj} \sqrt{h_{qj}} \, \tau_{qj}}{\sum_q m_{qj} \sqrt{h_{qj}}}, \qquad
        m_{qj} = \big[ s_{qj} \text{ is among the largest of task } q \big], \qquad s_{qj} = h_{qj} \, \tau_{qj}^2

    where :math:`h_q` is the curvature of task q's loss: :math:`s_{qj} / 2` is what the loss grows by if the entry goes
    back to the base, to second order and with a diagonal Hessian. Where no task keeps an entry :math:`\tau = 0`.
    Of n entries ``max(1, floor(density n))`` are kept; of those of equal saliency the first, in the flat order of the
    sorted names; never one of saliency 0. With one vector this is the graft itself (up to rounding).

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        curvature: for each vector :math:`h_q`, a number of at least 0 for every entry, of any unit: Adam's second
            moments (``exp_avg_sq``) at the end of fine-tuning, as in the source, or `fisher_information`. Tied names
            need one entry; other names do not matter.
        density: the share of entries that is kept, in (0, 1]; 1 merges by curvature alone. The source looks for the
            smallest share with which each graft does as well as its model; .1 is the default of the authors' code.
        within: a share of the whole "model", so that layers compete, as the paper's thresholds do; or of each "tensor"
            (the authors' ``ffg``).
        combine: by "curvature", as above; or the "mean" (over all N, as the authors' ``linear``) or "sum" of the
            grafts.
        scale: :math:`\lambda`; 1, as in the source.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, in the saliency too.

    Returns:
        The update, a `TaskVector`.

    Raises:
        InputError: a `density` outside (0, 1], an option that is none, or negative curvature. ShapeError: not as many
            curvatures as vectors. StateMismatchError: keys or shapes disagree, or curvature lacks a name.
        NonFiniteError: NaN or infinity in a vector or the curvature.

    Source: Mahdavinia et al., "Harnessing optimization dynamics for curvature-informed model merging", 2025. The
    authors' code adds 1e-26 to the weights, which matters where all curvature is 0.

    Example:
        >>> import torch
        >>> vectors = [{"w": torch.tensor([1.0, 3.0, 2.0])}, {"w": torch.tensor([4.0, 1.0, 1.0])}]
        >>> curvature = [{"w": torch.tensor([9.0, 0.1, 4.0])}, {"w": torch.tensor([1.0, 1.0, 9.0])}]
        >>> dict(fisher_grafting(vectors, curvature, 0.7))  # the first keeps 1 and 2, the second 4 and 1
        {'w': tensor([1.7500, 0.0000, 1.4000])}
        >>> dict(fisher_grafting(vectors[:1], curvature[:1], 0.7))
        {'w': tensor([1., 0., 2.])}
    """
    for argument, value, choices in (("within", within, Within), ("combine", combine, Combine)):
        if value not in get_args(choices):
            expected = ", ".join(repr(choice) for choice in get_args(choices))
            raise InputError(f"{argument}: expected one of {expected}, got {value!r}")
    density, factor = finite_number(density, "density"), finite_number(scale, "scale")
    if not 0 < density <= 1:
        raise InputError(f"density: expected a share in (0, 1], where 1 keeps all, got {density:g}")
    fusion = Fusion(vectors, options)
    given = beside(fusion, curvature, "curvature")
    saliencies = [Saliency(fusion, task, h) for task, h in enumerate(given)]
    groups = [fusion.keys] if within == "model" else [[key] for key in fusion.keys]
    cuts = largest(in_place_of(fusion, saliencies), groups, density) if density < 1 else {}
    count = fusion.count

    def graft(piece: Piece) -> None:
        key, start, stop, length = piece.key, piece.start, piece.stop, len(piece)
        into, total = piece.into.zero_(), piece.spare(count, length).zero_()
        kept, root = (piece.spare(count + slot, length) for slot in (1, 2))

        def read(task: int, slot: int) -> Tensor:
            return saliencies[task].read(key, start, stop, piece.spare(count + 3 + task, length))

        scores = replace(piece, read=read)
        for task in range(count):
            if cuts:
                score = cuts[key][task].keep(task, scores, slice(0, length), kept)
            else:
                score = kept.copy_(scores.parts[task])
            if combine == "curvature":
                into.add_(score)  # the root of h, times the vector
                total.addcmul_(saliencies[task].root(key, start, stop, root), score.ne_(0))
            elif cuts:
                into.addcmul_(piece.parts[task], score.ne_(0))
            else:
                into.add_(piece.parts[task])
        if combine == "curvature":
            into.div_(total.masked_fill_(total == 0, 1.0))
        if combine == "mean":
            into.div_(count)
        if factor != 1:
            into.mul_(factor)

    return fusion.by_entry(graft, positional=True)
