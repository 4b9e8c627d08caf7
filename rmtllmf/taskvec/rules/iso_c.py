"""Iso-C: task arithmetic with all directions of a matrix equally long."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number
from .._engine import Fusion
from .._options import FusionOptions
from ..vector import TaskVector
from ._spectral import averaged, polar, rounding_level, scaled

__all__ = ["iso_c"]


def iso_c(vectors: Iterable[Tensors], *, scale: float = 1.0, **options: Unpack[FusionOptions]) -> TaskVector:
    r"""The fused update of Iso-C: of the sum of a matrix over the tasks, every singular value becomes their mean.

    .. math::
        \tau = \lambda \bar\sigma U V^T, \qquad \sum_{q=1}^N \tau_q = U \operatorname{diag}(\sigma) V^T, \qquad
        \bar\sigma = \frac{1}{\min(m, n)} \sum_i \sigma_i

    for each matrix (m, n). Tensors that are no matrices (biases, convolutions) are averaged,
    :math:`\tau = \frac{\lambda}{N} \sum_q \tau_q`.

    Singular values at the level that rounding of the entries makes, such as those of a sum of low rank, have no
    direction of their own. They are left out of :math:`U V^T`, which is then a partial isometry, the only one; the mean
    is over all min(m, n) nevertheless. An SVD would give each of them an arbitrary direction with the full length of
    :math:`\bar\sigma`.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        scale: :math:`\lambda`, of the matrices and of the averages.
        options: as for every rule, see `FusionOptions`. A projection into a shared space (CLIP's ``text_projection``,
            ``proj``) and embeddings are matrices too; some leave them to another rule: fuse them with
            ``skip="*text_projection"``, and alone with `weighted_average`.

    Returns:
        The update, a `TaskVector`. Within 1e-4 (relative, a tensor's Frobenius norm) of an exact calculation, and 1e-9
        with ``compute_dtype=torch.float64``.

    Raises:
        InputError: no vectors, or a `scale` that is not finite. StateMismatchError: keys or shapes disagree.
        NonFiniteError: NaN or infinity in a vector, or the sum overflows.

    Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces",
    2025, algorithm 1.

    Example:
        >>> import torch
        >>> a = {"w": torch.diag(torch.tensor([3.0, 0.0]))}
        >>> b = {"w": torch.diag(torch.tensor([0.0, 1.0]))}
        >>> iso_c([a, b])["w"]
        tensor([[2., 0.],
                [0., 2.]])
    """
    fusion = Fusion(vectors, options)
    factor = finite_number(scale, "scale")

    def matrix(key: str, parts: list[Tensor]) -> Tensor:
        parts, unit = scaled(parts)
        total = parts[0].clone() if len(parts) > 1 else parts[0]
        for part in parts[1:]:
            total += part
        Q, s = polar(total, rounding_level(parts), total.dtype)
        return Q.whole().to(total.dtype).mul_(factor * unit * float(s.mean()))

    return fusion.by_matrix(matrix, averaged(fusion.count, factor))
