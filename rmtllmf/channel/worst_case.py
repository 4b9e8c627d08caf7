"""The jammer that does the most harm to the sum rate (P1 of R-MTLLMF), exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._arrays import Array, ArrayLike, Inputs, batch_shape, check_channel, powers
from .._display import counted, decibels, spread
from ..errors import InputError
from ._out import checked_out, fresh, is_direct
from ._single_draw import solve_single
from ._water_filling import Filling, Modes, fill, mode_powers, modes
from ._worst_case_gradient import Solution, WorstCaseFunction

__all__ = ["WorstCase", "worst_case", "worst_case_covariance", "worst_case_rate"]

# draws solved at once: memory is bounded, and on the CPU intermediate results stay in the cache; elsewhere every
# operation has to be worth its launch
_CHUNK, _CHUNK_ELSEWHERE = 2048, 16_384


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

    def __repr__(self) -> str:
        shape = tuple(self.covariance.shape[:-2])
        power = self.covariance.diagonal(0, -2, -1).real.sum(-1)
        found = [f"{counted(self.covariance.shape[-1], 'antenna')}, jammer {decibels(power, 'dBm')}"]
        found += [f"draws {shape}"] if shape else []
        found += [f"sum rate {spread(self.sum_rate, 'nats')}", counted(self.iterations, "iteration")]
        return f"WorstCase({', '.join(found)})"


def worst_case(
    H: Array, P: ArrayLike, P_N: ArrayLike, *, noise: ArrayLike = 0.0, out: Array | None = None
) -> WorstCase:
    r"""The noise covariance that minimises the sum rate, with the rate and the multiplier that belong to it.

    .. math:: \min_{C \succeq 0,\ \mathrm{tr}\, C \le P_N} \log\det\bigl(I + H P H^H (C + \sigma^2 I)^{-1}\bigr)

    With full power it is one half of a saddle point: no other powers :math:`0 \le p \le P` raise the rate at the
    optimal `C`, and no other covariance lowers it.

    Args:
        H: (..., N_R, Q) complex channel, path loss included. Any rank; more users than antennas are fine.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal. Zero for a silent user.
        P_N: (...) the jammer's total power in W, at least 0 (0 gives ``C = 0``): what the base station *receives* of it
            over all its antennas (:math:`\mathrm{tr}\, C`, behind its path loss), not what it transmits.
        noise: (...) thermal noise power per antenna in W, the floor :math:`\sigma^2`, at least 0.
        out: (..., N_R, N_R) memory to write the covariance into, of the shape, kind, precision and device that it
            would have, and apart from the inputs'; contiguous is the fastest. After an error it may hold anything.

    Returns:
        A `WorstCase`, whose covariance is `out` if that is given; the numbers are the same, bit by bit. If all users
        are silent every `C` is optimal, and the white one is returned.

    Raises:
        TypeError: `H` is real, another argument is not real numbers, or `out` is of another kind or precision.
        ShapeError: shapes do not fit.
        InputError: a negative power, or tensors inside a transformation of torch.func (``vmap``, ``grad``) or in
            forward-mode differentiation; `out` together with a gradient, in the inputs' memory, read-only, or on
            another device; NonFiniteError: NaN or infinity.
        ConvergenceError: the iteration failed, which takes powers more than 150 orders of magnitude apart.

    Note:
        Gradients with respect to all four arguments are exact, at repeated eigenvalues too. Where `C` is not
        differentiable they are one-sided (``P_N = 0``, a mode about to be jammed) or leave out an infinite part (a zero
        eigenvalue without a floor, all users silent). The sum rate has exact second derivatives too (``hessian``,
        ``create_graph=True``); those of the covariance and the level, and third ones, raise an InputError. Gradients
        of complex arguments follow torch's convention: ``(H.grad.conj() * dH).sum().real`` is the change of the loss
        when `H` changes by a small dH, and ``H - step * H.grad`` goes down.

        On a GPU the first large batch of every size measures whether its own eigensolver or the host's is the faster,
        and later ones use that: last bits may differ from process to process.

    Source: R-MTLLMF (P1), eq. 13 and 14, without the doubly counted power; Jorswieck and Boche, 2004.

    Example:
        >>> from rmtllmf.channel import UplinkScenario, worst_case
        >>> up = UplinkScenario().draw(seed=0)
        >>> found = worst_case(up.H, up.P, 124 * up.noise, noise=up.noise)
        >>> bool(abs(found.covariance.diagonal().sum().real / (124 * up.noise) - 1) < 1e-12)
        True
    """
    inputs = Inputs.of(H, "H", P, P_N, noise)
    _refuse_transforms(H, P, P_N, noise, out)
    given = {"H": H, "P": P, "P_N": P_N, "noise": noise}
    single = solve_single(H, P, P_N, noise)
    if single is not None:
        C = torch.from_numpy(single[0])
        rate, level = (inputs.back(torch.tensor(number, dtype=torch.float64)) for number in single[1:3])
        if out is not None:
            checked_out(out, inputs, tuple(C.shape), **given).copy_(C)
        return WorstCase(inputs.back(C) if out is None else out, rate, level, single[3])
    channel, power, jammer, floor = _checked(inputs, H, P, P_N, noise)
    batch = jammer.shape
    target = None
    if out is not None:
        target = checked_out(out, inputs, (*batch, channel.shape[-2], channel.shape[-2]), **given)
    if torch.is_grad_enabled() and any(part.requires_grad for part in (channel, power, jammer, floor)):
        channel = channel.expand(*batch, *channel.shape[-2:])
        power = power.expand(*batch, power.shape[-1])
        C, rate, level, steps = WorstCaseFunction.apply(channel, power, jammer, floor, _solve)
    elif _is_long(channel, power, jammer):
        C, rate, level, steps = _in_chunks(channel, power, jammer, floor, target)
    else:
        C, rate, level, _, filling = _solve(channel, power, jammer, floor)
        steps = filling.steps
        if target is not None:
            target.copy_(C)
    return WorstCase(inputs.back(C) if out is None else out, inputs.back(rate), inputs.back(level), steps)


def worst_case_covariance(
    H: Array, P: ArrayLike, P_N: ArrayLike, *, noise: ArrayLike = 0.0, out: Array | None = None
) -> Any:
    r"""The noise covariance of total power `P_N` that minimises the sum rate.

    .. math:: \arg\min_{C \succeq 0,\ \mathrm{tr}\, C \le P_N} \log\det\bigl(I + H P H^H (C + \sigma^2 I)^{-1}\bigr)

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        P_N: (...) the jammer's total power in W, at least 0: what the base station *receives* of it over all its
            antennas (:math:`\mathrm{tr}\, C`, behind its path loss), not what it transmits.
        noise: (...) thermal noise power per antenna in W, the floor :math:`\sigma^2`, at least 0.
        out: (..., N_R, N_R) memory to write the result into, as for `worst_case`.

    Returns:
        (..., N_R, N_R) complex: Hermitian positive semidefinite, with trace `P_N`; in the kind and precision of `H`.
        `out` itself if that is given.

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

        Memory that is used again, batch after batch:

        >>> C = np.empty((3, 3), dtype=complex)
        >>> worst_case_covariance(H, P=1.0, P_N=5.0, out=C) is C
        True
    """
    return worst_case(H, P, P_N, noise=noise, out=out).covariance


def worst_case_rate(H: Array, P: ArrayLike, P_N: ArrayLike, *, noise: ArrayLike = 0.0) -> Any:
    r"""The sum rate left under the worst-case noise, without the covariance: about half the work of `worst_case`.

    .. math:: \min_{C \succeq 0,\ \mathrm{tr}\, C \le P_N} \log\det\bigl(I + H P H^H (C + \sigma^2 I)^{-1}\bigr)

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        P_N: (...) the jammer's total power in W, at least 0: what the base station *receives* of it over all its
            antennas (:math:`\mathrm{tr}\, C`, behind its path loss), not what it transmits.
        noise: (...) thermal noise power per antenna in W, the floor :math:`\sigma^2`, at least 0.

    Returns:
        (...) nats per channel use. If a gradient is asked for it is computed by `worst_case`, which has first and
        second derivatives.

    Raises:
        TypeError, ShapeError, InputError, ConvergenceError: as `worst_case`.

    Source: R-MTLLMF (P1), eq. 13.

    Example:
        >>> import numpy as np
        >>> bool(np.isclose(worst_case_rate(np.eye(2) + 0j, P=1.0, P_N=2.0), 2 * np.log(2)))
        True
    """
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (H, P, P_N, noise)):
        return worst_case(H, P, P_N, noise=noise).sum_rate
    inputs = Inputs.of(H, "H", P, P_N, noise)
    _refuse_transforms(H, P, P_N, noise)
    channel, power, jammer, floor = _checked(inputs, H, P, P_N, noise)
    if not _is_long(channel, power, jammer):
        return inputs.back(_rate_alone(channel, power, jammer, floor))
    rate = torch.empty_like(jammer)
    for part in _chunks(jammer):
        rate[part] = _rate_alone(channel[part], power[part], jammer[part], floor[part])
    return inputs.back(rate)


def _checked(
    inputs: Inputs, H: Array, P: ArrayLike, P_N: ArrayLike, noise: ArrayLike
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H, P, and P_N and noise in the shape of the whole batch."""
    channel = inputs.complex(H, "H")
    check_channel(channel)
    power = powers(inputs.nonnegative(P, "P"), channel)
    jammer, floor = inputs.nonnegative(P_N, "P_N"), inputs.nonnegative(noise, "noise")
    batch = batch_shape(
        ("H", channel.shape[:-2]), ("P", power.shape[:-1]), ("P_N", jammer.shape), ("noise", floor.shape)
    )
    return channel, power, jammer.expand(batch), floor.expand(batch)


