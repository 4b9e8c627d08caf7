"""OSRM: where adapters should begin so that they can be fused, orthogonal to what the other tasks' data look like."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .._state import Tensors, all_finite, check_keys, whole_number, wide
from ..errors import InputError, NonFiniteError, NotPSDError, ShapeError, StateMismatchError
from .rules._statistics import listed

__all__ = ["osrm"]


def osrm(grams: Iterable[Tensors], rank: int) -> list[dict[str, Tensor]]:
    r"""For each task the factors A with which the fine-tuning of its LoRA adapter should begin.

    .. math::
        A_q = \arg\min_{A A^T = I_r} \operatorname{tr}\Big( A \sum_{p \ne q} G_p \, A^T \Big), \qquad
        G_p = \frac{1}{n_p} \sum_t x_{p,t} x_{p,t}^T

    whose rows are the eigenvectors of the r smallest eigenvalues. What interferes when adapters are fused is
    :math:`B_q A_q x_p`, task q's update of task p's inputs, and not that updates overlap. It is small from the start
    where :math:`A_q x_p` is, whatever is learnt for :math:`B_q` (which begins at 0); then any rule may fuse the
    adapters, such as ``task_arithmetic(aligned(adapters))``.

    Args:
        grams: for each of N >= 2 tasks the mean outer products of the inputs of the layers that get adapters, in the
            base model: name of a weight -> (n, n), or (b, n, n) for b blocks, which are added up: `input_grams`.
        rank: r, of the adapters; at most n.

    Returns:
        For each task name -> A (r, n), with orthonormal rows, in the dtype of the Gram matrices (float32 at least): for
        ``lora_A`` of PEFT. Eigenvalues that are the same leave the choice open.

    Raises:
        InputError: fewer than two tasks. ShapeError: a matrix that is not square, or has fewer rows than `rank`.
        StateMismatchError: names or sizes disagree. NotPSDError: a matrix that is no sum of outer products.
        NonFiniteError: NaN or infinity. TypeError: no tensors.

    Note:
        A direction that no other task uses may be one that task q does not use either. An adapter that begins in such
        directions only cannot learn: give Gram matrices of enough inputs, more than n.

    Source: Zhang and Zhou, "Unraveling LoRA interference: orthogonal subspaces for robust model merging", 2025.

    Example:
        >>> import torch
        >>> a, b = torch.diag(torch.tensor([9.0, 1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0, 9.0]))
        >>> [A["fc"].abs() for A in osrm([{"fc": a}, {"fc": b}], rank=1)]
        [tensor([[1., 0., 0.]]), tensor([[0., 0., 1.]])]
    """
    rank = whole_number(rank, "rank", at_least=1)
    given = [_checked(mapping, f"grams[{task}]", rank) for task, mapping in enumerate(listed(grams, "grams"))]
    if len(given) < 2:
        raise InputError(f"grams: expected those of two tasks or more, got {len(given)}")
    for task, mapping in enumerate(given[1:], 1):
        check_keys(mapping, given[0], f"grams[{task}]", "grams[0]")
        for key, gram in mapping.items():
            if gram.shape != given[0][key].shape:
                raise StateMismatchError(
                    f"grams[{task}][{key!r}] is of size {len(gram)}; grams[0] has {len(given[0][key])}"
                )
    result: list[dict[str, Tensor]] = [{} for _ in given]
    for key, first in given[0].items():
        for task, begin in enumerate(result):
            others = torch.zeros_like(first, dtype=torch.float64)
            for other, mapping in enumerate(given):
                if other != task:
                    others += mapping[key]
            begin[key] = _smallest(others, rank, key).to(first.dtype)
    return result


def _checked(mapping: Tensors, label: str, rank: int) -> dict[str, Tensor]:
    """The Gram matrices, blocks added up, in float32 at least."""
    result = {}
    for key, gram in mapping.items():
        if not isinstance(gram, Tensor) or not gram.is_floating_point():
            kind = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
            raise TypeError(f"{label}[{key!r}]: expected a floating-point tensor, got {kind}")
        if gram.ndim not in (2, 3) or gram.shape[-1] != gram.shape[-2]:
            raise ShapeError(f"{label}[{key!r}]: expected (n, n) or (b, n, n), got {tuple(gram.shape)}")
        if gram.shape[-1] < rank:
            raise ShapeError(f"{label}[{key!r}]: rank {rank} needs as many inputs, the layer has {gram.shape[-1]}")
        if not all_finite(gram):
            raise NonFiniteError(f"{label}[{key!r}] holds non-finite entries; expected finite numbers")
        result[key] = wide(gram.detach() if gram.ndim == 2 else gram.detach().sum(0))
    if not result:
        raise InputError(f"{label}: holds no Gram matrices")
    return result


def _smallest(gram: Tensor, rank: int, key: str) -> Tensor:
    """The eigenvectors of the smallest eigenvalues, one a row."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    least, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    if least < -1e-5 * max(largest, 0.0):
        raise NotPSDError(f"grams: those of {key!r} have the eigenvalue {least:.3g}; expected none below 0")
    return vectors[:, :rank].mT.contiguous()
