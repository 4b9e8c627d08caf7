r"""The jammer that makes the best-served user as badly served as possible: what "strongest user" only approximates.

With the rates of successive cancellation, :math:`R_q = \log(1 + b_q^H X_q^{-1} b_q)`, where :math:`X_q` is the noise
plus the users decoded later, :math:`\min_C \max_q R_q` is convex in `C`. It is solved as
:math:`\max_C \min_q 1/\mathrm{SINR}_q` by an interior point method in the :math:`n^2` real coordinates of `C` in the
signal space, in units of `P_N`, and accepted by a bound on its error that follows from convexity alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs, batch_shape, check_channel, largest, powers
from ..errors import ConvergenceError
from ._interior_point import minimise_largest_sinr
from .rate import received_power
from .receivers import decoding_order

__all__ = ["min_max_rate_covariance"]

_ACCURACY = 2e-9  # of the largest SINR, relatively; so of the largest rate, in nats


def min_max_rate_covariance(
    H: Array, P: ArrayLike, P_N: ArrayLike, *, noise: ArrayLike = 0.0, order: str | Array = "weakest_first"
) -> Any:
    r"""The noise covariance of total power `P_N` that minimises the largest rate of any user.

    .. math:: \arg\min_{C \succeq 0,\ \mathrm{tr}\, C \le P_N}\ \max_q\ \log\Bigl(1 + b_q^H
              \bigl(\textstyle\sum_{j\ \text{after}\ q} b_j b_j^H + C + \sigma^2 I\bigr)^{-1} b_q\Bigr),
              \qquad B = H P^{1/2}

    The problem that the paper states as (P2). Its own answer, `strongest_user_covariance`, minimises the rate of one
    user instead and leaves the others theirs; here the attacked users end up with equal rates.

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        P_N: (...) the jammer's total power in W, at least 0: what the base station *receives* of it over all its
            antennas (:math:`\mathrm{tr}\, C`, behind its path loss), not what it transmits.
        noise: (...) thermal noise power per antenna in W, the floor :math:`\sigma^2`.
        order: of successive cancellation, as for `sic`; the paper's is weakest first.

    Returns:
        (..., N_R, N_R) complex: Hermitian positive semidefinite, of trace `P_N`; its largest rate is within 2e-9 of
        the optimum (nats, before it is rounded to the precision of `H`). Carries no gradient.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. InputError: a negative or non-finite power, or a wrong
            `order`. ConvergenceError: that accuracy was not reached, as the rounding of `C` alone may change rates by
            more. It takes users received 120 dB or more above both jammer and floor; or 50 dB or more apart without a
            floor (one of `P_N` times 1e-6 is enough); or powers 150 orders of magnitude apart.

    Note:
        A draw takes milliseconds for 8 users, and seconds for 32 on as many antennas: the equations that are solved in
        each of about ten steps have the square of the smaller of the two numbers as unknowns.

    Source: R-MTLLMF (P2). S. Boyd and L. Vandenberghe, "Convex Optimization", 2004, sections 5.5 and 11.8;
        S. Mehrotra, 1992, and C. Helmberg et al., 1996, for the steps.

    Example:
        Two orthogonal users of unequal strength end up with the same rate; the strongest-user attack spares the other.

        >>> import numpy as np
        >>> from rmtllmf.channel import sic, strongest_user_covariance
        >>> H, floor = np.diag([1.0, 2.0]) + 0j, 0.1 * np.eye(2)
        >>> C = min_max_rate_covariance(H, P=1.0, P_N=2.0, noise=0.1)
        >>> sic(H, 1.0, C + floor).rate.round(3)
        array([1.186, 1.186])
        >>> sic(H, 1.0, strongest_user_covariance(H, 1.0, 2.0) + floor).rate.round(3)
        array([2.398, 1.066])
    """
    inputs = Inputs.of(H, "H", P, P_N, noise, order)
    channel = inputs.complex(H, "H").detach()
    check_channel(channel)
    power = powers(inputs.nonnegative(P, "P"), channel).detach()
    jammer, floor = inputs.nonnegative(P_N, "P_N").detach(), inputs.nonnegative(noise, "noise").detach()
    sequence = decoding_order(inputs, order, received_power(channel, power))
    batch = batch_shape(
        ("H", channel.shape[:-2]),
        ("P", power.shape[:-1]),
        ("P_N", jammer.shape),
        ("noise", floor.shape),
        ("order", sequence.shape[:-1]),
    )
    B = channel * power.sqrt()[..., None, :]
    B = B.expand(*batch, *B.shape[-2:]).reshape(-1, *B.shape[-2:])
    sequence = sequence.expand(*batch, sequence.shape[-1]).reshape(-1, sequence.shape[-1])
    B = B.gather(-1, sequence[:, None, :].expand_as(B))  # first decoded first
    jammer, floor = jammer.expand(batch).reshape(-1), floor.expand(batch).reshape(-1)
    antennas = B.shape[-2]
    C = (jammer / antennas)[:, None, None] * torch.eye(antennas, dtype=B.dtype, device=B.device).expand(len(B), -1, -1)
    work = (jammer > 0) & (largest(B, dims=2) > 0)
    if bool(work.any()):
        C = C.clone()
        C[work] = _solve(B[work], jammer[work], floor[work])
    return inputs.back(C.reshape(*batch, antennas, antennas))


def _solve(B: Tensor, P_N: Tensor, s2: Tensor) -> Tensor:
    """(batch, N_R, N_R) for `B` in decoding order, all of it in units of `P_N` inside."""
    U, _, _ = torch.linalg.svd(B, full_matrices=False)
    root, gap = minimise_largest_sinr((U.mH @ B) / P_N.sqrt()[:, None, None], s2 / P_N)
    failed = ~(gap <= _ACCURACY)
    if bool(failed.any()):
        raise ConvergenceError(
            f"min_max_rate_covariance: no convergence for {int(failed.sum())} of {len(failed)} batch items, the "
            f"largest SINR is certain to {float(gap.max()):.0e}; are users received 120 dB above jammer and floor, or "
            "50 dB apart without a floor?"
        )
    half = U @ root * P_N.sqrt()[:, None, None]
    return half @ half.mH