def _refuse_transforms(*values: object) -> None:
    """The solver's own backward is unknown to torch.func, and there is no forward mode: better told than dropped."""
    forward = forward_ad._current_level >= 0
    for value in values:
        if isinstance(value, Tensor) and (
            torch._C._functorch.is_functorch_wrapped_tensor(value)
            or (forward and forward_ad.unpack_dual(value).tangent is not None)
        ):
            raise InputError(
                "worst_case: torch.func and forward-mode derivatives are not supported; use torch.autograd.grad, or "
                "torch.autograd.functional.jacobian in reverse mode (vectorize=True works)"
            )


def _rate_alone(H: Tensor, P: Tensor, P_N: Tensor, noise: Tensor) -> Tensor:
    v, unit = mode_powers(H, P)
    unit, v = unit.expand(P_N.shape), v.expand(*P_N.shape, v.shape[-1])
    return _rate(v, fill(v, P_N / unit, noise / unit), noise / unit)


def _is_long(H: Tensor, P: Tensor, P_N: Tensor) -> bool:
    """A flat batch of many draws, each with its own channel: worth cutting up."""
    return P_N.ndim == 1 and len(P_N) > _chunk(P_N) and P.shape[:-1] == H.shape[:-2] == P_N.shape


def _chunk(P_N: Tensor) -> int:
    return _CHUNK if P_N.device.type == "cpu" else _CHUNK_ELSEWHERE


