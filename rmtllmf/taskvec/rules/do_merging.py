"""DO-Merging: low-rank updates made orthogonal, then merged by magnitude and by direction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number, whole_number
from ...errors import InputError
from .._engine import Fusion
from .._options import FusionOptions
from ..vector import TaskVector
from ._spectral import averaged, leading, rounding_level, scaled

__all__ = ["do_merging"]


def do_merging(
    vectors: Iterable[Tensors],
    *,
    stay: float = 1.0,
    steps: int = 100,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of DO-Merging: mean magnitudes times mean directions, column by column.

    .. math::
        \tau = \lambda \Big( \frac1N \sum_q \alpha_q \Big) \odot \Big( \frac1N \sum_q \hat\tau_q / \alpha_q \Big),
        \qquad (\alpha_q)_j = \|(\hat\tau_q)_{:,j}\|, \qquad \hat\tau_q = \hat B_q \hat A_q

    for each matrix (m, n), so that a task with large entries does not outvote the others. Before that the factors
    :math:`\tau_q = B_q A_q` are moved apart by gradient descent on

    .. math:: \sum_{p \ne q} \|\hat A_p \hat A_q^T\|_F^2 + \gamma \sum_q \|\hat A_q - A_q\|_F^2

    from :math:`\hat A_q = A_q`, and the :math:`B_q^T` likewise. Tensors that are no matrices are averaged, times
    :math:`\lambda`, and one vector comes back times :math:`\lambda`.

    Made for low-rank updates, such as `adapter_vector` gives. Matrices of which the ranks add up to more than min(m, n)
    have no room to be orthogonal, and are merged as they are.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        stay: :math:`\gamma > 0`: how much the factors stay as they are.
        steps: of gradient descent; 0: none is moved.
        scale: :math:`\lambda`; 1 is the mean, N comes closer to the tasks' own outputs where they are orthogonal.
        options: as for every rule, see `FusionOptions`. Weights multiply the vectors, hence the magnitudes only (and by
            their signs the directions).

    Returns:
        The update, a `TaskVector`. Memory beside it: N + 3 matrices a thread.

    Raises:
        InputError: `stay` is not positive, `steps` is negative, no vectors. StateMismatchError: keys or shapes
        disagree. NonFiniteError: NaN or infinity in a vector.

    Source: Zheng et al., "Decouple and orthogonalize: a data-free framework for LoRA merging", 2025. The paper's steps
    are gradient descent of a size that we could not verify. Chosen here: factors with the singular values split evenly,
    since a vector does not tell its own; all factors of one kind over the spectral norm of them joined, so that both
    terms of the loss have the same units; steps of 1 / (12 + 2 :math:`\gamma`), by which it never grows; and means in
    the place of sums and a factor to be tuned.

    Example:
        >>> import torch
        >>> a = {"w": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}
        >>> b = {"w": torch.tensor([[0.0, 0.0], [6.0, 0.0]])}
        >>> do_merging([a, b], steps=0)["w"]  # magnitudes 2 and 6; both directions count the same
        tensor([[2., 0.],
                [2., 0.]])
    """
    factor, hold = finite_number(scale, "scale"), finite_number(stay, "stay")
    if hold <= 0:
        raise InputError(f"stay: expected a positive number, got {hold:g}")
    steps = whole_number(steps, "steps", at_least=0)
    fusion = Fusion(vectors, options)
    count = fusion.count

    def matrix(key: str, parts: list[Tensor]) -> Tensor:
        if count == 1:
            return factor * parts[0]
        parts, unit = scaled(parts)
        if steps:
            parts = _apart(parts, hold, steps)
        magnitude, direction = torch.zeros_like(parts[0][0]), torch.zeros_like(parts[0])
        for part in parts:
            lengths = torch.linalg.vector_norm(part, dim=0)
            magnitude += lengths
            direction += part * torch.where(lengths > 0, 1 / lengths, 0.0)
        return direction.mul_(magnitude.mul_(factor * unit / count**2))

    return fusion.by_matrix(matrix, averaged(count, factor))


def _apart(parts: list[Tensor], stay: float, steps: int) -> list[Tensor]:
    """The matrices with their factors moved apart; or as they are, if there is no room."""
    shape, dtype = parts[0].shape, parts[0].dtype
    found, room = [], min(shape)
    for part in parts:
        U, s, V = leading(part, min(shape), rounding_level([part]), dtype)
        room -= len(s)
        if room < 0:
            return parts
        found.append((U.double() * s.double().sqrt(), V.double() * s.double().sqrt()))
    ranks = [B.shape[1] for B, _ in found]
    if sum(rank > 0 for rank in ranks) < 2:
        return parts
    B, A = (_moved(torch.cat(factors, 1), ranks, stay, steps) for factors in zip(*found, strict=True))
    pairs = zip(B.split(ranks, 1), A.split(ranks, 1), strict=True)
    return [(left @ right.mT).to(dtype) for left, right in pairs]


def _moved(F: Tensor, ranks: list[int], stay: float, steps: int) -> Tensor:
    """The joined factors (n, R) after gradient descent, which keeps to their span: ``F M``, and M is all that moves."""
    gram = F.mT @ F
    gram /= torch.linalg.matrix_norm(gram, 2)
    own = torch.block_diag(*(gram.new_ones(rank, rank) for rank in ranks)).bool()
    start = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    M = start
    for _ in range(steps):
        overlap = (M.mT @ gram @ M).masked_fill_(own, 0.0)
        M = M - (4 * M @ overlap + 2 * stay * (M - start)) / (12 + 2 * stay)
    return F @ M
