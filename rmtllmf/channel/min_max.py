r"""The jammer that makes the best-served user as badly served as possible: what "strongest user" only approximates.

With the rates of successive cancellation, :math:`R_q = \log\det(X_q + b_q b_q^H) - \log\det X_q`, where :math:`X_q` is
the noise plus the users decoded later, :math:`\min_C \max_q R_q` is convex in `C`. It is solved by a barrier method:
for growing t, Newton's method minimises

.. math:: t\, s - \sum_q \log(s - R_q(C)) - \log\det C - \log(1 - \mathrm{tr}\, C)

over s and the :math:`n^2` real coordinates of `C` in the signal space, in units of `P_N`. At its minimum s is within
:math:`(Q + n + 1)/t` of the optimum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs, batch_shape, check_channel, largest, powers
from ..errors import ConvergenceError
from .rate import received_power
from .receivers import decoding_order

__all__ = ["min_max_rate_covariance"]

_ACCURACY = 1e-9  # of the largest rate, in nats
_GROWTH = 30.0
_CENTRED = 1e-11  # decrement, in units of t, from which on a centre is exact enough
_TOLERATED = 1e-9  # and up to which it is not worth an error: the accuracy that is promised
_MAX_STEPS = 100  # Newton steps for one t


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
        P_N: (...) the jammer's total power in W, at least 0.
        noise: (...) thermal noise power per antenna in W, the floor :math:`\sigma^2`.
        order: of successive cancellation, as for `sic`; the paper's is weakest first.

    Returns:
        (..., N_R, N_R) complex: Hermitian positive semidefinite, of trace `P_N`; its largest rate is within 2e-9 of
        the optimum (nats). Carries no gradient.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. InputError: a negative or non-finite power, or a wrong
            `order`. ConvergenceError: Newton's method failed; rarely, and only where users are received 60 dB or more
            above both jammer and floor.

    Source: R-MTLLMF (P2). S. Boyd and L. Vandenberghe, "Convex Optimization", 2004, section 11.3.

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
    size = U.shape[-1]
    signal = (U.mH @ B) / P_N.sqrt()[:, None, None]
    floor = s2 / P_N
    basis = _hermitian_basis(size).to(B.device)
    batch, eye = len(B), torch.eye(size, dtype=B.dtype, device=B.device)
    C = (eye / (2 * size)).expand(batch, -1, -1)
    s = _rates(signal, C, floor)[0].amax(-1) + 1.0
    t = 1.0
    constraints = signal.shape[-1] + size + 1
    while True:
        C, s = _centre(signal, floor, basis, C, s, t)
        if constraints / t < _ACCURACY:
            break
        t *= _GROWTH
    C = C / torch.diagonal(C, dim1=-2, dim2=-1).real.sum(-1)[:, None, None]  # the last 1e-10 of the power
    whole = U @ C @ U.mH
    return 0.5 * (whole + whole.mH) * P_N[:, None, None]


def _rates(signal: Tensor, C: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rates (batch, Q), NaN where C is not positive, and the inverses of X_q and X_q + b_q b_q^H (batch, Q, n, n)."""
    users = signal.shape[-1]
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    X = C + floor[:, None, None] * eye
    outer = signal.mT[..., :, None] * signal.mT.conj()[..., None, :]
    later = outer.flip(1).cumsum(1).flip(1)  # q and those decoded after it
    heard = X[:, None] + later
    others = torch.cat([heard[:, 1:], X[:, None]], dim=1)
    both = torch.cat([others, heard], dim=1)
    L, failed = torch.linalg.cholesky_ex(both)
    inverse = torch.cholesky_inverse(L)
    logdet = 2 * torch.diagonal(L, dim1=-2, dim2=-1).real.log().sum(-1)
    logdet = torch.where(failed == 0, logdet, torch.nan)
    return logdet[:, users:] - logdet[:, :users], inverse[:, :users], inverse[:, users:]


