r"""What the air does to a path besides attenuating it: scattering, a line of sight, correlated antennas, shadows.

A user's channel is :math:`h = \sqrt{g\, 10^{X/10}}\, \tilde h` with the gain :math:`g` of the path, the shadowing
:math:`X` in dB, and the fading :math:`\tilde h`, normalised to :math:`E\lVert \tilde h \rVert^2 = N_R`.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._arrays import ArrayLike, Inputs, check_hermitian, check_psd, resolution
from .._random import generator
from .._state import finite_number, whole_number
from ..errors import InputError, ShapeError

__all__ = ["Rician", "Shadowing", "exponential_correlation", "steering_vector"]

Fading: TypeAlias = "str | Rician"
Correlation: TypeAlias = complex | ArrayLike


@dataclass(frozen=True)
class Rician:
    r"""Fading with a line of sight to every user, or to those that have one.

    .. math:: \tilde h = \sqrt{\tfrac{K}{K + 1}}\, e^{j \psi} a(\varphi) + \sqrt{\tfrac{1}{K + 1}}\, R^{1/2} w,
              \qquad w \sim \mathcal{CN}(0, I)

    :math:`a` is the `steering_vector` of the user's direction :math:`\varphi`, :math:`\psi` a uniform phase,
    :math:`R` the correlation of the scattered part. Under the path losses "uma", "umi" and "rma" the users without a
    line of sight have :math:`K = 0`: Rayleigh fading.

    Attributes:
        k_factor: the ratio K of the power on the line of sight to the scattered power, in dB. TR 38.901 has a mean
            of 9 dB in UMa and UMi, and 7 dB in RMa.
        spacing: of neighbouring antennas, in wavelengths.

    Raises:
        InputError: `k_factor` is not within 300 dB of 0 dB, or `spacing` not positive.

    Source: S. O. Rice, "Statistical properties of a sine wave plus random noise", 1948.

    Example:
        >>> from rmtllmf.channel import UplinkScenario
        >>> UplinkScenario(fading=Rician(9.0)).draw(seed=0).H.shape
        torch.Size([16, 8])
    """

    k_factor: float
    spacing: float = 0.5

    def __post_init__(self) -> None:
        if abs(finite_number(self.k_factor, "k_factor")) > 300:
            raise InputError(f"k_factor: expected decibels, at most 300 either way, got {self.k_factor}")
        finite_number(self.spacing, "spacing", positive=True)


@dataclass(frozen=True)
class Shadowing:
    r"""Log-normal shadowing: a normally distributed number of dB on top of the path loss, one for all antennas.

    .. math:: g \to g\, 10^{X/10}, \qquad X \sim \mathcal{N}(0, \Sigma)

    The median of the gain stays that of the path; its mean grows by :math:`e^{(\sigma \ln 10 / 10)^2 / 2}`.

    Attributes:
        deviation: the standard deviation :math:`\sigma` in dB, or "3gpp": what TR 38.901 gives for the path loss "uma",
            "umi" or "rma", with and without a line of sight.
        correlation: between the users' shadowing: a number for all pairs, or a matrix (Q, Q).
        decorrelation: in place of `correlation`, the distance :math:`d_c` in m over which the correlation
            :math:`e^{-d_{qr}/d_c}` of two users falls to 1/e; TR 38.901 has 10 m (UMi) to 120 m (RMa).

    Raises:
        InputError: a negative `deviation`, a `correlation` that is none, both `correlation` and `decorrelation`.

    Source: M. Gudmundson, "Correlation model for shadow fading in mobile radio systems", 1991; 3GPP TR 38.901, tables
    7.4.1-1 and 7.5-6.

    Example:
        >>> from rmtllmf.channel import UplinkScenario
        >>> UplinkScenario(shadowing=Shadowing(8.0, decorrelation=50.0)).draw(seed=0).H.shape
        torch.Size([16, 8])
    """

    deviation: float | str
    correlation: ArrayLike = 0.0
    decorrelation: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.deviation, str):
            if self.deviation != "3gpp":
                raise InputError(f"shadowing: expected a deviation in dB or '3gpp', got {self.deviation!r}")
        elif finite_number(self.deviation, "shadowing") < 0:
            raise InputError(f"shadowing: expected a deviation of at least 0 dB, got {self.deviation}")
        if self.decorrelation is not None:
            finite_number(self.decorrelation, "decorrelation", positive=True)
            if not isinstance(self.correlation, int | float) or self.correlation != 0:
                raise InputError("decorrelation: the distance sets the correlation already; give one of the two")

    def matrix(self, users: int) -> Tensor | None:
        """The correlation (Q, Q), checked; None if there is none, or if it depends on the users' places."""
        name = "shadowing correlation"
        if getattr(self.correlation, "ndim", 0) == 0 and not isinstance(self.correlation, list | tuple):
            rho = finite_number(self.correlation, name)
            lowest = -1 / (users - 1) if users > 1 else -1.0
            if not lowest <= rho <= 1:
                raise InputError(f"{name}: expected {lowest:.3g} to 1 for all pairs of {users} users, got {rho:g}")
            if rho == 0:
                return None
            return torch.full((users, users), rho, dtype=torch.float64).fill_diagonal_(1.0)
        matrix = Inputs.of(self.correlation, name).real(self.correlation, name).cpu()
        if matrix.ndim != 2:
            raise ShapeError(f"{name}: expected a number or shape ({users}, {users}), got {tuple(matrix.shape)}")
        check_correlation(matrix, users, name, resolution(self.correlation))
        return matrix


