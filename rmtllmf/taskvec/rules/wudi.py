"""WUDI-Merging: the update that disturbs every task least where that task's own matrix looks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..._state import Tensors, finite_number, whole_number
from ...errors import InputError
from .._engine import Fusion
from .._options import FusionOptions
from ..vector import TaskVector
from ._adam import Adam
from ._spectral import averaged, gram, scaled

__all__ = ["wudi"]

WELL = 1e-8  # share of the largest eigenvalue above which all must be for the normal equations to be solved as they are
NOUGHT = 4.0  # eigenvalues below so many times n times the rounding of the largest one are none


def wudi(
    vectors: Iterable[Tensors],
    *,
    damping: float = 0.0,
    steps: int | None = None,
    step_size: float = 1e-5,
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of WUDI-Merging: the least interference with each task's own input directions.

    .. math:: \tau = \lambda \arg\min_X \sum_{q=1}^{N} \frac{\|(X - \tau_q)\, \tau_q^T\|_F^2}{\|\tau_q\|_F^2}

    for each matrix (m, n): the rows of :math:`\tau_q` stand for the inputs that the layer had when task q was trained.
    Tensors that are no matrices (biases, convolutions) are averaged, :math:`\tau = \frac{\lambda}{N} \sum_q \tau_q`.

    The minimum is found exactly. With :math:`C = \sum_q \tau_q^T \tau_q / \|\tau_q\|^2` it is the solution of

    .. math:: X C = \sum_q \tau_q \tau_q^T \tau_q / \|\tau_q\|^2

    of least norm, which is also where gradient descent ends that starts at the source's :math:`\sum_q \tau_q`: both
    have no part in the directions that no task has. Directions in which C has less than about a 10^-12th part of its
    largest eigenvalue count as such. A task of which the matrix is 0 has no say.

    The source does not go that far: it takes some hundred steps of Adam from :math:`\sum_q \tau_q`, of fixed size, of
    which every entry moves by at most `step_size` or so. That is `steps`. Where tasks have nearly the same directions
    and ask for different outputs the exact minimum is large, and `damping` a scale-free way to stay near the sum.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        damping: :math:`\rho \ge 0`; adds :math:`\rho \bar c \|X - \sum_q \tau_q\|_F^2`, with :math:`\bar c` the mean
            eigenvalue of C. 0 is WUDI-Merging, infinity would be the sum. Not in the source.
        steps: of Adam instead of the minimum (authors' code: 300; FusionBench's configuration: 400). None: the minimum.
        step_size: Adam's learning rate, in units of the entries (1e-5 in the authors' code).
        scale: :math:`\lambda`, of the matrices and of the averages; 1, as in the source.
        options: as for every rule, see `FusionOptions`.

    Returns:
        The update, a `TaskVector`. The minimum is calculated in float64, from which it differs by rounding times the
        condition number of C. Memory beside it: two float64 matrices (n, n) and three (m, n) a thread.

    Raises:
        InputError: `damping` is negative, or given along with `steps`; `steps` is not positive; `step_size` is not
        positive; no vectors. StateMismatchError: keys or shapes disagree. NonFiniteError: NaN or infinity in a vector,
        or the update overflows.

    Source: Cheng et al., "Whoever started the interference should end it: guiding data-free model merging via task
    vectors", 2025. The closed form is that of a linear least-squares problem.

    Example:
        >>> import torch
        >>> a = {"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}  # looks at the first input only,
        >>> b = {"w": torch.tensor([[0.0, 0.0], [0.0, 3.0]])}  # at the second only: both get what they want
        >>> wudi([a, b])["w"]
        tensor([[1., 0.],
                [0., 3.]])
    """
    factor, shrink, rate = (
        finite_number(value, name) for value, name in ((scale, "scale"), (damping, "damping"), (step_size, "step_size"))
    )
    if shrink < 0:
        raise InputError(f"damping: expected a number that is not negative, got {shrink:g}")
    if rate <= 0:
        raise InputError(f"step_size: expected a positive number, got {rate:g}")
    if steps is not None:
        steps = whole_number(steps, "steps", at_least=1)
        if shrink:
            raise InputError("damping: the minimum can be damped, not the steps towards it; give one of damping, steps")
    fusion = Fusion(vectors, options)

    def matrix(key: str, parts: list[Tensor]) -> Tensor:
        if fusion.count == 1:
            return factor * parts[0]
        dtype = parts[0].dtype
        parts, unit = scaled(parts)
        start = torch.stack(parts).sum(0)
        norms = [float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts]
        told = [(part, norm) for part, norm in zip(parts, norms, strict=True) if norm]
        if not told:
            return torch.zeros_like(start)
        if steps is None:
            return _minimum(start, told, shrink).mul_(factor * unit).to(dtype)
        return _stepped(start, told, steps, rate, unit).mul_(factor * unit)

    return fusion.by_matrix(matrix, averaged(fusion.count, factor))


def _minimum(start: Tensor, told: Sequence[tuple[Tensor, float]], damping: float) -> Tensor:
    """In float64; `told` are the matrices of the tasks and their norms."""
    m, n = start.shape
    C = start.new_zeros(n, n, dtype=torch.float64)
    goal = start.new_zeros(m, n, dtype=torch.float64)
    for part, norm in told:
        row = part.double().div_(norm) if part.dtype != torch.float64 else part / norm
        C += gram(row)
        goal.add_(_cubed(row), alpha=norm)
    if damping:
        weight = damping * len(told) / n  # the trace of C is that of the tasks that are told of
        C.diagonal().add_(weight)
        goal.add_(start, alpha=weight)
    factor, singular = torch.linalg.cholesky_ex(C)
    if not singular:
        least = 1 / float(torch.linalg.matrix_norm(torch.cholesky_inverse(factor)))  # no eigenvalue is below it
        if least > WELL * float(C.trace()):
            return torch.cholesky_solve(goal.mT, factor).mT
    eigenvalues, V = torch.linalg.eigh(C)
    kept = eigenvalues > NOUGHT * n * torch.finfo(torch.float64).eps * eigenvalues[-1]
    V = V[:, kept]
    return ((goal @ V) / eigenvalues[kept]) @ V.mT


def _stepped(X: Tensor, told: Sequence[tuple[Tensor, float]], steps: int, rate: float, unit: float) -> Tensor:
    """Adam from X, in units of `unit`, which is written to; the gradient is ``2 (X C - goal)``."""
    C, goal = X.new_zeros(X.shape[1], X.shape[1]), torch.zeros_like(X)
    for part, norm in told:
        row = part / norm
        C.addmm_(row.mT, row)
        goal.add_(_cubed(row), alpha=norm)
    adam = Adam(X, rate / unit, 1e-8 / unit)
    for _ in range(steps):
        adam.step(torch.addmm(goal, X, C, beta=-1).mul_(2))
    return X


def _cubed(T: Tensor) -> Tensor:
    """``T T^T T``, by the smaller of the two Gram matrices."""
    m, n = T.shape
    return (T @ T.mT) @ T if m < n else T @ (T.mT @ T)
