"""From a reception, or bare MSEs, to what `transmit` needs: gains and a factor of the noise covariance, per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .._arrays import ArrayLike, Inputs, check_hermitian, check_psd, resolution
from ..errors import InputError, ShapeError
from .reception import Reception, check_mse
from .uplink import Uplink

ESTIMATORS = ("additive", "mmse", "unbiased")

Weight: TypeAlias = tuple[Tensor, Tensor | None] | None  # real and imaginary part; None where it is exactly zero


@dataclass(frozen=True)
class Link:
    """Per block and user: the gain on what was sent (None: exactly 1), and the weights of the noise streams."""

    blocks: int
    gain: list[list[Tensor | None]]
    factor: list[list[list[Weight]]]
    root: Tensor  # (blocks, Q, Q) the same weights as matrices, without gradient
    differentiable: bool

    @property
    def independent(self) -> bool:
        """Whether every user's noise is made of its own stream alone."""
        return all(
            weight is None or q == stream
            for rows in self.factor
            for q, row in enumerate(rows)
            for stream, weight in enumerate(row)
        )


def is_followed(tensor: Tensor) -> bool:
    """Whether autograd follows a tensor, backwards or forwards."""
    backwards = torch.is_grad_enabled() and tensor.requires_grad
    return backwards or torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def checked_estimator(estimator: str) -> str:
    """Raise unless there is such an estimator."""
    if estimator not in ESTIMATORS:
        raise InputError(f"estimator: expected one of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}")
    return estimator


def link_of(reception: Reception | ArrayLike, users: int, estimator: str) -> Link:
    """Checked gains and noise of `users` users under `estimator`."""
    if isinstance(reception, Reception):
        gain, noise = _from_reception(reception, users, estimator)
    else:
        gain, noise = _from_mse(reception, users, estimator)
    if gain is not None:
        gain = gain.cpu()  # as the weights: single numbers, which go with vectors on any device
    gains = [[None if gain is None else gain[b, q] for q in range(users)] for b in range(noise.shape[0])]
    differentiable = is_followed(noise) or (gain is not None and is_followed(gain))
    factor = _factor(noise).cpu()
    return Link(noise.shape[0], gains, _weights(factor), factor.detach(), differentiable)


def _from_mse(mse: ArrayLike, users: int, estimator: str) -> tuple[Tensor | None, Tensor]:
    if isinstance(mse, Uplink) or (isinstance(mse, list | tuple) and any(isinstance(m, Reception) for m in mse)):
        raise TypeError(
            f"reception: expected a Reception (of sic or lmmse; for block fading one with a batch dimension) or MSEs, "
            f"got {type(mse).__name__}"
        )
    inputs = Inputs.of(mse, "mse")
    mu = inputs.real(mse, "mse")
    if mu.ndim == 0:
        mu = mu.expand(users)
    mu = _blocks(mu, users, "mse", 1)
    low, high = float(mu.detach().min()), float(mu.detach().max())
    if low < 0 or (estimator == "mmse" and high > 1) or (estimator == "unbiased" and high >= 1):
        allowed = {"additive": "at least 0", "mmse": "between 0 and 1", "unbiased": "at least 0 and below 1"}
        raise InputError(
            f"mse: the {estimator!r} estimator needs MSEs {allowed[estimator]}, got {low:.6g} to {high:.6g}; for a "
            "mismatched receiver, whose MSE may exceed 1, pass its Reception"
        )
    if estimator == "additive":
        return None, torch.diag_embed(mu)
    if estimator == "mmse":
        return 1 - mu, torch.diag_embed(mu * (1 - mu))
    return None, torch.diag_embed(mu / (1 - mu))


def _from_reception(reception: Reception, users: int, estimator: str) -> tuple[Tensor | None, Tensor]:
    name = "error_covariance" if estimator == "additive" else "noise_covariance"
    covariance = getattr(reception, name)
    inputs = Inputs.of(covariance, f"reception.{name}")
    eps = resolution(covariance)
    noise = inputs.complex(covariance, f"reception.{name}", real_too=True)
    check_hermitian(noise, noise.shape[-1] if noise.ndim else 0, f"reception.{name}", eps)
    noise = _blocks(noise, users, f"reception.{name}", 2)
    check_psd(torch.linalg.eigvalsh(noise.detach()), f"reception.{name}", eps)
    if estimator == "additive":
        if reception.mse is not None:
            mse = _blocks(inputs.real(reception.mse, "reception.mse"), users, "reception.mse", 1)
            diagonal = torch.diagonal(noise, dim1=-2, dim2=-1).real
            check_mse(
                mse,
                diagonal,
                "reception.mse",
                "the diagonal of error_covariance",
                resolution(covariance, reception.mse),
            )
        return None, noise
    gain = _blocks(inputs.real(reception.gain, "reception.gain"), users, "reception.gain", 1)
    if gain.shape[0] != noise.shape[0]:
        raise ShapeError(f"reception.gain: has {gain.shape[0]} blocks, reception.{name} has {noise.shape[0]}")
    if estimator == "mmse":
        return gain, noise
    if bool((gain.detach() == 0).any()):
        raise InputError(
            "reception: the 'unbiased' estimator divides by the gain, which is 0 for a silent user; leave that user out"
        )
    return None, noise / (gain[..., :, None] * gain[..., None, :])


def _blocks(value: Tensor, users: int, argument: str, trailing: int) -> Tensor:
    """`value` as (blocks, Q) or (blocks, Q, Q)."""
    if value.ndim not in (trailing, trailing + 1) or value.shape[-1] != users:
        form = ", ".join([f"{users}"] * trailing)
        raise ShapeError(
            f"{argument}: expected shape ({form}) or (blocks, {form}) for {users} vectors, got {tuple(value.shape)}; "
            f"an uplink for them has num_users={users}"
        )
    value = value if value.ndim == trailing + 1 else value[None]
    if value.shape[0] == 0:
        raise ShapeError(f"{argument}: expected at least one block, got shape {tuple(value.shape)}")
    return value


def _factor(noise: Tensor) -> Tensor:
    """`L` with ``L L^H = noise``: diagonal for uncorrelated users, else Cholesky, or by eigenvalues if singular."""
    diagonal = torch.diagonal(noise, dim1=-2, dim2=-1)
    if bool((noise.detach() - torch.diag_embed(diagonal.detach()) == 0).all()):
        variance = diagonal.real if noise.is_complex() else diagonal
        root = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
        return torch.diag_embed(root)
    L, failed = torch.linalg.cholesky_ex(noise)
    if bool((failed == 0).all()):
        return L
    values, vectors = torch.linalg.eigh(noise)
    return vectors * values.clamp_min(0.0).sqrt()[..., None, :]


def _weights(factor: Tensor) -> list[list[list[Weight]]]:
    def weight(entry: Tensor) -> Weight:
        if bool(entry.detach() == 0):
            return None
        if not entry.is_complex():
            return entry, None
        return entry.real, (None if bool(entry.detach().imag == 0) else entry.imag)

    return [[[weight(entry) for entry in row] for row in block] for block in factor]