def steering_vector(azimuth: ArrayLike, num_antennas: int, *, spacing: float = 0.5) -> Any:
    r"""The phases of a plane wave at a row of antennas.

    .. math:: a_n(\varphi) = e^{j 2 \pi \delta n \sin \varphi}, \qquad n = 0, \dots, N_R - 1

    Args:
        azimuth: (...) direction :math:`\varphi` of the source in radians; 0 is broadside, at a right angle to the row.
        num_antennas: :math:`N_R`.
        spacing: :math:`\delta`, of neighbouring antennas, in wavelengths.

    Returns:
        (..., N_R) complex, entries of magnitude 1.

    Raises:
        InputError: no antennas, a spacing that is not positive; NonFiniteError: NaN or infinity.

    Source: H. Van Trees, "Optimum Array Processing", 2002, section 2.2.

    Example:
        >>> import numpy as np
        >>> steering_vector(np.pi / 2, 3).real.round(6)  # endfire: half a wavelength from one antenna to the next
        array([ 1., -1.,  1.])
    """
    inputs = Inputs.of(azimuth, "azimuth")
    angle = inputs.real(azimuth, "azimuth")
    num_antennas = whole_number(num_antennas, "num_antennas", at_least=1)
    spacing = finite_number(spacing, "spacing", positive=True)
    n = torch.arange(num_antennas, dtype=torch.float64, device=angle.device)
    phase = 2 * math.pi * spacing * torch.sin(angle)[..., None] * n
    return inputs.back(torch.polar(torch.ones_like(phase), phase))


def exponential_correlation(coefficient: complex, size: int) -> Tensor:
    r"""The correlation matrix of a row of antennas, of which neighbours are correlated by `coefficient`.

    .. math:: R_{mn} = r^{m - n} \ (m \ge n), \qquad R_{nm} = R_{mn}^*

    Args:
        coefficient: :math:`r`, real or complex, :math:`|r| \le 1`.
        size: number of antennas.

    Returns:
        (size, size), complex128.

    Raises:
        InputError: :math:`|r| > 1`, or not finite. TypeError: no number.

    Source: S. Loyka, "Channel capacity of MIMO architecture using the exponential correlation matrix", 2001.

    Example:
        >>> exponential_correlation(0.5, 3).real
        tensor([[1.0000, 0.5000, 0.2500],
                [0.5000, 1.0000, 0.5000],
                [0.2500, 0.5000, 1.0000]], dtype=torch.float64)
    """
    r = _complex(coefficient)
    if not cmath.isfinite(r) or abs(r) > 1:
        raise InputError(f"correlation: expected a number of magnitude at most 1, got {coefficient}")
    size = whole_number(size, "size", at_least=1)
    n = torch.arange(size)
    lag = n[:, None] - n
    powers = torch.tensor([r**k for k in range(size)], dtype=torch.complex128)
    return torch.where(lag >= 0, powers[lag.abs()], powers[lag.abs()].conj())


