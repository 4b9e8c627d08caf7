r"""The linear filters behind every receiver, for regular and singular noise covariances.

User q's filter is :math:`w_q = (\sum_{j \in S_q} b_j b_j^H + C)^{-1} b_q`, where :math:`S_q` are the users present when
it is decoded. With :math:`K = I + B_S^H C^{-1} B_S` the filter leaves :math:`w_q^H b_j = [j = q] - F_{jq}^*` of
user j, where :math:`F_{\cdot q} = K^{-1} e_q` on the users present and 0 elsewhere. Everything that a receiver reports
follows from `F` and `W`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._arrays import SINGLE, check_psd
from ..errors import warn

_RANK = 1e-8  # a singular value of unit columns below this is zero
_VISIBLE = {True: 1e-8, False: 1e-5}  # share of a channel in the noise-free space that counts (double, single)


@dataclass(frozen=True)
class Received:
    """Checked input of a receiver, in double precision."""

    B: Tensor  # (..., N_R, Q), H P^1/2
    noise: Tensor  # (..., N_R, N_R)
    strength: Tensor  # (..., Q) received power, without gradient
    eps_channel: float  # what the last digits of H are worth
    eps_noise: float  # and those of the noise covariance


@dataclass(frozen=True)
class Whitened:
    """`B` seen through noise covariances: `signal` where there is noise, `clear` where there is none (or None)."""

    signal: Tensor  # (..., N_R, Q)
    clear: Tensor | None  # (..., N_R, Q), columns below the threshold set to exact zeros
    threshold: Tensor  # (..., Q) amplitude from which on something in the noise-free space counts
    root: Tensor  # Cholesky factor if regular, else the scaled eigenvectors; (..., N_R, N_R)
    basis: Tensor | None  # the noise-free directions, zero columns elsewhere

    def unwhiten(self, signal: Tensor) -> Tensor:
        """Filters for `B` from filters for `signal`."""
        if self.clear is None:
            return torch.linalg.solve_triangular(self.root.mH, signal, upper=True)
        return self.root @ signal


class Filters(NamedTuple):
    """What a receiver is made of."""

    F: Tensor  # (..., Q, Q)
    W: Tensor  # (..., N_R, Q)
    floorless: bool  # whether users are heard where a covariance of single precision has no noise: was there a floor?


def filters(link: Received, design: Tensor, argument: str, eps: float, order: Tensor | None = None) -> Filters:
    """`F` and `W` of a receiver designed for `design`: linear, or cancelling users in `order` (..., Q).

    Eigenvalues of `design` below ``N_R eps max`` are null: there the receiver hears without noise. Only the batch
    items in which there are any go the longer way.
    """
    regular = _regular(design, argument, eps)
    if bool(regular.all()):
        return Filters(*_regular_filters(whiten(link, design), order), False)
    batch = torch.broadcast_shapes(link.B.shape[:-2], design.shape[:-2], () if order is None else order.shape[:-1])
    antennas, users = link.B.shape[-2:]
    B = link.B.expand(*batch, antennas, users).reshape(-1, antennas, users)
    C = design.expand(*batch, antennas, antennas).reshape(-1, antennas, antennas)
    sequence = None if order is None else order.expand(*batch, users).reshape(-1, users)
    mask = regular.expand(batch).reshape(-1)
    F, W, floorless = B.new_empty(len(B), users, users), torch.empty_like(B), False
    for part, function in ((mask, _regular_filters), (~mask, _singular_filters)):
        if bool(part.any()):
            own = Received(B[part], C[part], link.strength, link.eps_channel, eps)
            seen = whiten(own, C[part]) if function is _regular_filters else _whiten_singular(own, C[part], eps)
            F[part], W[part] = function(seen, None if sequence is None else sequence[part])
            floorless |= eps >= SINGLE and seen.clear is not None and bool((seen.clear != 0).any())
    return Filters(F.reshape(*batch, users, users), W.reshape(*batch, antennas, users), floorless)


def log_det(link: Received, argument: str) -> Tensor:
    """``log det(I + B^H C^-1 B)``, infinite where a user reaches a direction without noise."""
    regular = _regular(link.noise, argument, link.eps_noise)
    if bool(regular.all()):
        return _log_det(whiten(link, link.noise))
    rate = _log_det(seen := _whiten_singular(link, link.noise, link.eps_noise))
    assert seen.clear is not None
    return torch.where((seen.clear != 0).any(-1).any(-1), torch.inf, rate)


def warn_floorless() -> None:
    """Say at the caller's line that a floor may have been lost."""
    warn(
        "C: is singular to the precision of complex64, and users are received where it has no noise, as if "
        "there were none (MSE 0, infinite rate). If there is thermal noise, 60 dB or more below the jammer, make and "
        "pass H and C in complex128"
    )


def whiten(link: Received, C: Tensor) -> Whitened:
    """For regular `C`: through its Cholesky factor, which has derivatives where eigenvectors have none."""
    L = torch.linalg.cholesky(C)
    shape = torch.broadcast_shapes(L.shape[:-2], link.B.shape[:-2])
    signal = torch.linalg.solve_triangular(
        L.expand(*shape, *L.shape[-2:]), link.B.expand(*shape, *link.B.shape[-2:]), upper=False
    )
    return Whitened(signal, None, torch.zeros_like(signal[..., 0, :].real), L, None)


