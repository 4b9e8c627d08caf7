"""The sum rate of the multiple access channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs, batch_shape, check_channel, check_hermitian, powers, resolution
from ._filters import gram_root, whiten

__all__ = ["sum_rate"]


def sum_rate(H: Array, P: ArrayLike, C: Array) -> Any:
    r"""The sum capacity for given noise: what the rates of successive cancellation add up to, in any order.

    .. math:: R = \log\det\bigl(I + H P H^H C^{-1}\bigr) \quad \text{[nats per channel use]}

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        C: (..., N_R, N_R) covariance of the *whole* noise in W (jammer plus thermal), positive semidefinite.

    Returns:
        (...) real. Infinite where a user reaches a direction in which there is no noise at all.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. NotPSDError: `C` is no covariance.
        InputError: a negative power or non-finite entries.

    Source: R-MTLLMF, eq. 13 (its eq. 4 is a lower bound, tight only for rank one).

    Example:
        >>> import numpy as np
        >>> H, C = np.eye(2) + 0j, np.diag([1.0, 3.0])
        >>> bool(np.isclose(sum_rate(H, 3.0, C), np.log(4) + np.log(2)))
        True
    """
    inputs = Inputs.of(H, "H", P, C)
    B, noise, eps = received(inputs, H, P, C)
    seen = whiten(B, noise, "C", eps)
    diagonal = torch.diagonal(gram_root(seen.signal), dim1=-2, dim2=-1)
    rate = 2 * diagonal.abs().log().sum(-1)
    if seen.clear is not None:
        rate = torch.where((seen.clear != 0).any(-1).any(-1), torch.inf, rate)
    return inputs.back(rate)


def received(inputs: Inputs, H: Array, P: ArrayLike, C: Array) -> tuple[Tensor, Tensor, float]:
    """Checked ``B = H P^{1/2}``, the noise covariance, and the resolution to judge its rank by."""
    channel = inputs.complex(H, "H")
    check_channel(channel)
    power = powers(inputs.nonnegative(P, "P"), channel)
    noise = inputs.complex(C, "C", real_too=True)
    eps = resolution(H, C)
    check_hermitian(noise, channel.shape[-2], "C", eps)
    batch_shape(("H", channel.shape[:-2]), ("P", power.shape[:-1]), ("C", noise.shape[:-2]))
    return channel * power.sqrt()[..., None, :], noise, eps
