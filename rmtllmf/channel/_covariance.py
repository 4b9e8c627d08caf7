"""Doors that several countermeasures share: covariances, counts, and one number a user."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arrays import ArrayLike, Inputs, check_hermitian, resolution
from ..errors import ShapeError


def covariance_input(value: object, argument: str, *others: object, size: int | None = None) -> tuple[Inputs, Tensor]:
    """A Hermitian (..., size, size) in complex128, and how to give it back: torch if any is, in its own precision.

    Its own, because the precision of a covariance decides which of its eigenvalues count as zero.
    """
    inputs = Inputs.of(value, argument, *others)
    C = inputs.complex(value, argument, real_too=True)
    if size is None:
        if C.ndim < 2 or C.shape[-1] == 0:
            raise ShapeError(f"{argument}: expected shape (..., N_R, N_R) with N_R >= 1, got {tuple(C.shape)}")
        size = C.shape[-1]
    check_hermitian(C, size, argument, resolution(value))
    return inputs, C


def per_user(inputs: Inputs, value: ArrayLike, argument: str, shape: torch.Size) -> Tensor:
    """Numbers >= 0, one for all users or one a user, that broadcast with `shape`, the (..., Q) of the channel."""
    numbers = inputs.nonnegative(value, argument)
    if numbers.ndim and numbers.shape[-1] not in (1, shape[-1]):
        raise ShapeError(f"{argument}: expected a number or shape (..., {shape[-1]}), got {tuple(numbers.shape)}")
    try:
        return numbers.expand(torch.broadcast_shapes(numbers.shape, shape))
    except RuntimeError:
        raise ShapeError(
            f"{argument}: shape {tuple(numbers.shape)} does not broadcast with {tuple(shape)}, the users of H"
        ) from None
