r"""Derivatives of the worst case, right at repeated eigenvalues, where those of an eigendecomposition are not.

The optimal `C` is a function :math:`f(A)` of the matrix :math:`A = H P H^H`, so in A's eigenbasis
:math:`dC_{ij} = f[v_i, v_j]\, dA_{ij} + [i = j]\,(f_\nu\, d\nu + f_{\sigma^2}\, d\sigma^2)`. With
:math:`\sigma_i = c_i + \sigma^2` the divided differences are free of cancellation,

.. math:: f[v_i, v_j] = \frac{\sigma_j^2 / v_j}{\sigma_i + \sigma_j + v_i} \text{ between jammed modes},\quad
          \frac{c_i}{v_i - v_j} \text{ between a jammed and an unjammed one},\quad 0 \text{ between unjammed ones},

and :math:`d\nu` follows from the power constraint. The rate's derivatives are those of the envelope theorem:
functions of `C` and :math:`\nu` that can be differentiated once more, in `_worst_case_curvature`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._water_filling import Filling, Modes
from ._worst_case_curvature import differentiable_again

Solution = tuple[Tensor, Tensor, Tensor, Modes, Filling]


class WorstCaseFunction(torch.autograd.Function):
    """(H, P, P_N, noise) -> (C, rate, level, steps), with `solve` doing the work; all of one batch shape."""

    @staticmethod
    def forward(
        ctx: Any, H: Tensor, P: Tensor, P_N: Tensor, noise: Tensor, solve: Callable[..., Solution]
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Solve, and keep what the derivatives need."""
        C, rate, level, modes, filling = solve(H, P, P_N, noise)
        ctx.save_for_backward(H, P, P_N, noise, *modes, *filling[:3])
        ctx.set_materialize_grads(False)  # to know of what there is a gradient
        ctx.solve = solve
        return C, rate, level, filling.steps

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Of a real loss, from the gradients of C, rate and level."""
        with torch.no_grad():
            found = WorstCaseFunction._first(ctx, *gradients)
        if torch.is_grad_enabled():  # create_graph=True
            inputs, v = ctx.saved_tensors[:4], ctx.saved_tensors[4]
            again = differentiable_again(
                inputs, v, found, gradients, lambda *new: WorstCaseFunction.apply(*new, ctx.solve)
            )
            return *again, None
        return *found, None

    @staticmethod
    def _first(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """The gradients of H, P, P_N and noise as numbers."""
        H, P, _, noise, v, U, unit, c, level, active = ctx.saved_tensors
        grad_C, grad_rate, grad_level, _ = gradients
        grad_C = H.new_zeros(*v.shape[:-1], U.shape[-2], U.shape[-2]) if grad_C is None else grad_C
        grad_rate, grad_level = (torch.zeros_like(unit) if grad is None else grad for grad in (grad_rate, grad_level))
        s2 = (noise / unit)[..., None]
        sigma, safe = c + s2, torch.where(v > 0, v, 1.0)
        silent = (v == 0).all(-1)
        S = 0.5 * (grad_C + grad_C.mH)

        # dc_i/dnu up to a common factor; relative to the largest sigma, so that P_N = 0 without a floor is a limit
        peak = sigma.amax(-1, keepdim=True)
        ratio = torch.where(peak > 0, sigma / torch.where(peak > 0, peak, 1.0), 1.0)
        weight = torch.where(active, ratio.square() * (sigma + v).square() / (safe * (2 * sigma + v)), 0.0)
        total = weight.sum(-1)
        total = torch.where(silent, 1.0, total)
        inner = U.mH @ S @ U
        diagonal = torch.diagonal(inner, dim1=-2, dim2=-1).real
        mean = (diagonal * weight).sum(-1) / total
        # the level's own gradient enters through the same equation for dnu
        mean = mean - grad_level / (unit.square() * torch.where(peak > 0, peak, 1.0)[..., 0].square() * total)

        own = torch.where(active, sigma.square() / (safe * (2 * sigma + v)), 0.0)  # dc_i/dv_i at fixed nu
        spectral = inner * _divided_differences(v, c, sigma, active) - torch.diag_embed(mean[..., None] * own)
        R = _inverse_of_all_power(U, sigma + v, s2) * (grad_rate / unit)[..., None, None]
        # between signal and noise space C's eigenvectors turn: f[v_i, 0] = c_i/v_i
        turned = (S @ U - U @ inner) * (c / safe)[..., None, :] @ U.mH
        M = U @ spectral @ U.mH + turned + turned.mH + R
        M = torch.where(silent[..., None, None], 0.0, M)

        grad_H = 2 * (M @ H) * P[..., None, :] if ctx.needs_input_grad[0] else None
        grad_P = (H.conj() * (M @ H)).real.sum(-2) if ctx.needs_input_grad[1] else None
        white = torch.diagonal(S, dim1=-2, dim2=-1).real.mean(-1)
        grad_P_N = torch.where(silent, white, mean - grad_rate * level / unit)
        floor = torch.where(active, mean[..., None] - diagonal, 0.0).sum(-1)
        lost = torch.where(v > 0, safe / torch.where(sigma > 0, sigma * (sigma + v), 1.0), 0.0).sum(-1)
        return grad_H, grad_P, grad_P_N, floor - grad_rate * lost / unit


def _inverse_of_all_power(U: Tensor, mode_power: Tensor, s2: Tensor) -> Tensor:
    """``(C + s2 I + A)^-1``; outside the modes only thermal noise is left (nothing is asked there if there is none)."""
    inverse = torch.where(mode_power > 0, 1 / torch.where(mode_power > 0, mode_power, 1.0), 0.0)
    outside = torch.where(s2 > 0, 1 / torch.where(s2 > 0, s2, 1.0), 0.0)
    eye = torch.eye(U.shape[-2], dtype=U.dtype, device=U.device)
    return outside[..., None] * eye + (U * (inverse - outside)[..., None, :]) @ U.mH


def _divided_differences(v: Tensor, c: Tensor, sigma: Tensor, active: Tensor) -> Tensor:
    """(..., n, n) real symmetric."""
    vi, vj = v[..., :, None], v[..., None, :]
    si, sj = sigma[..., :, None], sigma[..., None, :]
    ai, aj = active[..., :, None], active[..., None, :]
    both = torch.where(vj > 0, sj.square() / torch.where(vj > 0, vj, 1.0), 0.0) / torch.where(
        ai & aj, si + sj + vi, 1.0
    )
    gap = vi - vj
    mixed = (c[..., :, None] - c[..., None, :]) / torch.where(gap == 0, 1.0, gap)
    return torch.where(ai & aj, both, torch.where(ai ^ aj, mixed, 0.0))
