"""How the worst-case jammer spreads its power over the modes of the received signal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..channel import Uplink, worst_case
from ..errors import InputError, ShapeError
from ._axes import BLUE, GREY, ORANGE, axes_of, bare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["water_filling"]

_BELOW = 6.0  # dB of axis below the smallest bar


def water_filling(H: Any, P: Any, P_N: float, *, noise: float = 0.0, ax: Axes | None = None) -> Axes:
    r"""The worst-case noise on each signal mode: the signal, the thermal floor, and what the jammer adds to it.

    .. math:: c_i = \max\bigl(0, \sigma(v_i, \nu) - \sigma^2\bigr), \qquad
              \sigma(v, \nu) = \tfrac{v}{2} \bigl(\sqrt{1 + 4/(v \nu)} - 1\bigr) \to 1/\nu \quad (v \to \infty)

    Per mode two bars: the signal :math:`v_i`, an eigenvalue of :math:`H P H^H`, and the noise, the jammer's
    :math:`c_i` upon the floor :math:`\sigma^2`. A dash shows :math:`\sigma(v_i, \nu)`, up to which the jammer fills
    the mode if that is above the floor, and a line the limit :math:`1/\nu` for strong modes. In dB relative to the
    thermal noise per antenna, or to the jammer's power where there is none; bars begin at the bottom of the axis.

    Args:
        H: (N_R, Q) complex channel.
        P: transmit powers in W: a number or (Q,).
        P_N: the jammer's total power in W, above 0.
        noise: thermal noise power per antenna in W.
        ax: where to draw; None: a new figure.

    Returns:
        The Axes; modes are ordered from the strongest to the weakest, and those without any signal are left out.

    Raises:
        ShapeError: a batch of channels or powers. InputError: silent users, or a jammer without power.
        Whatever `rmtllmf.channel.worst_case` raises. ImportError: matplotlib is missing.

    Source: R-MTLLMF, eq. 14, without the doubly counted power.

    Example:
        Of two modes of 20 dB and 0 dB above the floor, a jammer of -3 dB takes the stronger one alone.

        >>> import numpy as np
        >>> ax = water_filling(np.diag([10.0, 1.0]) + 0j, P=1.0, P_N=0.5, noise=1.0)
        >>> signal, floor, jammer = ax.containers
        >>> jammer.get_label(), [round(float(bar.get_y() + bar.get_height()), 2) for bar in jammer]
        ('jammer', [1.76, 0.0])
    """
    up = Uplink(_array(H), _array(P), _array(noise))
    for name, value in (("P_N", _array(P_N)), ("noise", up.noise)):
        if value.ndim:
            raise ShapeError(f"{name}: expected one number, got an array of shape {value.shape}")
    if up.H.ndim != 2:
        raise ShapeError(f"H: expected one channel (N_R, Q), got shape {tuple(up.H.shape)}")
    found = worst_case(up.H, up.P, _array(P_N), noise=up.noise)
    jamming, floor = float(np.trace(found.covariance).real), float(up.noise)
    B = up.H * np.sqrt(up.P)
    U, s, _ = np.linalg.svd(B, full_matrices=False)
    kept = s > max(B.shape) * np.finfo(s.dtype).eps * s[0]
    v, U = s[kept].astype(np.float64) ** 2, U[:, kept]
    if not v.size or v[0] == 0 or jamming == 0:
        raise InputError("water_filling: expected users that send and a jammer that jams; a power is 0")
    c = np.einsum("ij,ik,kj->j", U.conj(), found.covariance, U).real.clip(0)
    c[c < 1e-12 * jamming] = 0.0  # rounding
    level = float(found.level)
    root = np.sqrt(v * level)
    sigma = 2 * np.sqrt(v / level) / (root + np.sqrt(root**2 + 4))

    unit = floor or jamming
    bottom = _decibel(min(v.min(), sigma.min(), floor or np.inf), unit) - _BELOW
    ax = axes_of(ax, (6.4, 3.8))
    place = np.arange(1, v.size + 1)
    ax.bar(place - 0.2, _decibel(v, unit) - bottom, 0.36, bottom, color=BLUE, label="signal")
    ground = np.full(v.size, _decibel(floor, unit) if floor else bottom)
    if floor:
        ax.bar(place + 0.2, ground - bottom, 0.36, bottom, color=GREY, label="thermal floor")
    noise_top = np.where(c > 0, _decibel(np.where(c > 0, c + floor, unit), unit), ground)
    ax.bar(place + 0.2, noise_top - ground, 0.36, ground, color=ORANGE, label="jammer")
    name = r"$\sigma(v, \nu)$"
    ax.hlines(_decibel(sigma, unit), place + 0.0, place + 0.4, color="black", linewidth=1.8, label=name)
    ax.axhline(_decibel(1 / level, unit), color="black", linestyle=":", linewidth=1.2, label=r"$1/\nu$")
    ax.set_xticks(place)
    ax.set_xlabel("signal mode, strongest first")
    ax.set_ylabel(f"power (dB relative to the {'thermal noise' if floor else 'jammer'})")
    top = max(_decibel(max(v.max(), 1 / level), unit), float(noise_top.max()))
    ax.set_ylim(bottom, top + 0.05 * (top - bottom))
    bare(ax)
    ax.xaxis.grid(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False, fontsize=9, columnspacing=1.2)
    return ax


def _decibel(power: ArrayLike, unit: float) -> Any:
    return 10 * np.log10(np.asarray(power) / unit)


def _array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asanyarray(value)  # masks are to be seen
