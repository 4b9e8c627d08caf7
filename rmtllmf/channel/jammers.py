"""Simpler jammers than the worst case: aimed at one user, or at nobody in particular."""

from __future__ import annotations

from typing import Any

import torch

from .._arrays import Array, ArrayLike, Inputs, batch_shape, check_channel, largest, powers
from .rate import received_power

__all__ = ["barrage_covariance", "strongest_user_covariance"]


def strongest_user_covariance(H: Array, P: ArrayLike, P_N: ArrayLike) -> Any:
    r"""All of the jammer's power along the channel of the user who is received most strongly.

    .. math:: C = P_N\, \frac{h_Q h_Q^H}{\lVert h_Q \rVert^2}, \qquad Q = \arg\max_q\ p_q \lVert h_q \rVert^2

    This minimises the rate that user Q has when it is decoded last, with or without a thermal floor. The paper
    introduces it as the solution of :math:`\min_C \max_q R_q`, which it is not: the other users keep their rates.
    It has rank one, so without a floor every other user can null it.

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        P_N: (...) the jammer's total power in W, at least 0: what the base station *receives* of it over all its
            antennas (:math:`\mathrm{tr}\, C`, behind its path loss), not what it transmits.

    Returns:
        (..., N_R, N_R) complex, of rank one and trace `P_N`. Of equally strong users the one with the highest index
        is taken (the last in a stable sort, as in `sic`); if all are silent, the white covariance.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. InputError: a negative or non-finite power.

    Source: R-MTLLMF (P2), eq. 15.

    Example:
        >>> import numpy as np
        >>> H = np.array([[1.0, 0.0], [0.0, 2.0]]) + 0j
        >>> strongest_user_covariance(H, P=1.0, P_N=3.0).real
        array([[0., 0.],
               [0., 3.]])
    """
    inputs = Inputs.of(H, "H", P, P_N)
    channel = inputs.complex(H, "H")
    check_channel(channel)
    power, jammer = powers(inputs.nonnegative(P, "P"), channel), inputs.nonnegative(P_N, "P_N")
    batch = batch_shape(("H", channel.shape[:-2]), ("P", power.shape[:-1]), ("P_N", jammer.shape))
    received = received_power(channel, power)
    peak = largest(channel, dims=2)[..., None, None]
    channel = channel / torch.where(peak > 0, peak, 1.0)
    strongest = received.sort(dim=-1, stable=True).indices[..., -1:]
    silent = received.amax(-1) == 0
    antennas = channel.shape[-2]
    columns = channel.expand(*received.shape[:-1], *channel.shape[-2:])
    h = columns.gather(-1, strongest[..., None, :].expand(*strongest.shape[:-1], antennas, 1))
    energy = h.abs().square().sum(dim=-2, keepdim=True)
    direction = (h @ h.mH) / torch.where(energy > 0, energy, 1.0)
    white = torch.eye(antennas, dtype=h.dtype, device=h.device) / antennas
    shape = torch.where(silent[..., None, None], white, direction)
    return inputs.back(jammer.expand(batch)[..., None, None] * shape)


def barrage_covariance(H: Array, P_N: ArrayLike) -> Any:
    r"""White noise of total power `P_N`: what a jammer does that does not know the channel.

    .. math:: C = \frac{P_N}{N_R} I

    Args:
        H: (..., N_R, Q) complex channel; only its shape, kind and precision matter.
        P_N: (...) the jammer's total power in W, at least 0: what the base station *receives* of it over all its
            antennas (:math:`\mathrm{tr}\, C`, behind its path loss), not what it transmits.

    Returns:
        (..., N_R, N_R) complex, of trace `P_N`.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. InputError: a negative or non-finite power.

    Source: the "barrage jammer" of the jamming literature; the baseline that an attack is compared with.

    Example:
        >>> import numpy as np
        >>> barrage_covariance(np.ones((2, 5)) + 0j, P_N=3.0).real
        array([[1.5, 0. ],
               [0. , 1.5]])
    """
    inputs = Inputs.of(H, "H", P_N)
    channel = inputs.complex(H, "H")
    check_channel(channel)
    jammer = inputs.nonnegative(P_N, "P_N")
    antennas = channel.shape[-2]
    batch = batch_shape(("H", channel.shape[:-2]), ("P_N", jammer.shape))
    eye = torch.eye(antennas, dtype=torch.complex128, device=inputs.device)
    return inputs.back((jammer.expand(batch) / antennas)[..., None, None] * eye)
