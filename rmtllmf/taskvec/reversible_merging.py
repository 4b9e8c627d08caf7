"""Reversible merging of low-rank updates: a small basis, and for each task the coefficients that take it back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .._state import check_keys, whole_number
from .._threads import share_out
from ..errors import InputError, StateMismatchError
from .low_rank import LowRank
from .vector import TaskVector

__all__ = ["Basis", "ReversibleMerge", "reversible_merging"]


class Basis(NamedTuple):
    r"""k positions of N tasks, each a vector of r numbers: :math:`x_{qk} \approx \mu_k + V_k \, c_{qk}`.

    Attributes:
        mean: :math:`\mu`, (k, r).
        directions: V, (k, r, p), orthonormal at every position.
        coefficients: c, (N, k, p).
    """

    mean: Tensor
    directions: Tensor
    coefficients: Tensor

    def of(self, task: int) -> Tensor:
        """What comes back of a task, (k, r)."""
        return self.mean + (self.directions @ self.coefficients[task].unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class ReversibleMerge:
    r"""The low-rank updates of N tasks in one basis; see `reversible_merging`.

    Attributes:
        A: name -> `Basis` of the factors A (r, n): its positions are their n columns.
        B: name -> `Basis` of the factors B (m, r): its positions are their m rows.
        sizes: for each task name -> :math:`\|B A\|_F` of what was merged.
        errors: for each task name -> :math:`\|\hat B \hat A - B A\|_F / \|B A\|_F`, 0 if that is all zero.
        rest: for each task the entries that were not factored, as they are.
        shapes: name -> shape, of all entries in their order.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import low_rank
        >>> stored = reversible_merging([low_rank({"w": factor * torch.ones(3, 4)}, 1) for factor in (1.0, 4.0)])
        >>> stored.storage_bits, {key: basis.directions.shape for key, basis in stored.A.items()}
        (896, {'w': torch.Size([4, 1, 1])})
        >>> torch.allclose(stored.task_vector(1)["w"], torch.full((3, 4), 4.0))
        True
    """

    A: Mapping[str, Basis]
    B: Mapping[str, Basis]
    sizes: tuple[Mapping[str, float], ...]
    errors: tuple[Mapping[str, float], ...]
    rest: tuple[Mapping[str, Tensor], ...]
    shapes: Mapping[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.rest)

    def low_rank(self, task: int) -> LowRank:
        """The factors of one task, from 0 on: ``.save_adapter(folder)`` makes an adapter of them.

        Their `error` is that of the product beside the product that was merged.

        Raises:
            InputError: there is no such task.

        Example: see `reversible_merging`.
        """
        task = whole_number(task, "task", at_least=0)
        if task >= len(self):
            raise InputError(f"task: expected a number below {len(self)}, that of the tasks, got {task}")
        made: dict[int, tuple[Tensor, Tensor]] = {}
        A, B = {}, {}
        for key, basis in self.A.items():
            if id(basis) not in made:  # tied names share theirs
                made[id(basis)] = basis.of(task).mT.contiguous(), self.B[key].of(task)
            A[key], B[key] = made[id(basis)]
        sizes, errors = self.sizes[task], self.errors[task]
        lost = hypot(*(errors[key] * size for key, size in sizes.items()))
        size = hypot(*sizes.values(), *(float(tensor.double().norm()) for tensor in self.rest[task].values()))
        return LowRank(
            A=MappingProxyType(A),
            B=MappingProxyType(B),
            error=errors,
            total_error=lost / size if size else 0.0,
            rest=self.rest[task],
            shapes=self.shapes,
        )

    def task_vector(self, task: int) -> TaskVector:
        """The update of one task, from 0 on: ``.apply_to(base)`` makes its model.

        Raises:
            InputError: there is no such task.

        Example: see `reversible_merging`.
        """
        return self.low_rank(task).dense()

    @property
    def storage_bits(self) -> int:
        """Bits of basis, coefficients and the rest: p (r + N) + r numbers at each position, where N tasks have r N."""
        tensors = [tensor for side in (self.A, self.B) for basis in side.values() for tensor in basis]
        tensors += [tensor for rest in self.rest for tensor in rest.values()]
        distinct = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
        return 8 * sum(distinct.values())

    def __repr__(self) -> str:
        worst = max((error for errors in self.errors for error in errors.values()), default=0.0)
        return f"ReversibleMerge({len(self)} tasks, {len(self.A)} matrices, largest error {worst:.3g})"


def reversible_merging(updates: Iterable[LowRank], components: int = 1) -> ReversibleMerge:
    r"""Merge low-rank updates so that each of them can be taken back: reversible model merging (RMM).

    .. math::
        \min_{\mu, V, c} \sum_{q=1}^N \| x_q - \mu - V c_q \|^2 \quad \text{with } V^T V = I_p: \qquad
        \mu = \tfrac1N \sum_q x_q, \quad c_q = V^T (x_q - \mu)

    and V the p leading left singular vectors of the centred :math:`[x_1 - \mu, \dots, x_N - \mu]`, for every row x of B
    and every column x of A, which are vectors of r numbers, where :math:`\Delta_q = B_q A_q`. A single merged update of
    low rank serves no task well; mean, p directions and N p coefficients take p (r + N) + r numbers at each position,
    where N updates have r N, and serve each.

    Args:
        updates: N of what `low_rank` returns, with the same names, shapes and ranks, such as ``[low_rank(adapter, 16)
            for adapter in aligned(adapters)]``.
        components: p, at least 1. From min(r, N - 1) on everything comes back, and no more is stored.

    Returns:
        A `ReversibleMerge`, in the dtype of the factors. What was not factored (biases, norms) is kept for each task.

    Raises:
        TypeError: something that is no `LowRank`. InputError: no updates, or `components` below 1.
        StateMismatchError: names, shapes or ranks disagree.

    Note:
        The factors are merged as they are. Those of `low_rank` are singular vectors, whose signs are arbitrary, so that
        tasks with nearly the same update may need a direction to part them.

    Source: Alipour and Amiri, "Towards reversible model merging for low-rank weights", 2025. That :math:`\mu` is the
    mean follows from the storage that the paper states, p (r + N) + r of r N numbers.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import low_rank
        >>> source = torch.Generator().manual_seed(0)
        >>> factors = [(torch.randn(6, 2, generator=source), torch.randn(2, 5, generator=source)) for _ in range(3)]
        >>> updates = [{"w": B @ A} for B, A in factors]
        >>> stored = reversible_merging([low_rank(update, 2) for update in updates], 2)
        >>> torch.allclose(stored.task_vector(1)["w"], updates[1]["w"], atol=1e-5)  # p = N - 1
        True
    """
    if isinstance(updates, LowRank) or not isinstance(updates, Iterable):
        raise TypeError(f"updates: expected a sequence of LowRank, got {type(updates).__name__}")
    given = list(updates)
    for index, update in enumerate(given):
        if not isinstance(update, LowRank):
            raise TypeError(f"updates[{index}]: expected what low_rank() returns, got {type(update).__name__}")
    if not given:
        raise InputError("updates: expected at least one LowRank, got an empty sequence")
    count = whole_number(components, "components", at_least=1)
    _check(given)
    names = list(given[0].A)
    first: dict[Hashable, str] = {}
    owner = {
        key: first.setdefault(tuple((id(update.A[key]), id(update.B[key])) for update in given), key) for key in names
    }
    found: dict[str, _Found] = {}

    def worker() -> Callable[[str], None]:
        def merge(key: str) -> None:
            A, B = [update.A[key].mT for update in given], [update.B[key] for update in given]
            sides = _basis(A, count), _basis(B, count)
            pairs = list(zip(A, B, strict=True))
            sizes = [_norm(a.mT, b) for a, b in pairs]
            lost = [_apart(a, b, *(side.of(task) for side in sides)) for task, (a, b) in enumerate(pairs)]
            errors = [part / size if size else 0.0 for part, size in zip(lost, sizes, strict=True)]
            found[key] = _Found(*sides, sizes, errors)

        return merge

    distinct = sorted(set(owner.values()), key=lambda key: (-given[0].A[key].numel() - given[0].B[key].numel(), key))
    share_out(worker, distinct, alone=any(given[0].A[key].device.type != "cpu" for key in names))
    of = {key: found[owner[key]] for key in names}

    def each(numbers: Callable[[_Found], list[float]]) -> tuple[Mapping[str, float], ...]:
        return tuple(
            MappingProxyType({key: numbers(one)[task] for key, one in of.items()}) for task in range(len(given))
        )

    return ReversibleMerge(
        A=MappingProxyType({key: one.A for key, one in of.items()}),
        B=MappingProxyType({key: one.B for key, one in of.items()}),
        sizes=each(lambda one: one.sizes),
        errors=each(lambda one: one.errors),
        rest=tuple(update.rest for update in given),
        shapes=given[0].shapes,
    )


class _Found(NamedTuple):
    """Of one matrix: a number for each task."""

    A: Basis
    B: Basis
    sizes: list[float]
    errors: list[float]


def _check(updates: Sequence[LowRank]) -> None:
    """Raise unless all have the names, shapes and ranks of the first."""
    reference = updates[0]
    for index, update in enumerate(updates[1:], 1):
        check_keys(update.shapes, reference.shapes, f"updates[{index}]", "updates[0]")
        check_keys(update.A, reference.A, f"the factors of updates[{index}]", "those of updates[0]")
        for key, shape in update.shapes.items():
            if shape != reference.shapes[key]:
                raise StateMismatchError(
                    f"updates[{index}]: {key!r} has shape {shape}; in updates[0] it has {reference.shapes[key]}"
                )
            if key in update.A and len(update.A[key]) != len(reference.A[key]):
                raise StateMismatchError(
                    f"updates[{index}]: {key!r} has rank {len(update.A[key])}; in updates[0] it has "
                    f"{len(reference.A[key])}"
                )


def _basis(factors: Sequence[Tensor], components: int) -> Basis:
    """Of N tasks' rows (k, r)."""
    dtype = factors[0].dtype
    x = torch.stack([factor.double() for factor in factors], -1)  # (k, r, N)
    mean = x.mean(-1)
    x = x - mean.unsqueeze(-1)
    kept = min(components, x.shape[1], len(factors) - 1)
    directions = torch.linalg.svd(x, full_matrices=False).U[..., :kept]
    coefficients = (directions.mT @ x).permute(2, 0, 1)
    return Basis(mean.to(dtype), directions.to(dtype).contiguous(), coefficients.to(dtype).contiguous())


def _norm(A: Tensor, B: Tensor) -> float:
    """Of ``B A``, without making it."""
    A, B = A.double(), B.double()
    return max(0.0, float(((B.mT @ B) * (A @ A.mT)).sum())) ** 0.5


def _apart(a: Tensor, b: Tensor, restored_a: Tensor, restored_b: Tensor) -> float:
    """The norm of the difference of two products; all factors have r columns."""
    off_b, off_a = restored_b.double() - b.double(), restored_a.double() - a.double()
    # B'A' - B A = (B' - B) A' + B (A' - A), so that nothing cancels
    return _norm(torch.cat([restored_a.double(), off_a], 1).mT, torch.cat([off_b, b.double()], 1))