def _whiten_singular(link: Received, C: Tensor, eps: float) -> Whitened:
    threshold = _VISIBLE[max(link.eps_channel, eps) < 1e-10] * link.B.detach().abs().square().sum(-2).sqrt()
    values, vectors = torch.linalg.eigh(C)
    null = values <= C.shape[-1] * eps * values[..., -1:].clamp_min(0.0)
    root = vectors * torch.where(null, 0.0, torch.where(null, 1.0, values).rsqrt())[..., None, :]
    basis = vectors * null[..., None, :]
    clear = basis.mH @ link.B
    hidden = clear.abs().square().sum(-2).sqrt() <= threshold
    return Whitened(root.mH @ link.B, torch.where(hidden[..., None, :], 0.0, clear), threshold, root, basis)


def _regular(C: Tensor, argument: str, eps: float) -> Tensor:
    """Which batch items have noise in every direction; an error if one is no covariance."""
    eigenvalues = torch.linalg.eigvalsh(C.detach())
    check_psd(eigenvalues, argument, eps)
    regular = eigenvalues[..., 0] > C.shape[-1] * eps * eigenvalues[..., -1]
    if C.requires_grad and torch.is_grad_enabled() and not bool(regular.all()):
        raise TypeError(f"{argument}: requires a gradient, but is singular, and there the result has none")
    return regular


def _log_det(seen: Whitened) -> Tensor:
    # by singular values: a determinant near 1 would lose the digits of a small rate
    return torch.log1p(torch.linalg.svdvals(seen.signal).square()).sum(-1)


def _root(matrix: Tensor) -> Tensor:
    """Upper triangular `R` with ``R^H R = matrix^H matrix``, by QR: the product would square the condition."""
    return torch.linalg.qr(matrix).R


def _eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _with_identity(signal: Tensor) -> Tensor:
    """`signal` on top of an identity: its Gram matrix is ``I + signal^H signal``."""
    eye = torch.eye(signal.shape[-1], dtype=signal.dtype, device=signal.device)
    return torch.cat([signal, eye.expand(*signal.shape[:-2], *eye.shape)], dim=-2)


def _regular_filters(seen: Whitened, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """In reversed order the users present at each step are a leading block: one factorisation serves all steps."""
    if order is None:
        R = _root(_with_identity(seen.signal))
        inverse = torch.linalg.solve_triangular(R, _eye_like(R).expand_as(R), upper=True)
        F = inverse @ inverse.mH
        return F, seen.unwhiten(seen.signal @ F)
    batch = torch.broadcast_shapes(seen.signal.shape[:-2], order.shape[:-1])
    signal = seen.signal.expand(*batch, *seen.signal.shape[-2:])
    backwards = order.expand(*batch, order.shape[-1]).flip(-1)
    R = _root(_with_identity(signal.gather(-1, backwards[..., None, :].expand_as(signal))))
    inverse = torch.linalg.solve_triangular(R, _eye_like(R).expand_as(R), upper=True)
    F = inverse / torch.diagonal(R, dim1=-2, dim2=-1).conj()[..., None, :]
    own = backwards.argsort(-1)  # back to the columns' own order
    F = F.gather(-2, own[..., :, None].expand_as(F)).gather(-1, own[..., None, :].expand_as(F))
    return F, seen.unwhiten(signal @ F)


def _singular_filters(seen: Whitened, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """The limit of the filters for ``C + e I`` as e goes to 0; `seen` and `order` have one batch dimension.

    What users send into the noise-free space is known exactly: only combinations of users in the null space of `clear`
    keep an error, and there the usual formula holds. Users whose noise-free parts are parallel to `_RANK` count as one
    direction there.
    """
    assert seen.clear is not None  # the caller has looked
    assert seen.basis is not None
    signal, clear = seen.signal, seen.clear
    users = signal.shape[-1]
    length = clear.abs().square().sum(-2).sqrt()
    scale = torch.where(length > 0, length, 1.0)
    unit = clear / scale[..., None, :]
    longest = length.amax(dim=-1, keepdim=True)
    ratio = torch.where(length > 0, scale / torch.where(longest > 0, longest, 1.0), 1.0)  # `scale`, without unit
    stacked = _with_identity(signal)
    balanced = stacked / ratio[..., None, :]
    eye = _eye_like(signal)
    position = None if order is None else order.argsort(-1)
    F, W = [], []
    for q in range(users):
        here = torch.ones_like(length, dtype=torch.bool) if position is None else position[:, q, None] <= position
        visible = unit * here[..., None, :]
        others = visible.clone()
        others[..., q] = 0.0
        own = visible[..., q, None]
        span = _range(others)
        alone = (own - span @ (span.mH @ own)).abs().square().sum(dim=(-2, -1)).sqrt()
        free = alone * length[..., q] > seen.threshold[..., q]  # a noise-free direction that only q reaches

        left, s, right = torch.linalg.svd(visible, full_matrices=False)
        kept = s > _RANK
        rows = right * kept[..., None]
        Z = (eye - rows.mH @ rows) * (here[..., :, None] & here[..., None, :])
        R = _root(torch.cat([balanced @ Z, eye - Z], dim=-2))
        column = torch.linalg.solve_triangular(R.mH, Z[..., q, None] / ratio[..., q, None, None], upper=False)
        column = Z @ torch.linalg.solve_triangular(R, column, upper=True) / ratio[..., None]
        column = torch.where(free[..., None, None], 0.0, column)
        left_over = (eye[..., q, None] - stacked.mH @ (stacked @ column)) * here[..., None] / scale[..., None]
        inverse = torch.where(kept, 1 / torch.where(kept, s, 1.0), 0.0)
        F.append(column)
        W.append(seen.unwhiten(signal @ column) + seen.basis @ (left @ (inverse[..., None] * (rows @ left_over))))
    return torch.cat(F, dim=-1), torch.cat(W, dim=-1)


def _range(columns: Tensor) -> Tensor:
    """An orthonormal basis of the column space, padded with zero columns."""
    left, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return left * (s > _RANK)[..., None, :]
