"""Transmit powers that follow the channel: inversion to a target, and the fractional rule between all and nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs, check_channel
from .._state import finite_number
from ..errors import InputError
from ._covariance import per_user

__all__ = ["channel_inversion", "fractional_power_control"]


def channel_inversion(
    H: Array, target: ArrayLike, *, max_power: ArrayLike | None = None, gain: ArrayLike | None = None
) -> Any:
    r"""Powers with which every user is received equally strongly, as far as its maximum allows.

    .. math:: p_q = \min\bigl(P_{\max},\ t / g_q\bigr), \qquad g_q = \lVert h_q \rVert^2

    Against a jammer of fixed power this is a poor defence: near users give their advantage away, and nobody gains.

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        target: :math:`t`, the received power in W, summed over the antennas: a number or (..., Q).
        max_power: :math:`P_{\max}` in W, a number or (..., Q); a user who would need more sends with this. None: no
            limit.
        gain: (..., Q) power gains to invert instead of :math:`\lVert h_q \rVert^2`, summed over the antennas. With
            the mean gain, ``N_R * scenario.gain(distances)``, the powers follow the path loss and not the fading.

    Returns:
        (..., Q) real, transmit powers in W.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. InputError: a negative number, or a user without any
            gain and without `max_power`; NonFiniteError: NaN or infinity.

    Source: A. Goldsmith and P. Varaiya, IEEE Trans. Information Theory 43, 1997.

    Example:
        >>> import numpy as np
        >>> channel_inversion(np.diag([1.0, 2.0, 0.1]) + 0j, target=0.5, max_power=1.0)
        array([0.5  , 0.125, 1.   ])
    """
    inputs, g = _gains(H, gain, target, max_power)
    wanted = per_user(inputs, target, "target", g.shape)
    silent = g == 0
    needed = wanted / torch.where(silent, 1.0, g)
    if max_power is None:
        if bool((silent & (wanted > 0)).any()):
            raise InputError("max_power: a user without any channel gain would need infinite power; give a maximum")
        return inputs.back(needed)
    limit = per_user(inputs, max_power, "max_power", g.shape)
    return inputs.back(torch.where(silent & (wanted > 0), limit, torch.minimum(needed, limit)))


def fractional_power_control(
    H: Array, max_power: ArrayLike, *, exponent: float = 1.0, gain: ArrayLike | None = None
) -> Any:
    r"""Powers that make up for a part of the differences between the users.

    .. math:: p_q = P_{\max,q}\, \Bigl(\frac{\min_j r_j}{r_q}\Bigr)^{\kappa}, \qquad r_q = P_{\max,q}\, g_q, \quad
              g_q = \lVert h_q \rVert^2

    At :math:`\kappa = 0` everybody sends with full power; at :math:`\kappa = 1` everybody is received with the power
    of the weakest, which is the largest that all can reach (max-min fair in received power). In dB the received powers
    are compressed by the factor :math:`1 - \kappa`.

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        max_power: :math:`P_{\max}` in W, a number or (..., Q).
        exponent: :math:`\kappa` from 0 to 1; 3GPP has 0.4 to 1.
        gain: (..., Q) power gains to go by instead of :math:`\lVert h_q \rVert^2`, as for `channel_inversion`.

    Returns:
        (..., Q) real, transmit powers in W, none above `max_power`. A user without gain keeps `max_power` and does
        not count as the weakest.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. InputError: a negative number, `exponent` outside 0 to 1.

    Source: 3GPP TS 36.213, section 5.1.1 (open loop), with the weakest user at full power.

    Example:
        >>> import numpy as np
        >>> fractional_power_control(np.diag([1.0, 2.0]) + 0j, max_power=1.0, exponent=0.5)
        array([1. , 0.5])
    """
    inputs, g = _gains(H, gain, max_power)
    limit = per_user(inputs, max_power, "max_power", g.shape)
    power = finite_number(exponent, "exponent")
    if not 0 <= power <= 1:
        raise InputError(f"exponent: expected a number from 0 to 1, got {power}")
    received = limit * g
    heard = received > 0
    weakest = torch.where(heard, received, torch.inf).amin(dim=-1, keepdim=True)
    ratio = torch.where(heard, weakest / torch.where(heard, received, 1.0), 1.0)
    return inputs.back(limit * ratio**power)


def _gains(H: Array, gain: ArrayLike | None, *others: ArrayLike | None) -> tuple[Inputs, Tensor]:
    inputs = Inputs.of(H, "H", gain, *others)
    channel = inputs.complex(H, "H")
    check_channel(channel)
    if gain is None:
        return inputs, channel.abs().square().sum(-2)
    return inputs, per_user(inputs, gain, "gain", torch.Size((*channel.shape[:-2], channel.shape[-1])))
