"""What a receiver makes of the uplink: successive cancellation and the linear MMSE receiver, matched or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._arrays import Array, ArrayLike, Inputs, batch_shape, check_hermitian, resolution
from ..errors import InputError, ShapeError
from ._filters import Filters, Received, filters, warn_floorless
from .rate import received
from .reception import Reception

__all__ = ["lmmse", "sic"]

_CHUNK = 2048  # draws received at once, as many as `worst_case` solves at once
_OWN = (1, 2, 2, 1)  # dimensions that P, C, designed_for and order have for a single draw


def sic(
    H: Array, P: ArrayLike, C: Array, *, designed_for: Array | None = None, order: str | Array = "weakest_first"
) -> Reception:
    r"""MMSE receiver with error-free successive interference cancellation.

    User q is estimated by :math:`w_q = \bigl(\sum_{j \in S_q} b_j b_j^H + C_d\bigr)^{-1} b_q` with
    :math:`B = H P^{1/2}`, where :math:`S_q` are the users not decoded yet (q included), and then cancelled exactly.
    A matched receiver (:math:`C_d = C`) has :math:`\mu_q = 1/(1 + \mathrm{SINR}_q) = e^{-R_q}`, rates that add up to
    `sum_rate` in any order, and uncorrelated errors. A mismatched one has neither.

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        C: (..., N_R, N_R) covariance of the whole noise in W (jammer plus thermal), positive semidefinite. Directions
            without any noise are treated exactly: a user who is heard there alone has ``mse = 0`` and infinite rate.
            In single precision noise 60 dB below the largest is none; a `RmtllmfWarning` says where users gain by it.
        designed_for: (..., N_R, N_R) the covariance :math:`C_d` that the receiver believes in; None: it knows `C`.
            A receiver unaware of the jammer is designed for the thermal noise alone.
        order: "weakest_first" (the paper: ascending :math:`p_q \lVert h_q\rVert^2`), "strongest_first", or the users
            themselves, (..., Q) integers, first decoded first.

    Returns:
        A `Reception`.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. NotPSDError: `C` or `designed_for` is no covariance.
        InputError: a negative power, non-finite entries, an unknown `order` or one that is no permutation.

    Source: R-MTLLMF, eq. 3 and 5 for the matched case.

    Example:
        >>> from rmtllmf.channel import UplinkScenario, sic, worst_case_covariance
        >>> up = UplinkScenario().draw(seed=0)
        >>> C = worst_case_covariance(up.H, up.P, 124 * up.noise, noise=up.noise) + up.noise_covariance
        >>> aware = sic(up.H, up.P, C)
        >>> unaware = sic(up.H, up.P, C, designed_for=up.noise_covariance)
        >>> bool(aware.mse.mean() < unaware.mse.mean())
        True
    """
    if order is None:
        raise TypeError(
            "order: expected 'weakest_first', 'strongest_first' or the users in order, got None; the receiver that "
            "cancels nothing is lmmse"
        )
    return _received(H, P, C, designed_for, order)


def lmmse(H: Array, P: ArrayLike, C: Array, *, designed_for: Array | None = None) -> Reception:
    r"""Linear MMSE receiver: every user is estimated with all others present.

    .. math:: W = (B B^H + C_d)^{-1} B, \qquad B = H P^{1/2}; \qquad
              \text{matched:}\quad E = (I + B^H C^{-1} B)^{-1}

    Its errors are correlated across users even when matched: the error of a sum with weights `a` is
    :math:`a^H E a`, not :math:`\sum_q |a_q|^2 \mu_q`.

    Args:
        H: (..., N_R, Q) complex channel, path loss included.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal.
        C: (..., N_R, N_R) covariance of the whole noise in W, positive semidefinite; a singular one is treated exactly.
        designed_for: (..., N_R, N_R) the covariance that the receiver believes in; None: it knows `C`.

    Returns:
        A `Reception`, with ``order`` None.

    Raises:
        TypeError, ShapeError, NotPSDError, InputError: as `sic`.

    Source: S. Verdu, "Multiuser Detection", 1998, chapter 6.

    Example:
        >>> import numpy as np
        >>> H = np.array([[1.0, 1.0], [1.0, -1.0]]) + 0j
        >>> lmmse(H, P=1.0, C=2 * np.eye(2)).error_covariance.real
        array([[0.5, 0. ],
               [0. , 0.5]])
    """
    return _received(H, P, C, designed_for, None)


def designed_filters(inputs: Inputs, link: Received, designed_for: Array | None, order: Tensor | None) -> Filters:
    """Filters for the noise that the receiver believes in; `order` None: linear."""
    if designed_for is None:
        return filters(link, link.noise, "C", link.eps_noise, order)
    design, eps = inputs.complex(designed_for, "designed_for", real_too=True), resolution(designed_for)
    check_hermitian(design, link.B.shape[-2], "designed_for", eps)
    batch_shape(("H", link.B.shape[:-2]), ("C", link.noise.shape[:-2]), ("designed_for", design.shape[:-2]))
    found = filters(link, design, "designed_for", eps, order)
    return found._replace(floorless=False)  # what is wrongly believed shows: the errors are those under C


def decoding_order(inputs: Inputs, order: str | Array, strength: Tensor) -> Tensor:
    """(..., Q) users, first decoded first; `strength` (..., Q) is what they are received with."""
    users = strength.shape[-1]
    if isinstance(order, str):
        ascending = strength.sort(dim=-1, stable=True).indices
        if order == "weakest_first":
            return ascending
        if order == "strongest_first":
            return ascending.flip(-1)
        raise InputError(f"order: expected 'weakest_first', 'strongest_first' or the users in order, got {order!r}")
    sequence = inputs.real(order, "order")
    if sequence.ndim == 0 or sequence.shape[-1] != users:
        raise ShapeError(f"order: expected shape (..., {users}), got {tuple(sequence.shape)}")
    if not torch.equal(sequence.sort(-1).values, torch.arange(users).to(sequence).expand_as(sequence)):
        raise InputError(f"order: expected each of 0..{users - 1} once, first decoded first")
    batch_shape(("H and P", strength.shape[:-1]), ("order", sequence.shape[:-1]))
    return sequence.to(torch.int64)


def _received(H: Array, P: ArrayLike, C: Array, designed_for: Array | None, order: str | Array | None) -> Reception:
    """`_receive`, and a warning if a floor may have been lost."""
    reception, floorless = _in_parts(H, P, C, designed_for, order)
    if floorless:
        warn_floorless()
    return reception


def _in_parts(
    H: Array, P: ArrayLike, C: Array, designed_for: Array | None, order: str | Array | None
) -> tuple[Reception, bool]:
    """A long batch in parts, whose intermediate results stay in the cache and do not add up."""
    rest: tuple[Any, ...] = (P, C, designed_for, order)
    if not _is_long(H, rest):
        return _receive(H, P, C, designed_for, order)
    whole: dict[str, Any] = {}
    floorless = False
    for start in range(0, len(H), _CHUNK):
        part = slice(start, start + _CHUNK)
        own = (x[part] if _has_draws(x, dims) and len(x) > 1 else x for x, dims in zip(rest, _OWN, strict=True))
        try:
            reception, lost = _receive(H[part], *own)
        except (InputError, TypeError):
            return _receive(H, P, C, designed_for, order)  # what it says is to be about the whole batch
        found, floorless = vars(reception), floorless or lost
        if not whole:
            whole = {name: _empty(value, len(H)) for name, value in found.items()}
        for name, value in found.items():
            if value is not None:
                whole[name][part] = value
    return Reception(**whole), floorless


def _empty(part: Array | None, draws: int) -> Array | None:
    """Memory for what `part` is the beginning of."""
    if part is None:
        return None
    shape = (draws, *part.shape[1:])
    return part.new_empty(shape) if isinstance(part, Tensor) else np.empty(shape, part.dtype)


def _is_long(H: Array, rest: tuple[Any, ...]) -> bool:
    """A flat batch of many draws, each with its own channel, and no derivatives: worth cutting up."""
    if not isinstance(H, Tensor | np.ndarray) or H.ndim != 3 or len(H) <= _CHUNK or forward_ad._current_level >= 0:
        return False
    for value in (H, *rest):
        if isinstance(value, Tensor) and (
            torch._C._functorch.is_functorch_wrapped_tensor(value) or (value.requires_grad and torch.is_grad_enabled())
        ):
            return False
        if isinstance(value, list | tuple) and not all(isinstance(entry, int | float) for entry in value):
            return False
    return all(len(x) in (1, len(H)) for x, dims in zip(rest, _OWN, strict=True) if _has_draws(x, dims))


def _has_draws(value: object, dims: int) -> bool:
    """Whether an argument has a leading dimension of draws, on top of its own."""
    return isinstance(value, Tensor | np.ndarray) and value.ndim > dims


def _receive(
    H: Array, P: ArrayLike, C: Array, designed_for: Array | None, order: str | Array | None
) -> tuple[Reception, bool]:
    """A linear receiver if `order` is None; and whether a floor may have been lost."""
    inputs = Inputs.of(H, "H", P, C, designed_for, order)
    link = received(inputs, H, P, C)
    sequence = None if order is None else decoding_order(inputs, order, link.strength)
    F, W, floorless = designed_filters(inputs, link, designed_for, sequence)
    return _reception(inputs, link, F, W, matched=designed_for is None, order=sequence), floorless


def _reception(
    inputs: Inputs, link: Received, F: Tensor, W: Tensor, *, matched: bool, order: Tensor | None
) -> Reception:
    """From the filters `W` and what they leave, `F`: ``G = I - F^H`` on the users present."""
    left = torch.diagonal(F, dim1=-2, dim2=-1).real
    # the gain two ways: each without cancellation where the other one has it
    gain = torch.where(left > 0.5, (link.B.conj() * W).sum(-2).real, 1 - left)
    if matched:
        mse = left
        E = F if order is None else torch.diag_embed(mse).to(F.dtype)
        shrink = torch.diag_embed(mse).to(F.dtype)
        N = E - F.mH @ shrink - shrink @ F + shrink.square()
        N = N + torch.diag_embed(mse * gain - torch.diagonal(N, dim1=-2, dim2=-1))
        sinr = torch.where(mse > 0, gain / torch.where(mse > 0, mse, 1.0), torch.inf)
    else:
        heard = W.mH @ link.noise @ W
        E = F.mH @ F + heard
        interference = F - torch.diag_embed(left).to(F.dtype)
        N = interference.mH @ interference + heard
        mse = torch.diagonal(E, dim1=-2, dim2=-1).real
        power = torch.diagonal(N, dim1=-2, dim2=-1).real
        sinr = torch.where(power > 0, gain.square() / torch.where(power > 0, power, 1.0), torch.inf)
        sinr = torch.where(gain == 0, 0.0, sinr)
    E, N = 0.5 * (E + E.mH), 0.5 * (N + N.mH)
    back = inputs.back
    return Reception(
        mse=back(mse),
        sinr=back(sinr),
        rate=back(torch.log1p(sinr)),
        gain=back(gain),
        order=None if order is None else back(order.expand_as(mse)),
        error_covariance=back(E),
        noise_covariance=back(N),
    )
