"""What a receiver believes about the noise: covariances for `designed_for` of `sic` and `lmmse`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs, batch_shape, check_psd, resolution
from .._random import Seed, generator, reseed, seed_number
from .._state import whole_number
from ..errors import InputError, ShapeError
from ._covariance import covariance_input

__all__ = ["covariance_of", "estimated_covariance", "power_only_covariance"]

_CHUNK = 1 << 20  # complex numbers of snapshots drawn at once: bounded memory for any number of draws


def covariance_of(snapshots: Array, *, loading: ArrayLike = 0.0, shrinkage: str | ArrayLike | None = None) -> Any:
    r"""The noise covariance as a receiver estimates it from what it hears while the users are silent.

    .. math::
        \hat C = (1 - \alpha)\, S + (\alpha + \delta)\, m I, \qquad
        S = \frac{1}{L} \sum_{k=1}^{L} z_k z_k^H, \qquad m = \frac{\mathrm{tr}\, S}{N_R}

    with the `shrinkage` :math:`\alpha` and the diagonal `loading` :math:`\delta`. Ledoit and Wolf's shrinkage
    estimates the :math:`\alpha` of least expected Frobenius error,

    .. math::
        \alpha = \min\Bigl(1,\ \frac{\sum_k \lVert z_k z_k^H - S \rVert_F^2}{L^2\, \lVert S - m I \rVert_F^2}\Bigr),

    for complex snapshots as for real ones: scikit-learn's ``LedoitWolf(assume_centered=True)`` for the latter. The
    noise has mean zero, so that no mean is subtracted.

    Args:
        snapshots: (..., N_R, L) complex amplitudes in sqrt(W), a column per channel use; jammer plus thermal noise.
        loading: (...) at least 0, in units of the mean eigenvalue `m` (0.1: a tenth of the noise power per antenna on
            every antenna). To load with a power in W, add it to the result: ``... + up.noise_covariance``.
        shrinkage: None, "ledoit_wolf" (needs ``L >= 2``), or :math:`\alpha` itself, (...) between 0 and 1.

    Returns:
        (..., N_R, N_R) complex, in W. With ``L < N_R`` and neither loading nor shrinkage it is singular, and a
        receiver designed for it takes the directions that it has not heard to be free of noise.

    Raises:
        TypeError: `snapshots` are real. ShapeError: shapes do not fit, or no snapshot.
        InputError: negative `loading`, `shrinkage` unknown or outside 0 to 1; NonFiniteError: NaN or infinity.

    Source: O. Ledoit and M. Wolf, J. Multivariate Analysis 88, 2004; B. Carlson, IEEE Trans. AES 24, 1988 (loading).

    Example:
        >>> import numpy as np
        >>> heard = np.array([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 1.0, 1.0]]) + 0j
        >>> covariance_of(heard, loading=0.1).real
        array([[1.075, 0.   ],
               [0.   , 0.575]])
    """
    inputs = Inputs.of(snapshots, "snapshots", loading, shrinkage)
    Z = inputs.complex(snapshots, "snapshots")
    if Z.ndim < 2 or 0 in Z.shape[-2:]:
        raise ShapeError(f"snapshots: expected shape (..., N_R, L) with N_R, L >= 1, got {tuple(Z.shape)}")
    delta, alpha = _weights(inputs, loading, shrinkage, Z.shape[-1], ("snapshots", Z.shape[:-2]))
    S, optimal = _sample_covariance(Z, alpha is None)
    return inputs.back(_blend(S, optimal if alpha is None else alpha, delta))


def estimated_covariance(
    C: Array, snapshots: int, *, seed: Seed, loading: ArrayLike = 0.0, shrinkage: str | ArrayLike | None = None
) -> Any:
    r"""What a receiver makes of `snapshots` channel uses of noise with the true covariance `C`.

    Draws :math:`z_1, \dots, z_L \sim \mathcal{CN}(0, C)` independently, and returns their `covariance_of`. Without
    shrinkage and loading :math:`L\, S` is complex Wishart, of mean :math:`L\, C`.

    Args:
        C: (..., N_R, N_R) covariance of the whole noise in W (jammer plus thermal), positive semidefinite; may be
            singular.
        snapshots: their number L, at least 1. About ``2 N_R`` cost a linear receiver half its SINR.
        seed: an int or a ``torch.Generator``; drawn on the CPU in double precision, every batch item on its own.
        loading, shrinkage: as for `covariance_of`.

    Returns:
        (..., N_R, N_R) complex, in W. Gradients reach `C` where it is regular.

    Raises:
        NotPSDError: `C` is no covariance. ShapeError, InputError, TypeError: as `covariance_of`.

    Source: I. Reed, J. Mallett and L. Brennan, IEEE Trans. AES 10, 1974, for the loss of a finite L.

    Example:
        >>> from rmtllmf.channel import UplinkScenario, estimated_covariance, sic, worst_case_covariance
        >>> up = UplinkScenario().draw(100, seed=0)
        >>> C = worst_case_covariance(up.H, up.P, 124 * up.noise, noise=up.noise) + up.noise_covariance
        >>> few = estimated_covariance(C, 32, seed=0)
        >>> shrunk = estimated_covariance(C, 32, seed=0, shrinkage="ledoit_wolf")
        >>> errors = [sic(up.H, up.P, C, designed_for=belief).mse.mean() for belief in (None, shrunk, few)]
        >>> bool(errors[0] < errors[1] < errors[2])
        True
    """
    inputs, covariance = covariance_input(C, "C", loading, shrinkage)
    count = whole_number(snapshots, "snapshots", at_least=1)
    batch, antennas = covariance.shape[:-2], covariance.shape[-1]
    delta, alpha = _weights(inputs, loading, shrinkage, count, ("C", batch))
    check_psd(torch.linalg.eigvalsh(covariance.detach()), "C", resolution(C))
    number, source = seed_number(seed), generator(0)
    items = covariance.reshape(-1, antennas, antennas)
    step = max(1, _CHUNK // (antennas * count))
    found = []
    for start in range(0, items.shape[0], step):
        root = _root(items[start : start + step])
        reseed(source, number, "snapshots", start)
        white = torch.randn(root.shape[0], antennas, count, dtype=root.dtype, generator=source)
        found.append(_sample_covariance(root @ white.to(root.device), alpha is None))
    S = torch.cat([part[0] for part in found]) if found else items
    optimal = torch.cat([part[1] for part in found]) if found else items[..., 0, 0].real
    return inputs.back(_blend(S.reshape(covariance.shape), optimal.reshape(batch) if alpha is None else alpha, delta))


def power_only_covariance(C: Array) -> Any:
    r"""What a receiver believes that knows how strong the noise is, but not where it comes from.

    .. math:: \hat C = \frac{\mathrm{tr}\, C}{N_R}\, I

    Args:
        C: (..., N_R, N_R) covariance of the whole noise in W, positive semidefinite.

    Returns:
        (..., N_R, N_R) complex, of the same trace.

    Raises:
        TypeError: no numbers. ShapeError: no square matrices. NotPSDError: `C` is no covariance.

    Source: `covariance_of` with full shrinkage, in the limit of many snapshots.

    Example:
        >>> import numpy as np
        >>> power_only_covariance(np.diag([1.0, 3.0])).real
        array([[2., 0.],
               [0., 2.]])
    """
    inputs, covariance = covariance_input(C, "C")
    check_psd(torch.linalg.eigvalsh(covariance.detach()), "C", resolution(C))
    return inputs.back(_mean_eigenvalue(covariance)[..., None, None] * _eye(covariance))


def _weights(
    inputs: Inputs, loading: ArrayLike, shrinkage: str | ArrayLike | None, count: int, batch: tuple[str, torch.Size]
) -> tuple[Tensor, Tensor | None]:
    """Loading and shrinkage; the latter None where Ledoit and Wolf have to find it."""
    delta = inputs.nonnegative(loading, "loading")
    if isinstance(shrinkage, str):
        if shrinkage != "ledoit_wolf":
            raise InputError(f"shrinkage: expected None, 'ledoit_wolf' or a number from 0 to 1, got {shrinkage!r}")
        if count < 2:
            raise InputError(f"snapshots: 'ledoit_wolf' needs at least 2, to see how they differ, got {count}")
        batch_shape(batch, ("loading", delta.shape))
        return delta, None
    alpha = inputs.nonnegative(0.0 if shrinkage is None else shrinkage, "shrinkage")
    if bool((alpha.detach() > 1).any()):
        raise InputError(f"shrinkage: expected numbers from 0 to 1, got {float(alpha.detach().max())}")
    batch_shape(batch, ("loading", delta.shape), ("shrinkage", alpha.shape))
    return delta, alpha


def _sample_covariance(Z: Tensor, shrink: bool) -> tuple[Tensor, Tensor]:
    """`S` (..., N_R, N_R) and, on request, the shrinkage of Ledoit and Wolf (...)."""
    count = Z.shape[-1]
    S = Z @ Z.mH / count
    S = 0.5 * (S + S.mH)
    power = _mean_eigenvalue(S)
    if not shrink:
        return S, power
    unit = torch.where(power > 0, power, 1.0).detach()
    scaled = S / unit[..., None, None]
    spread = (scaled - _mean_eigenvalue(scaled)[..., None, None] * _eye(S)).abs().square().sum(dim=(-2, -1))
    fourth = (Z.abs().square().sum(-2) / unit[..., None]).square().mean(-1)
    uncertain = (fourth - scaled.abs().square().sum(dim=(-2, -1))).clamp_min(0.0) / count
    return S, torch.where(spread > 0, uncertain / torch.where(spread > 0, spread, 1.0), 0.0).clamp_max(1.0)


def _blend(S: Tensor, alpha: Tensor, delta: Tensor) -> Tensor:
    white = (alpha + delta) * _mean_eigenvalue(S)
    return (1 - alpha)[..., None, None] * S + white[..., None, None] * _eye(S)


def _root(C: Tensor) -> Tensor:
    """`L` with ``L L^H = C``: Cholesky, item by item by eigenvalues (and without gradient) where that fails."""
    C = 0.5 * (C + C.mH)
    failed = torch.linalg.cholesky_ex(C.detach()).info != 0
    if not bool(failed.any()):
        return torch.linalg.cholesky(C)
    values, vectors = torch.linalg.eigh(C.detach())
    other = vectors * values.clamp_min(0.0).sqrt()[..., None, :]
    which = failed[..., None, None]
    return torch.where(which, other, torch.linalg.cholesky(torch.where(which, _eye(C), C)))


def _mean_eigenvalue(C: Tensor) -> Tensor:
    return torch.diagonal(C, dim1=-2, dim2=-1).real.mean(-1)


def _eye(C: Tensor) -> Tensor:
    return torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
