r"""The jammer that does the most harm to the sum rate (P1 of R-MTLLMF), exactly.

The optimum shares the eigenvectors of the received signal's covariance :math:`A = H P H^H`, and pours its power over
the eigenvalues :math:`v_i` like water. In the variable :math:`t = 1/\nu - \sigma^2 - \sigma^4/v_{max}`, where
:math:`\nu` is the Lagrange multiplier of the power constraint, the power on mode i is

.. math:: c_i(t) = \frac{2 d_i}{2\sigma^2 + v_i + \sqrt{(2\sigma^2 + v_i)^2 + 4 d_i}}, \qquad
          d_i = v_i \max\Bigl(0, t - \sigma^4\,\frac{v_{max} - v_i}{v_i v_{max}}\Bigr)

which involves no difference of nearly equal numbers, however far the floor lies above the jammer. As a function of
:math:`\nu` the sum of the :math:`c_i` is convex and decreasing, so Newton's method in :math:`\nu`, started at or left
of the solution, approaches it monotonically; it is carried out on `t`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs, batch_shape, check_channel, powers
from ..errors import ConvergenceError

__all__ = ["WorstCase", "worst_case", "worst_case_covariance"]

_EPS = torch.finfo(torch.float64).eps
_ILL_CONDITIONED = 1e-8  # below this ratio of eigenvalues the Gram matrix has lost half the digits: use the SVD
_MAX_STEPS = 100


@dataclass(frozen=True)
class WorstCase:
    r"""The worst-case noise and what it does.

    Attributes:
        covariance: (..., N_R, N_R), the optimal `C`, with trace `P_N`.
        sum_rate: (...) nats per channel use, :math:`\log\det(I + A (C + \sigma^2 I)^{-1})` at the optimum.
        level: (...) the Lagrange multiplier :math:`\nu` in 1/W; :math:`-\nu` is the derivative of the optimal rate
            with respect to `P_N`.
        iterations: Newton steps that the slowest batch item took.

    Example:
        >>> import numpy as np
        >>> found = worst_case(np.eye(2) + 0j, P=1.0, P_N=2.0)
        >>> bool(np.isclose(found.sum_rate, 2 * np.log(2)))
        True
    """

    covariance: Any
    sum_rate: Any
    level: Any
    iterations: int


def worst_case(H: Array, P: ArrayLike, P_N: ArrayLike, *, noise: ArrayLike = 0.0) -> WorstCase:
    r"""The noise covariance that minimises the sum rate, with the rate and the multiplier that belong to it.

    .. math:: \min_{C \succeq 0,\ \mathrm{tr}\, C \le P_N} \log\det\bigl(I + H P H^H (C + \sigma^2 I)^{-1}\bigr)

    With full power it is one half of a saddle point: no other powers :math:`0 \le p \le P` raise the rate at the
    optimal `C`, and no other covariance lowers it.

    Args:
        H: (..., N_R, Q) complex channel, path loss included. Any rank; more users than antennas are fine.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal. Zero for a silent user.
        P_N: (...) the jammer's total power in W, at least 0 (0 gives ``C = 0``).
        noise: (...) thermal noise power per antenna in W, the floor :math:`\sigma^2`, at least 0.

    Returns:
        A `WorstCase`. If all users are silent every `C` is optimal, and the white one is returned.

    Raises:
        TypeError: `H` is real, another argument is not real numbers, or gradients are asked for (see Note).
        ShapeError: shapes do not fit.
        InputError: a negative power; NonFiniteError: NaN or infinity.
        ConvergenceError: the iteration failed, which takes powers more than 150 orders of magnitude apart.

    Note:
        The result carries no gradient. To differentiate the *rate* use the envelope theorem,
        :math:`dR^*/dA = (C^* + \sigma^2 I + A)^{-1}` and :math:`dR^*/dP_N = -\nu`; detach the inputs first.

    Source: R-MTLLMF (P1), eq. 13 and 14, without the doubly counted power; Jorswieck and Boche, 2004.

    Example:
        >>> from rmtllmf.channel import UplinkScenario, worst_case
        >>> up = UplinkScenario().draw(seed=0)
        >>> found = worst_case(up.H, up.P, 124 * up.noise, noise=up.noise)
        >>> bool(abs(found.covariance.diagonal().sum().real / (124 * up.noise) - 1) < 1e-12)
        True
    """
    inputs = Inputs.of(H, "H", P, P_N, noise)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (H, P, P_N, noise)):
        raise TypeError(
            "worst_case: gradients through the worst-case covariance are not available; detach H, P, P_N and noise, "
            "or use the envelope theorem for the rate (see the documentation)"
        )
    channel = inputs.complex(H, "H")
    check_channel(channel)
    power = powers(inputs.nonnegative(P, "P"), channel)
    jammer, floor = inputs.nonnegative(P_N, "P_N"), inputs.nonnegative(noise, "noise")
    batch = batch_shape(
        ("H", channel.shape[:-2]), ("P", power.shape[:-1]), ("P_N", jammer.shape), ("noise", floor.shape)
    )
    v, U, total = _modes(channel, power)
    total = total.expand(batch)
    unit = torch.where(total > 0, total, 1.0)  # powers are around 1e-17 W: solve in units of the received power
    v = v.expand(*batch, v.shape[-1])
    c, level, steps = _water_filling(v, jammer / unit, floor / unit)
    white = (jammer / channel.shape[-2]).expand(batch)
    silent = total == 0
    c = c * unit[..., None]
    weighted = U * c[..., None, :]
    C = weighted @ U.mH
    C = 0.5 * (C + C.mH)
    if bool(silent.any()):
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        C = torch.where(silent[..., None, None], white[..., None, None] * eye, C)
        level = torch.where(silent, 0.0, level)
    below = c + floor.expand(batch)[..., None]
    active = v > 0
    rate = torch.where(active, torch.log1p(v * unit[..., None] / torch.where(active, below, 1.0)), 0.0).sum(-1)
    return WorstCase(inputs.back(C), inputs.back(rate), inputs.back(level / unit), steps)


def worst_case_covariance(H: Array, P: ArrayLike, P_N: ArrayLike, *, noise: ArrayLike = 0.0) -> Any:
    r"""The noise covariance of total power `P_N` that minimises the sum rate.

    .. math:: \arg\min_{C \succeq 0,\ \mathrm{tr}\, C \le P_N} \log\det\bigl(I + H P H^H (C + \sigma^2 I)^{-1}\bigr)

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        P_N: (...) the jammer's total power in W, at least 0.
        noise: (...) thermal noise power per antenna in W, the floor :math:`\sigma^2`, at least 0.

    Returns:
        (..., N_R, N_R) complex: Hermitian positive semidefinite, with trace `P_N`; in the kind and precision of `H`.

    Raises:
        TypeError, ShapeError, InputError, ConvergenceError: as `worst_case`, which also returns the rate.

    Source: R-MTLLMF (P1), eq. 13 and 14, without the doubly counted power.

    Example:
        Two orthogonal users of unit gain: the worst noise is white on the signal space, and leaves the rest alone.

        >>> import numpy as np
        >>> H = np.eye(3, 2) + 0j
        >>> worst_case_covariance(H, P=1.0, P_N=2.0).real.round(6)
        array([[1., 0., 0.],
               [0., 1., 0.],
               [0., 0., 0.]])
    """
    return worst_case(H, P, P_N, noise=noise).covariance


def _modes(H: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of ``H P H^H`` in units of its trace (0 where they are rounding), eigenvectors, and the trace in W.

    Goes through the smaller of the two Gram matrices: no zero eigenvalues appear when Q < N_R, and it is cheaper.
    """
    amplitude = H.abs().amax(dim=(-2, -1), keepdim=True)
    strongest = P.amax(-1)[..., None, None]
    amplitude = torch.where(amplitude > 0, amplitude, 1.0)
    strongest = torch.where(strongest > 0, strongest, 1.0)
    B = (H / amplitude) * (P[..., None, :] / strongest).sqrt()  # entries of at most 1: nothing over- or underflows
    trace = B.abs().square().sum(dim=(-2, -1))
    total = trace * amplitude[..., 0, 0].square() * strongest[..., 0, 0]
    B = B / torch.where(trace > 0, trace, 1.0).sqrt()[..., None, None]
    wide = B.shape[-1] >= B.shape[-2]
    v, V = torch.linalg.eigh(B @ B.mH if wide else B.mH @ B)
    v = v.clamp_min(0.0)
    U = V if wide else (B @ V) / torch.where(v > 0, v, 1.0).sqrt()[..., None, :]
    poor = v[..., 0] < _ILL_CONDITIONED * v[..., -1]
    if bool(poor.any()):
        left, s, _ = torch.linalg.svd(B[poor], full_matrices=False)
        s = torch.where(s > max(B.shape[-2:]) * _EPS * s[..., :1], s, 0.0)
        v[poor], U[poor] = s.square(), left
    return v, U, total


