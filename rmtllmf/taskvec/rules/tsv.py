"""TSV-Merge: the leading singular vectors of every task, made orthogonal to those of the others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from .._engine import Fusion
from .._options import FusionOptions
from ..vector import TaskVector
from ._joined import decorrelated
from ._spectral import averaged, leading, rounding_level, scaled

__all__ = ["tsv"]


def tsv(vectors: Iterable[Tensors], *, scale: float = 1.0, **options: Unpack[FusionOptions]) -> TaskVector:
    r"""The fused update of TSV-Merge: of every task a few singular vectors, moved apart until they are orthogonal.

    .. math::
        \tau = \lambda\, U_\perp \operatorname{diag}(\sigma_1, \dots, \sigma_N) V_\perp^T, \qquad
        U_\perp = \arg\min_{Q^T Q = I} \|Q - [U_1 \cdots U_N]\|_F = [U_1 \cdots U_N]\, G_U^{-1/2},

    where :math:`U_q \operatorname{diag}(\sigma_q) V_q^T` are the :math:`r = \lfloor \min(m, n) / N \rfloor` largest
    singular triplets of the matrix :math:`\tau_q` (m, n), :math:`G_U` is the Gram matrix of the joined :math:`U_q`, and
    :math:`V_\perp` is made likewise. Tensors that are no matrices (biases, convolutions) are averaged,
    :math:`\tau = \frac{\lambda}{N} \sum_q \tau_q`, and so are matrices of fewer rows or columns than there are tasks,
    for which r would be 0.

    Triplets whose singular value is at the level that rounding of the entries makes have no direction of their own, and
    are left out; where tasks share directions exactly, so that :math:`G_U` is singular, its inverse root is that of its
    other eigenvalues. N equal vectors thus give the best approximation of rank r to one of them. An SVD would choose
    the missing directions arbitrarily. Triplets r and r + 1 of equal singular value leave the choice open too.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        scale: :math:`\lambda`, of the matrices and of the averages.
        options: as for every rule, see `FusionOptions`. A projection into a shared space (CLIP's ``text_projection``,
            ``proj``) and embeddings are matrices too; some leave them to another rule: fuse them with
            ``skip="*text_projection"``, and alone with `weighted_average`.

    Returns:
        The update, a `TaskVector`. One vector comes back as it is, times `scale`. Within 1e-3 (relative, a tensor's
        Frobenius norm) of an exact calculation, and 1e-9 with ``compute_dtype=torch.float64``, unless the joined
        directions, or triplets r and r + 1, are all but equal.

    Raises:
        InputError: no vectors, or a `scale` that is not finite. StateMismatchError: keys or shapes disagree.
        NonFiniteError: NaN or infinity in a vector, or the update overflows.

    Source: Gargiulo et al., "Task singular vectors: reducing task interference in model merging", 2025, algorithm 1.

    Example:
        >>> import torch
        >>> a = {"w": torch.diag(torch.tensor([3.0, 0.5]))}
        >>> b = {"w": torch.diag(torch.tensor([0.5, 2.0]))}
        >>> tsv([a, b])["w"]
        tensor([[3., 0.],
                [0., 2.]])
    """
    fusion = Fusion(vectors, options)
    factor = finite_number(scale, "scale")
    return fusion.by_matrix(lambda key, parts: separated(parts, factor), averaged(fusion.count, factor))


def separated(parts: list[Tensor], factor: float) -> Tensor:
    """The update of one matrix, times `factor`."""
    count, dtype = len(parts), parts[0].dtype
    kept = min(parts[0].shape) // count
    if count == 1:
        return factor * parts[0]
    if not kept:
        return torch.stack(parts).sum(0).mul_(factor / count)
    parts, unit = scaled(parts)
    return decorrelated(
        lambda quick: [leading(part, kept, rounding_level([part]), dtype, quick=quick) for part in parts],
        lambda s: factor * unit * s,
        dtype,
    )
