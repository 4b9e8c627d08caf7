"""DOGE (adaptive projective gradient descent): a common correction of the task vectors, outside what they share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, all_finite, finite_number, whole_number
from ...errors import InputError
from .._engine import Fusion, Piece
from .._options import FusionOptions
from ..vector import TaskVector
from ._adam import Adam
from ._interim import interim, part_of
from ._selection import largest
from ._spectral import leading, rounding_level

__all__ = ["doge"]

NOISE = (
    16.0  # rounding of a projection, as a multiple of that of what is projected: Adam would magnify it to full steps
)


def doge(
    vectors: Iterable[Tensors],
    scale: float = 0.07,
    density: float = 0.3,
    *,
    subspace: int = 6,
    steps: int = 400,
    step_size: float = 1e-4,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of DOGE TA: task arithmetic of corrected task vectors, with a coefficient for each matrix.

    .. math::
        \tau = \sum_{q=1}^{N} \lambda_q \, m_q \odot (\tau_q + \Delta), \qquad
        \lambda_q = \frac{\eta}{\|\tau_q\|_F}, \qquad
        \Delta \approx \arg\min_\Delta \sum_{q=1}^{N} \sum_a
            \Big\langle \tau_q, \tau_q - \sum_p \lambda_p (\tau_p + \Delta) \Big\rangle_a^2

    for each matrix (m, n), with the inner product of row a; :math:`m_q` keeps the share `density` of all matrices'
    entries that are largest in :math:`\tau_q`. :math:`\Delta` is what Adam makes of 0 in some steps, of which each is
    given the gradient without its part in the shared subspace: :math:`g - U U^T g`, where U are the r / 6 leading left
    singular vectors of :math:`[U_1 \cdots U_N]`, and :math:`U_q` the r / N leading ones of :math:`\tau_q`, for
    r = min(m, n). Which directions lead is open where the tasks' own are orthogonal, so that none is shared: then any.

    Tensors that are no matrices (biases, convolutions, norms) stay as in the base: the update is 0 there, as in the
    authors' code. To fuse them otherwise name them in ``skip``, and fuse them alone with another rule.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        scale: :math:`\eta`: about how long the update of a matrix is, whatever the length of the vectors.
        density: the share of entries that is kept of each vector, in (0, 1].
        subspace: the shared subspace has r // subspace dimensions; the more it has, the less is corrected.
        steps: of Adam; 0 is task arithmetic of trimmed vectors.
        step_size: Adam's learning rate, in units of the entries: no entry of :math:`\Delta` becomes larger than about
            `steps` times that.
        options: as for every rule, see `FusionOptions`. Weights multiply the :math:`\lambda_q`.

    Returns:
        The update, a `TaskVector`. Memory: one vector more than the result, and N + 6 matrices a thread.

    Raises:
        InputError: a `density` outside (0, 1], `subspace` or `steps` that are no such numbers, a `step_size` that is
        not positive, no vectors. StateMismatchError: keys or shapes disagree. NonFiniteError: NaN or infinity in a
        vector, or overflow (third powers of the entries are taken).

    Source: Wei et al., "Modeling multi-task model merging as adaptive projective gradient descent", 2025; rows, steps
    and defaults as in the authors' code (FusionBench's `doge_ta`, which keeps one entry more of each vector).

    Example:
        >>> import torch
        >>> a = {"w": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "b": torch.ones(2)}
        >>> b = {"w": torch.tensor([[0.0, 0.0], [0.0, 1.0]]), "b": torch.ones(2)}
        >>> update = doge([a, b], 1.0, density=1.0, steps=0)  # both tasks count the same, strong or weak
        >>> update["w"], update["b"]
        (tensor([[1., 0.],
                [0., 1.]]), tensor([0., 0.]))
    """
    eta, share, rate = (
        finite_number(value, name) for value, name in ((scale, "scale"), (density, "density"), (step_size, "step_size"))
    )
    if not 0 < share <= 1:
        raise InputError(f"density: expected a share in (0, 1], where 1 keeps all, got {share:g}")
    if rate <= 0:
        raise InputError(f"step_size: expected a positive number, got {rate:g}")
    subspace = whole_number(subspace, "subspace", at_least=1)
    steps = whole_number(steps, "steps", at_least=0)
    fusion = Fusion(vectors, options)
    matrices = [key for key in fusion.keys if len(fusion.specs[key].shape) == 2 and fusion.specs[key].size]
    coefficients: dict[str, list[float]] = {}

    def correction(key: str, parts: list[Tensor]) -> Tensor:
        norms = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts]
        weights = fusion.weights(key)
        coefficients[key] = [eta * w / norm if norm else 0.0 for w, norm in zip(weights, norms, strict=True)]
        shared = _shared(parts, min(parts[0].shape) // subspace) if steps else parts[0][:, :0]
        return _correction(torch.stack(parts), coefficients[key], shared, steps, rate)

    def nothing(piece: Piece) -> None:
        if not all(all_finite(part) for part in piece.parts):
            raise fusion.blame(piece.key)
        piece.into.zero_()

    delta = interim(fusion, options).by_matrix(correction, nothing, weighted=False)
    cuts = largest(fusion, [matrices], share) if share < 1 and matrices else {}

    def add_up(piece: Piece) -> None:
        into = piece.into.zero_()
        if piece.key not in coefficients:
            return
        correction, whole = part_of(delta, piece), slice(0, len(piece))
        for index, factor in enumerate(coefficients[piece.key]):
            kept = piece.parts[index]
            if cuts:
                kept = cuts[piece.key][index].keep(index, piece, whole, piece.spare(0, len(piece)))
            moved = torch.add(kept, correction, out=piece.spare(1, len(piece)))
            into.add_(moved.mul_(kept != 0) if cuts else moved, alpha=factor)

    return fusion.by_entry(add_up, weighted=False, positional=True)


def _shared(parts: list[Tensor], count: int) -> Tensor:
    """The left singular vectors (m, `count`) that most of the tasks' own leading ones have in common."""
    own, dtype = min(parts[0].shape) // len(parts), parts[0].dtype
    if not own or not count:
        return parts[0][:, :0]
    if len(parts) == 1:
        return leading(parts[0], count, rounding_level(parts), dtype)[0].to(dtype)
    joined = torch.cat([leading(part, own, rounding_level([part]), dtype)[0] for part in parts], 1)
    return leading(joined, count, 1e-6, dtype)[0].to(dtype) if joined.shape[1] else joined.to(dtype)


def _correction(x: Tensor, coefficients: list[float], shared: Tensor, steps: int, rate: float) -> Tensor:
    """Delta (m, n) for the stacked tasks (N, m, n)."""
    delta = torch.zeros_like(x[0])
    factors = x.new_tensor(coefficients)
    together = float(factors.sum())
    tasks = x.transpose(0, 1).contiguous()  # (m, N, n)
    gap = (tasks @ torch.tensordot(factors, x, 1)[:, :, None]).neg_().add_(tasks.square().sum(-1, keepdim=True))
    adam = Adam(delta, rate)
    for _ in range(steps if coefficients else 0):
        left = torch.baddbmm(gap, tasks, delta[:, :, None], alpha=-together)  # (m, N, 1)
        gradient = torch.bmm(tasks.mT, left)[:, :, 0].mul_(-2 * together)
        noise = NOISE * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(gradient, dim=0)
        gradient.addmm_(shared, shared.mT @ gradient, alpha=-1)
        adam.step(gradient.masked_fill_(gradient.abs() < noise, 0.0))
    return delta
