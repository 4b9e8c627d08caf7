"""The sum rate of the multiple access channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arrays import (
    SINGLE,
    Array,
    ArrayLike,
    Inputs,
    batch_shape,
    check_channel,
    check_hermitian,
    largest,
    powers,
    resolution,
)
from ._filters import Received, log_det, warn_floorless

__all__ = ["sum_rate"]


def sum_rate(H: Array, P: ArrayLike, C: Array) -> Any:
    r"""The sum capacity for given noise: what the rates of successive cancellation add up to, in any order.

    .. math:: R = \log\det\bigl(I + H P H^H C^{-1}\bigr) \quad \text{[nats per channel use]}

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        C: (..., N_R, N_R) covariance of the *whole* noise in W (jammer plus thermal), positive semidefinite.

    Returns:
        (...) real. Infinite where a user reaches a direction in which there is no noise at all; of a `C` in single
        precision, which cannot hold noise 60 dB below its largest, a `RmtllmfWarning` says so.

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
    link = received(inputs, H, P, C)
    rate = log_det(link, "C")
    if link.eps_noise >= SINGLE and bool(rate.detach().isinf().any()):
        warn_floorless()
    return inputs.back(rate)


def received(inputs: Inputs, H: Array, P: ArrayLike, C: Array) -> Received:
    """Checked channel, powers and noise covariance."""
    channel = inputs.complex(H, "H")
    check_channel(channel)
    power = powers(inputs.nonnegative(P, "P"), channel)
    noise = inputs.complex(C, "C", real_too=True)
    check_hermitian(noise, channel.shape[-2], "C", resolution(C))
    batch_shape(("H", channel.shape[:-2]), ("P", power.shape[:-1]), ("C", noise.shape[:-2]))
    if power.requires_grad and torch.is_grad_enabled() and bool((power.detach() == 0).any()):
        raise TypeError("P: requires a gradient, but a user is silent, and amplitudes have none at P = 0; leave it out")
    B = channel * power.sqrt()[..., None, :]
    return Received(B, noise, received_power(channel, power), resolution(H), resolution(C))


def received_power(H: Tensor, P: Tensor) -> Tensor:
    """(..., Q) power of every user over all antennas, up to a common factor: what users are ordered by."""
    peak = largest(H, dims=2)[..., None]
    return P.detach() * (H.detach() / torch.where(peak > 0, peak, 1.0)[..., None]).abs().square().sum(-2)