def _water_filling(v: Tensor, P_N: Tensor, s2: Tensor) -> tuple[Tensor, Tensor, int]:
    """The jammer's power on each mode, the multiplier, and the Newton steps; all in units of the signal's power."""
    P_N, s2 = P_N.expand(v.shape[:-1]), s2.expand(v.shape[:-1])
    present = v > 0
    safe = torch.where(present, v, 1.0)
    top = v.amax(-1)
    top = torch.where(top > 0, top, 1.0)
    # mode i is jammed from t = start_i on; the strongest from 0 on
    start = torch.where(present, s2.square()[..., None] * (top[..., None] - v) / (safe * top[..., None]), torch.inf)
    base = 2 * s2[..., None] + safe
    shift = s2 + s2.square() / top  # 1/nu = t + shift

    # two upper ends of the bracket: the strongest mode alone takes all, or all modes are equally strong
    raised = P_N + present.sum(-1) * s2
    sum_v = v.sum(-1)
    equal = raised * (raised + sum_v) / torch.where(sum_v > 0, sum_v, 1.0)
    t = torch.minimum(P_N * (P_N + 2 * s2 + top) / top, equal - shift + 8 * _EPS * (equal + shift))

    steps = 0
    work = (P_N > 0) & present.any(-1)
    while bool(work.any()):
        if steps == _MAX_STEPS:
            raise ConvergenceError(
                f"worst_case: no convergence for {int(work.sum())} of {work.numel()} batch items in {steps} Newton "
                "steps; are the powers H, P, P_N and noise more than 150 orders of magnitude apart?"
            )
        steps += 1
        gap = t[..., None] - start
        d = v * gap.clamp_min(0.0)
        root = (base.square() + 4 * d).sqrt()
        c = 2 * d / (base + root)
        excess = c.sum(-1) - P_N
        slope = torch.where(gap >= 0, v / root, 0.0).sum(-1)
        step = excess / slope
        # Newton's step in nu, written in t
        step = step / (1 + step / (t + shift))
        t = torch.where(work, (t - step).clamp_min(0.0), t)
        work = work & ~((step.abs() <= 4 * _EPS * t) | (excess.abs() <= 4 * _EPS * P_N))
    d = v * (t[..., None] - start).clamp_min(0.0)
    c = 2 * d / (base + (base.square() + 4 * d).sqrt())
    c = torch.where(present & (P_N > 0)[..., None], c, 0.0)
    t = torch.where(P_N > 0, t, 0.0)
    return c, 1 / (t + shift), steps
