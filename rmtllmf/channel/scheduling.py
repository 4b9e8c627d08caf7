"""One user at a time: the orthogonal alternative to sending together."""

from __future__ import annotations

from typing import Any

import torch

from .._arrays import Array, ArrayLike, Inputs, check_channel, powers
from ..errors import ShapeError
from ._covariance import covariance_input
from .receivers import lmmse
from .reception import Reception

__all__ = ["scheduled"]


def scheduled(
    H: Array,
    P: ArrayLike,
    C: Array,
    *,
    designed_for: Array | None = None,
    same_energy: bool = True,
    per_slot: bool = False,
) -> Reception:
    r"""Users in turn, each alone in a channel use of its own.

    .. math:: y_q = h_q \sqrt{\eta\, p_q}\, s_q + z_q, \qquad z_q \sim \mathcal{CN}(0, C), \qquad
              \text{matched:}\quad \mu_q = \frac{1}{1 + \eta\, p_q\, h_q^H C^{-1} h_q}

    with :math:`\eta = Q` if `same_energy`, else 1. There is no interference and nothing to cancel, and it takes Q
    channel uses until every user has sent one symbol. What may be compared with what, per symbol of every user:

    ==========================================  ============  ================
    transmission                                channel uses  energy of user q
    ==========================================  ============  ================
    ``sic(H, P, C)``                            1             :math:`p_q`
    ``scheduled(..., same_energy=False)``       Q             :math:`p_q`
    ``scheduled(...)``                          Q             :math:`Q p_q`
    ``repeat_block(H, C, Q)``, then ``sic``     Q             :math:`Q p_q`
    ==========================================  ============  ================

    so that repetition by all users together is the competitor at equal channel uses and equal energy. `rate` is in nats
    per channel use *of the user's own slot*; per channel use of the whole frame it is ``rate / Q``. A frame that is
    given only one channel use per symbol of every user can carry the symbols no better than with
    :math:`e^{-R_q / Q}` (rate distortion, as in eq. 5) in place of `mse`.

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W when all send together: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        C: (..., N_R, N_R) covariance of the whole noise in W, in every slot.
        designed_for: (..., N_R, N_R) the covariance that the receiver believes in; None: it knows `C`.
        same_energy: multiply the powers by Q: each user is silent in Q - 1 of Q slots, and saves up.
        per_slot: `C` and `designed_for` are (..., Q, N_R, N_R), a covariance for every slot, for a jammer that knows
            whose turn it is. The users' slots as a batch of channels are ``H.swapaxes(-1, -2)[..., None]``,
            (..., Q, N_R, 1).

    Returns:
        A `Reception` in the columns' own order, ``order`` None, with errors that are uncorrelated across users.

    Raises:
        TypeError, ShapeError, NotPSDError, InputError: as `lmmse`; ShapeError also if `per_slot` finds no Q slots.

    Source: time division multiple access; T. Cover and J. Thomas, "Elements of Information Theory", section 15.3.

    Example:
        >>> import numpy as np
        >>> H, C = np.ones((1, 2)) + 0j, np.eye(1)
        >>> lmmse(H, 1.0, C).sinr, scheduled(H, 1.0, C).sinr
        (array([0.5, 0.5]), array([2., 2.]))
    """
    inputs = Inputs.of(H, "H", P, C, designed_for)
    channel = inputs.complex(H, "H")
    check_channel(channel)
    users = channel.shape[-1]
    power = powers(inputs.nonnegative(P, "P"), channel) * (users if same_energy else 1)

    def in_slots(value: Array, argument: str) -> Any:
        own, covariance = covariance_input(value, argument, H, P, C, designed_for, size=channel.shape[-2])
        if not per_slot:
            return own.back(covariance[..., None, :, :])
        if covariance.ndim < 3 or covariance.shape[-3] != users:
            raise ShapeError(
                f"{argument}: expected {users} slots, (..., {users}, N_R, N_R), got {tuple(covariance.shape)}"
            )
        return value

    design = None if designed_for is None else in_slots(designed_for, "designed_for")
    slots = inputs.back(channel.mT[..., None])
    rx = lmmse(slots, inputs.back(power[..., None]), in_slots(C, "C"), designed_for=design)
    eye = inputs.back(torch.eye(users, dtype=torch.complex128, device=inputs.device))
    return Reception(
        mse=rx.mse[..., 0],
        sinr=rx.sinr[..., 0],
        rate=rx.rate[..., 0],
        gain=rx.gain[..., 0],
        order=None,
        error_covariance=rx.error_covariance[..., 0] * eye,
        noise_covariance=rx.noise_covariance[..., 0] * eye,
    )
