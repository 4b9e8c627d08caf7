r"""Second derivatives of the worst-case rate; those of the covariance and of the level are refused.

By the envelope theorem the first derivatives are explicit functions of the optimum, with
:math:`B = H P^{1/2}`, :math:`Z = C + \sigma^2 I` and :math:`T = (Z + B B^H)^{-1}`,

.. math:: \frac{\partial R}{\partial A} = T, \qquad \frac{\partial R}{\partial P_N} = -\nu, \qquad
          \frac{\partial R}{\partial \sigma^2} = -\mathrm{tr}(Z^{-1} B B^H T),

and `C` and :math:`\nu` have first derivatives of their own. The rate does not change when the antennas are rotated, so
with more antennas than users all of it happens in the users' space, where `C` is regular without a floor too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

_NONE = (
    "worst_case: the sum rate has first and second derivatives, the covariance and the level have first ones only; "
    "leave out create_graph=True, or differentiate the rate alone"
)
_NOT_HERE = (
    "worst_case: the sum rate has no second derivatives where C has no first ones: all users silent, or a direction "
    "of H P H^H, or the jammer, is zero without thermal noise; noise > 0 helps against the latter"
)


def differentiable_again(
    inputs: Sequence[Tensor],
    v: Tensor,
    found: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    apply: Callable[..., Any],
) -> list[Tensor | None]:
    """The first derivatives `found`, with a graph behind them: for the rate to go on, else to say that there is none.

    `inputs` are H, P, P_N and noise, `v` (..., n) the eigenvalues of ``H P H^H``, `gradients` those of C, rate, level,
    and `apply` gives C, rate, level for other inputs.
    """
    grad_C, grad_rate, grad_level, _ = gradients
    _, _, P_N, noise = inputs
    reduced = bool((v > 0).all())
    regular = bool(((P_N + noise > 0) if reduced else (noise > 0) & (v > 0).any(-1)).all())
    if grad_rate is None or grad_C is not None or grad_level is not None or not regular:
        alone = grad_rate is not None and grad_C is None and grad_level is None
        sources = [*inputs, *(grad for grad in gradients if grad is not None)]
        reason = _NOT_HERE if alone else _NONE
        return [None if value is None else _Refused.apply(value, reason, *sources) for value in found]
    graphs = _of_rate(inputs, grad_rate, apply, reduced=reduced)
    return [
        None if value is None else _WithValue.apply(value, graph) for value, graph in zip(found, graphs, strict=True)
    ]


def _of_rate(
    inputs: Sequence[Tensor], grad_rate: Tensor, apply: Callable[..., Any], *, reduced: bool
) -> tuple[Tensor, ...]:
    """The rate's gradients by operations that autograd follows."""
    H, P, P_N, noise = inputs
    rotation, R = torch.linalg.qr(H) if reduced and H.shape[-2] > H.shape[-1] else (None, H)
    C, _, level, _ = apply(R, P, P_N, noise)
    Z = C + noise[..., None, None] * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    TR = torch.linalg.solve(Z + (R * P[..., None, :]) @ R.mH, R)
    power = (R.conj() * TR).real.sum(-2)
    lost = ((torch.linalg.solve(Z, R) * P[..., None, :]) * TR.conj()).real.sum((-2, -1))
    TH = TR if rotation is None else rotation @ TR
    return (
        2 * grad_rate[..., None, None] * TH * P[..., None, :],
        grad_rate[..., None] * power,
        -grad_rate * level,
        -grad_rate * lost,
    )


class _WithValue(torch.autograd.Function):
    """(value, graph) -> value, differentiated as `graph`: the same number by a way with fewer digits."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, graph: Tensor) -> Tensor:
        """A copy of the value."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Any]:
        """Handed on."""
        return None, gradients[0]


class _Refused(torch.autograd.Function):
    """(value, reason, *sources) -> value, which depends on the sources, but says `reason` when asked how."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, reason: str, *sources: Tensor) -> Tensor:
        """A copy of the value."""
        ctx.reason = reason
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, ...]:
        """Raises."""
        raise InputError(ctx.reason)