def _chunks(P_N: Tensor) -> Iterator[slice]:
    size = _chunk(P_N)
    return (slice(start, start + size) for start in range(0, len(P_N), size))


def _rate(v: Tensor, filling: Filling, floor: Tensor) -> Tensor:
    sigma = filling.c + floor[..., None]
    return torch.where(v > 0, torch.log1p(v / torch.where(v > 0, sigma, 1.0)), 0.0).sum(-1)


def _solve(H: Tensor, P: Tensor, P_N: Tensor, noise: Tensor, out: Tensor | None = None) -> Solution:
    """C, rate and level of one batch; `P_N` and `noise` have its full shape, `H` and `P` may lack leading ones."""
    found = modes(H, P)
    v = found.v.expand(*P_N.shape, found.v.shape[-1])
    U = found.U.expand(*P_N.shape, *found.U.shape[-2:])
    unit = found.unit.expand(P_N.shape)
    floor = noise / unit
    filling = fill(v, P_N / unit, floor)
    half = U * (filling.c * unit[..., None]).sqrt()[..., None, :]
    C = torch.matmul(half, half.mH, out=out)
    silent = v[..., -1] == 0
    if bool(silent.any()):
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        C[silent] = (P_N[silent] / C.shape[-1])[..., None, None] * eye
    rate = _rate(v, filling, floor)
    level = torch.where(silent, 0.0, filling.level / unit)
    return C, rate, level, Modes(v, U, unit), filling


def _in_chunks(
    H: Tensor, P: Tensor, P_N: Tensor, noise: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`_solve` for a long flat batch, into results made beforehand; `out` need not be complex128 or contiguous."""
    C = fresh(H, len(H), H.shape[1], H.shape[1]) if out is None else out
    direct = is_direct(C)
    rate, level, steps = torch.empty_like(P_N), torch.empty_like(P_N), 0
    for part in _chunks(P_N):
        solved = _solve(H[part], P[part], P_N[part], noise[part], out=C[part] if direct else None)
        if not direct:
            C[part] = solved[0]
        rate[part], level[part] = solved[1:3]
        steps = max(steps, solved[4].steps)
    return C, rate, level, steps