def antenna_correlation(value: Correlation, antennas: int, users: int) -> Tensor | None:
    """The checked correlation (N_R, N_R), or (Q, N_R, N_R) with one a user; None if there is none."""
    if getattr(value, "ndim", 0) == 0 and not isinstance(value, list | tuple):
        matrix = exponential_correlation(value, antennas)  # type: ignore[arg-type]
        return None if _complex(value) == 0 else matrix
    matrix = Inputs.of(value, "correlation").complex(value, "correlation", real_too=True).cpu()
    if matrix.ndim != 2 and matrix.shape[:-2] != (users,):
        raise ShapeError(
            f"correlation: expected shape ({antennas}, {antennas}) or ({users}, {antennas}, {antennas}), "
            f"got {tuple(matrix.shape)}"
        )
    check_correlation(matrix, antennas, "correlation", resolution(value))
    return matrix


def check_correlation(matrix: Tensor, size: int, argument: str, eps: float) -> None:
    """A correlation matrix is Hermitian positive semidefinite, with ones on its diagonal."""
    check_hermitian(matrix, size, argument, eps)
    off = (torch.diagonal(matrix, dim1=-2, dim2=-1) - 1).abs()
    if float(off.max()) > 1e4 * eps:
        raise InputError(
            f"{argument}: expected ones on the diagonal, one is {1 + float(off.max()):.6g} or as far below 1; "
            "what the gains have in common belongs in path_loss"
        )
    check_psd(torch.linalg.eigvalsh(matrix), argument, eps)


def draw_fading(
    fading: Fading,
    correlation: Tensor | None,
    azimuths: Tensor,
    los: Tensor | None,
    antennas: int,
    seed: int,
) -> Tensor:
    """Fading (..., N_R, Q) for users in the directions `azimuths` (..., Q)."""
    *batch, users = azimuths.shape
    h = torch.randn(*batch, antennas, users, dtype=torch.complex128, generator=generator(seed, "fading"))
    if correlation is not None:
        root = _root(correlation)
        h = _mixed(root, h) if root.ndim == 2 else _mixed(root, h.mT[..., None])[..., 0].mT
    if isinstance(fading, str):
        return h
    K = torch.full(azimuths.shape, 10 ** (fading.k_factor / 10), dtype=torch.float64)
    if los is not None:
        K = torch.where(los, K, 0.0)
    psi = torch.rand(azimuths.shape, dtype=torch.float64, generator=generator(seed, "line of sight: phase"))
    wave = torch.polar((K / (1 + K)).sqrt(), 2 * math.pi * psi)
    direct = steering_vector(azimuths, antennas, spacing=fading.spacing).mT
    return wave[..., None, :] * direct + (1 + K).rsqrt()[..., None, :] * h


def draw_shadowing(shadowing: Shadowing, deviation: Tensor, distances: Tensor, azimuths: Tensor, seed: int) -> Tensor:
    """Factors (..., Q) on the gain of users at `distances` and `azimuths`, with `deviation` (..., Q) in dB."""
    X = torch.randn(distances.shape, dtype=torch.float64, generator=generator(seed, "shadowing"))
    correlation = shadowing.matrix(distances.shape[-1])
    if shadowing.decorrelation is not None:
        x, y = distances * torch.cos(azimuths), distances * torch.sin(azimuths)
        apart = torch.hypot(x[..., :, None] - x[..., None, :], y[..., :, None] - y[..., None, :])
        correlation = torch.exp(-apart / shadowing.decorrelation)
    if correlation is not None:
        X = _mixed(_root(correlation), X[..., None])[..., 0]
    return 10 ** (deviation * X / 10)


def _root(matrix: Tensor) -> Tensor:
    """The Hermitian square root: it exists for singular matrices too, and there is only one."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0.0).sqrt()[..., None, :]) @ vectors.mH


def _mixed(root: Tensor, draws: Tensor) -> Tensor:
    """``root @ draws`` for draws (..., n, m), summed in one order: the same bits for any number of threads."""
    return sum(
        (root[..., :, k, None] * draws[..., k, None, :] for k in range(draws.shape[-2])), torch.zeros_like(draws)
    )


def _complex(value: object) -> complex:
    if isinstance(value, bool | str):
        raise TypeError(f"correlation: expected a number, got {type(value).__name__}")
    try:
        return complex(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise TypeError(f"correlation: expected a number, got {type(value).__name__}") from None
