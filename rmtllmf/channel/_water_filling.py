r"""How the worst-case jammer spreads its power over the modes of the received signal.

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

from typing import NamedTuple

import torch
from torch import Tensor

from .._arrays import largest
from ..errors import ConvergenceError
from ._eigen import eigh, eigvalsh

EPS = torch.finfo(torch.float64).eps
ILL_CONDITIONED = 1e-5  # below this ratio of eigenvalues the Gram matrix has lost too many digits: use the SVD
MAX_STEPS = 100


class Modes(NamedTuple):
    """``H P H^H`` as ``unit * U diag(v) U^H``."""

    v: Tensor  # (..., n) ascending, adding up to 1; exactly 0 where they are rounding
    U: Tensor  # (..., N_R, n)
    unit: Tensor  # (...) the trace in W: powers are around 1e-17 W, so everything is solved in units of it


class Filling(NamedTuple):
    """The solution in units of the signal's power."""

    c: Tensor  # (..., n) the jammer's power on each mode
    level: Tensor  # (...) the multiplier nu
    active: Tensor  # (..., n) modes that get more when the jammer gets more
    steps: int


def modes(H: Tensor, P: Tensor) -> Modes:
    """Eigenvalues and eigenvectors of ``H P H^H``, through the smaller of the two Gram matrices.

    No zero eigenvalues appear there when Q < N_R, and it is cheaper. If all users are silent, `v` is zero, `unit` one.
    """
    B, gram, share, unit = _normalised(H, P)
    v, V = eigh(gram * share[..., None, None])
    v = v.clamp_min(0.0)
    wide = B.shape[-1] >= B.shape[-2]
    U = V if wide else B @ (V * (share[..., None] / torch.where(v > 0, v, 1.0)).sqrt()[..., None, :])
    poor = v[..., 0] < ILL_CONDITIONED * v[..., -1]
    if bool(poor.any()):
        left, s, _ = torch.linalg.svd(B[poor], full_matrices=False)
        v[poor], U[poor] = _powers_of(s, B, share[poor]), left.flip(-1)
    return Modes(v, U, unit)


def mode_powers(H: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues and the unit alone: half the work."""
    B, gram, share, unit = _normalised(H, P)
    v = eigvalsh(gram * share[..., None, None]).clamp_min(0.0)
    poor = v[..., 0] < ILL_CONDITIONED * v[..., -1]
    if bool(poor.any()):
        v[poor] = _powers_of(torch.linalg.svdvals(B[poor]), B, share[poor])
    return v, unit


def _powers_of(s: Tensor, B: Tensor, share: Tensor) -> Tensor:
    """Eigenvalues, ascending, from singular values of `B`, descending; 0 where these are rounding."""
    s = torch.where(s > max(B.shape[-2:]) * EPS * s[..., :1], s, 0.0)
    return (s.square() * share[..., None]).flip(-1)


def _normalised(H: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale first, so that nothing under- or overflows.

    ``H P^1/2`` with entries of at most 1; its smaller Gram matrix; the factor that gives that trace 1; the trace in W.
    """
    amplitude, strongest = largest(H, dims=2), P.amax(-1)
    amplitude = torch.where(amplitude > 0, amplitude, 1.0)
    strongest = torch.where(strongest > 0, strongest, 1.0)
    B = H * ((P / strongest[..., None]).sqrt() / amplitude[..., None])[..., None, :]
    gram = B @ B.mH if B.shape[-1] >= B.shape[-2] else B.mH @ B
    trace = torch.diagonal(gram, dim1=-2, dim2=-1).real.sum(-1)
    unit = torch.where(trace > 0, trace * amplitude.square() * strongest, 1.0)
    if not bool((torch.isfinite(unit) & (unit > 0)).all()):
        raise ConvergenceError("worst_case: the received power H P H^H over- or underflows double precision")
    # to be multiplied with: complex division is slow
    return B, gram, torch.where(trace > 0, 1 / torch.where(trace > 0, trace, 1.0), 1.0), unit


def fill(v: Tensor, P_N: Tensor, s2: Tensor) -> Filling:
    """Pour `P_N` over the modes `v` with floor `s2`; all in units of the signal's power and of the same batch."""
    present = v > 0
    safe = torch.where(present, v, 1.0)
    top = v.amax(-1)
    top = torch.where(top > 0, top, 1.0)
    # mode i is jammed from t = start_i on; the strongest from 0 on
    start = torch.where(present, s2.square()[..., None] * (top[..., None] - v) / (safe * top[..., None]), torch.inf)
    base = 2 * s2[..., None] + safe
    base_squared = base.square()
    shift = s2 + s2.square() / top  # 1/nu = t + shift

    # two upper ends of the bracket: the strongest mode alone takes all, or all modes are equally strong
    raised = P_N + present.sum(-1) * s2
    total = v.sum(-1)
    equal = raised * (raised + total) / torch.where(total > 0, total, 1.0)
    t = torch.minimum(P_N * (P_N + 2 * s2 + top) / top, equal - shift + 8 * EPS * (equal + shift))

    steps = 0
    jamming = P_N > 0
    work = jamming & present.any(-1)
    while bool(work.any()):
        if steps == MAX_STEPS:
            raise ConvergenceError(
                f"worst_case: no convergence for {int(work.sum())} of {work.numel()} batch items in {steps} Newton "
                "steps; are the powers H, P, P_N and noise more than 150 orders of magnitude apart?"
            )
        steps += 1
        gap = t[..., None] - start
        d = v * gap.clamp_min(0.0)
        root = (base_squared + 4 * d).sqrt()
        excess = (2 * d / (base + root)).sum(-1) - P_N
        step = excess / torch.where(gap >= 0, v / root, 0.0).sum(-1)
        step = step / (1 + step / (t + shift))  # Newton's step in nu, written in t
        t = torch.where(work, (t - step).clamp_min(0.0), t)
        work = work & ~((step.abs() <= 4 * EPS * t) | (excess.abs() <= 4 * EPS * P_N))
    t = torch.where(jamming, t, 0.0)
    gap = t[..., None] - start
    d = v * gap.clamp_min(0.0)
    c = 2 * d / (base + (base_squared + 4 * d).sqrt())
    return Filling(c, 1 / (t + shift), (gap >= 0) & present, steps)