def _centre(signal: Tensor, floor: Tensor, basis: Tensor, C: Tensor, s: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Newton's method with backtracking for one t, all batch items side by side."""
    work, lost = torch.ones_like(s, dtype=torch.bool), torch.zeros_like(s, dtype=torch.bool)
    for _ in range(_MAX_STEPS):
        rates, inverse_X, inverse_Y = _rates(signal, C, floor)
        slack, room = s[:, None] - rates, 1 - torch.diagonal(C, dim1=-2, dim2=-1).real.sum(-1)
        inverse_C = torch.cholesky_inverse(torch.linalg.cholesky(C))
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        slope = _coordinates(inverse_Y - inverse_X, basis)  # of the rates, (batch, Q, n^2)
        trace = _coordinates(eye, basis)
        gradient = torch.cat(
            [
                t - (1 / slack).sum(-1, keepdim=True),
                (slope / slack[..., None]).sum(1) - _coordinates(inverse_C, basis) + trace / room[:, None],
            ],
            dim=-1,
        )
        curvature = _quadratic(inverse_X, basis, 1 / slack) - _quadratic(inverse_Y, basis, 1 / slack)
        curvature = curvature + _quadratic(inverse_C[:, None], basis, torch.ones_like(s)[:, None])
        direction = torch.cat([torch.ones_like(slack)[..., None], -slope], dim=-1) / slack[..., None]
        hessian = direction.mT @ direction
        border = torch.nn.functional.pad(trace, (1, 0)) / room[:, None]
        hessian = hessian + border[:, :, None] * border[:, None, :]
        hessian[:, 1:, 1:] += curvature
        step = -torch.linalg.solve(hessian, gradient)
        decrement = -(gradient * step).sum(-1)
        if not bool(torch.isfinite(decrement[work]).all()):
            break
        work = work & (decrement > 1e-12 + _CENTRED * t)  # s is within decrement / 2t of the minimum for this t
        if not bool(work.any()):
            break
        move = torch.einsum("kij,bk->bij", basis, step[:, 1:].to(basis.dtype))
        value, length = _barrier(signal, floor, C, s, t), torch.ones_like(s)
        waiting = work.clone()
        for _ in range(60):
            candidate = C + length[:, None, None] * move, s + length * step[:, 0]
            good = _barrier(signal, floor, *candidate, t) <= value - 0.1 * length * decrement + 1e-15 * value.abs()
            waiting = waiting & ~good
            if not bool(waiting.any()):
                break
            length = torch.where(waiting, 0.5 * length, length)
        # nothing better to be found in floating point: as good as it gets, and good enough if it is close
        lost = lost | (waiting & (decrement > _TOLERATED * t))
        work = work & ~waiting
        length = torch.where(work, length, 0.0)
        C, s = C + length[:, None, None] * move, s + length * step[:, 0]
    failed = lost | (work & ~(decrement <= _TOLERATED * t))
    if bool(failed.any()):
        raise ConvergenceError(
            f"min_max_rate_covariance: Newton's method did not converge for {int(failed.sum())} of {len(work)} batch "
            "items; are users received 60 dB or more above both jammer and floor?"
        )
    return C, s


def _barrier(signal: Tensor, floor: Tensor, C: Tensor, s: Tensor, t: float) -> Tensor:
    """The function that is minimised; infinite outside."""
    rates = _rates(signal, C, floor)[0]
    L, failed = torch.linalg.cholesky_ex(C)
    logdet = 2 * torch.diagonal(L, dim1=-2, dim2=-1).real.log().sum(-1)
    slack, room = s[:, None] - rates, 1 - torch.diagonal(C, dim1=-2, dim2=-1).real.sum(-1)
    inside = (failed == 0) & (slack > 0).all(-1) & (room > 0)
    value = t * s - slack.clamp_min(math.ulp(0.0)).log().sum(-1) - logdet - room.clamp_min(math.ulp(0.0)).log()
    return torch.where(inside, value, torch.inf)


def _hermitian_basis(size: int) -> Tensor:
    """(n^2, n, n): an orthonormal basis of the Hermitian matrices over the reals."""
    basis = torch.zeros(size * size, size, size, dtype=torch.complex128)
    index = 0
    for i in range(size):
        basis[index, i, i] = 1
        index += 1
        for j in range(i):
            basis[index, i, j] = basis[index, j, i] = math.sqrt(0.5)
            basis.imag[index + 1, i, j], basis.imag[index + 1, j, i] = math.sqrt(0.5), -math.sqrt(0.5)
            index += 2
    return basis


def _coordinates(matrix: Tensor, basis: Tensor) -> Tensor:
    """tr(matrix E_k) for every basis matrix."""
    return torch.einsum("...ij,kji->...k", matrix, basis).real


def _quadratic(inverse: Tensor, basis: Tensor, weight: Tensor) -> Tensor:
    """Sum over q of weight_q tr(inverse_q E_k inverse_q E_l), (batch, n^2, n^2)."""
    turned = inverse[:, :, None] @ basis
    left = turned * weight[..., None, None, None]
    return torch.einsum("bqkij,bqlji->bkl", left, turned).real
