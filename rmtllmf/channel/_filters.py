r"""The linear filters behind every receiver, for regular and singular noise covariances.

User q's filter is :math:`w_q = (\sum_{j \in S_q} b_j b_j^H + C)^{-1} b_q`, where :math:`S_q` are the users present when
it is decoded. With :math:`K = I + B_S^H C^{-1} B_S` the filter leaves :math:`w_q^H b_j = [j = q] - F_{jq}^*` of
user j, where :math:`F_{\cdot q} = K^{-1} e_q` on the users present and 0 elsewhere. Everything that a receiver reports
follows from `F` and `W`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._arrays import check_psd

_RANK = 1e-8  # a singular value of unit columns below this is zero
_VISIBLE = {True: 1e-8, False: 1e-5}  # share of a channel in the noise-free space that counts (double, single)


@dataclass(frozen=True)
class Whitened:
    """`B` seen through a noise covariance: `signal` where there is noise, `clear` where there is none (or None)."""

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


def whiten(B: Tensor, C: Tensor, argument: str, eps: float) -> Whitened:
    """Eigenvalues of `C` below ``N_R eps max`` are null: there the receiver hears without noise."""
    antennas = C.shape[-1]
    eigenvalues = torch.linalg.eigvalsh(C.detach())
    check_psd(eigenvalues, argument, eps)
    threshold = _VISIBLE[eps < 1e-10] * B.detach().abs().square().sum(-2).sqrt()
    regular = eigenvalues[..., 0] > antennas * eps * eigenvalues[..., -1]
    if bool(regular.all()):
        L = torch.linalg.cholesky(C)
        shape = torch.broadcast_shapes(L.shape[:-2], B.shape[:-2])
        signal = torch.linalg.solve_triangular(
            L.expand(*shape, *L.shape[-2:]), B.expand(*shape, *B.shape[-2:]), upper=False
        )
        return Whitened(signal, None, threshold, L, None)
    values, vectors = torch.linalg.eigh(C)
    null = values <= antennas * eps * values[..., -1:].clamp_min(0.0)
    root = vectors * torch.where(null, 0.0, torch.where(null, 1.0, values).rsqrt())[..., None, :]
    basis = vectors * null[..., None, :]
    clear = basis.mH @ B
    hidden = clear.abs().square().sum(-2).sqrt() <= threshold
    return Whitened(root.mH @ B, torch.where(hidden[..., None, :], 0.0, clear), threshold, root, basis)


def gram_root(signal: Tensor) -> Tensor:
    """Upper triangular `R` with ``R^H R = I + signal^H signal``, by QR: the Gram matrix would square the condition."""
    eye = torch.eye(signal.shape[-1], dtype=signal.dtype, device=signal.device)
    stacked = torch.cat([signal, eye.expand(*signal.shape[:-2], *eye.shape)], dim=-2)
    return torch.linalg.qr(stacked).R


def linear_filters(seen: Whitened) -> tuple[Tensor, Tensor]:
    """`F` and `W` with everybody present."""
    if seen.clear is not None:
        everyone = torch.ones(
            seen.signal.shape[:-2] + 2 * seen.signal.shape[-1:], dtype=torch.bool, device=seen.root.device
        )
        return _singular_filters(seen, everyone)
    R = gram_root(seen.signal)
    inverse = torch.linalg.solve_triangular(R, _eye_like(R), upper=True)
    F = inverse @ inverse.mH
    return F, seen.unwhiten(seen.signal @ F)


def sic_filters(seen: Whitened, order: Tensor) -> tuple[Tensor, Tensor]:
    """`F` and `W` when users are decoded, and then cancelled, in `order` (..., Q).

    In reversed order the users present at each step are a leading block, so one factorisation serves all steps.
    """
    users = seen.signal.shape[-1]
    batch = torch.broadcast_shapes(seen.signal.shape[:-2], order.shape[:-1])
    order = order.expand(*batch, users)
    position = order.argsort(-1)
    if seen.clear is not None:
        return _singular_filters(seen, position[..., :, None] <= position[..., None, :])
    signal = seen.signal.expand(*batch, *seen.signal.shape[-2:])
    backwards = order.flip(-1)
    R = gram_root(signal.gather(-1, backwards[..., None, :].expand_as(signal)))
    inverse = torch.linalg.solve_triangular(R, _eye_like(R), upper=True)
    F = inverse / torch.diagonal(R, dim1=-2, dim2=-1).conj()[..., None, :]
    own = backwards.argsort(-1)  # back to the columns' own order
    F = F.gather(-2, own[..., :, None].expand_as(F)).gather(-1, own[..., None, :].expand_as(F))
    return F, seen.unwhiten(signal @ F)


def _eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)


def _singular_filters(seen: Whitened, present: Tensor) -> tuple[Tensor, Tensor]:
    """The limit of the filters for ``C + e I`` as e goes to 0; `present[..., q, j]`: j is there when q is decoded.

    What users send into the noise-free space is known exactly: only combinations of users in the null space of `clear`
    keep an error, and there the usual formula holds.
    """
    assert seen.clear is not None  # the caller has looked
    assert seen.basis is not None
    users = present.shape[-1]
    batch = torch.broadcast_shapes(seen.signal.shape[:-2], present.shape[:-2])
    signal, clear = (part.expand(*batch, *part.shape[-2:]) for part in (seen.signal, seen.clear))
    present = present.expand(*batch, users, users)
    length = clear.abs().square().sum(-2).sqrt()
    scale = torch.where(length > 0, length, 1.0)
    unit = clear / scale[..., None, :]
    largest = length.amax(dim=-1, keepdim=True)
    ratio = torch.where(length > 0, scale / torch.where(largest > 0, largest, 1.0), 1.0)  # `scale`, without unit
    gram = signal.mH @ signal
    eye = _eye_like(gram)
    gram = gram + eye
    balanced = gram / (ratio[..., :, None] * ratio[..., None, :])
    F, W = [], []
    for q in range(users):
        here = present[..., q, :]
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
        column = torch.linalg.solve(Z @ balanced @ Z + eye - Z, Z[..., q, None] / ratio[..., q, None, None])
        column = torch.where(free[..., None, None], 0.0, (Z @ column) / ratio[..., None])
        left_over = (eye[..., q, None] - gram @ column) * here[..., None] / scale[..., None]
        inverse = torch.where(kept, 1 / torch.where(kept, s, 1.0), 0.0)
        F.append(column)
        W.append(seen.unwhiten(signal @ column) + seen.basis @ (left @ (inverse[..., None] * (rows @ left_over))))
    return torch.cat(F, dim=-1), torch.cat(W, dim=-1)


def _range(columns: Tensor) -> Tensor:
    """An orthonormal basis of the column space, padded with zero columns."""
    left, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return left * (s > _RANK)[..., None, :]
