"""Received symbols among the points that they may have been."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .._arrays import refuse_masked
from ..channel import Constellation
from ..channel.constellation import checked_order
from ..errors import NonFiniteError, ShapeError
from ._axes import BLUE, RED, axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["constellation_plot"]


def constellation_plot(
    received: Tensor | ArrayLike,
    sent: Tensor | ArrayLike | None = None,
    *,
    modulation: int,
    ax: Axes | None = None,
) -> Axes:
    """Unbiased estimates of QAM symbols in the complex plane, with the constellation and its decision boundaries.

    Args:
        received: complex estimates of symbols of unit mean power, any shape.
        sent: the symbols themselves, of the same shape; estimates that are decided wrongly then get another colour, and
            the legend says how many they are.
        modulation: the order of the QAM: 4, 16, 64 or 256.
        ax: where to draw; None: a new figure.

    Returns:
        The Axes. It shows the constellation and half a symbol around it, or more where that leaves out more than one
        estimate in a hundred.

    Raises:
        TypeError: the symbols are not complex. ShapeError: none of them, or `sent` has another shape.
        InputError: another order. NonFiniteError: NaN or infinity. ImportError: matplotlib is missing.

    Source: R-MTLLMF, section IV (64-QAM).

    Example:
        >>> import numpy as np
        >>> sent = np.array([1 + 1j, 1 - 1j]) / np.sqrt(2)
        >>> ax = constellation_plot(sent - 0.8, sent, modulation=4)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['decided rightly (0 %)', 'decided wrongly (100 %)', 'constellation']
    """
    grid = Constellation(checked_order(modulation, "modulation"))
    estimates = _symbols(received, "received")
    ax = axes_of(ax, (4.4, 4.7))
    if sent is None:
        groups = [(np.ones(estimates.shape, dtype=bool), "received", BLUE)]
    else:
        truth = _symbols(sent, "sent")
        if np.shape(received) != np.shape(sent):
            raise ShapeError(f"sent: expected the shape of received, {np.shape(received)}, got {np.shape(sent)}")
        nearest = [grid.nearest(part) for part in (estimates, truth)]
        wrong = np.abs(nearest[0] - nearest[1]) > grid.unit
        share = 100 * wrong.mean()
        groups = [
            (~wrong, f"decided rightly ({100 - share:.0f} %)", BLUE),
            (wrong, f"decided wrongly ({share:.0f} %)", RED),
        ]
    size = float(np.clip(200 / np.sqrt(estimates.size), 1.0, 12.0))
    for chosen, label, colour in groups:
        part = estimates[chosen]
        ax.scatter(part.real, part.imag, s=size, color=colour, alpha=0.5, linewidths=0, label=label)
    side = round(modulation**0.5)
    places = (2 * np.arange(side) + 1 - side) * grid.unit
    real, imaginary = (part.ravel() for part in np.meshgrid(places, places))
    ax.scatter(real, imaginary, s=22, marker="x", color="black", linewidths=1.0, label="constellation", zorder=3)
    for edge in (places[1:] + places[:-1]) / 2:
        for line in (ax.axvline, ax.axhline):
            line(edge, color="#bbbbbb", linewidth=0.6, zorder=0)
    outer = np.maximum(np.abs(estimates.real), np.abs(estimates.imag))
    limit = max(places[-1] + 2 * grid.unit, float(np.quantile(outer, 0.99)) + grid.unit)
    ax.set_xlim(-limit, limit)
    ax.set_ylim(-limit, limit)
    ax.set_aspect("equal")
    ax.set_xlabel("real part (mean power of a symbol: 1)")
    ax.set_ylabel("imaginary part")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8, markerscale=1.5)
    return ax


def _symbols(values: Tensor | ArrayLike, argument: str) -> NDArray[np.complex128]:
    """(n,) of them."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().resolve_conj().numpy()
    refuse_masked(values, argument)
    array = np.asarray(values)
    if array.dtype.kind != "c":
        raise TypeError(f"{argument}: expected complex symbols, got an array of dtype {array.dtype}")
    if not array.size:
        raise ShapeError(f"{argument}: expected at least one symbol, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{argument}: holds NaN or infinity; expected finite symbols")
    return array.astype(np.complex128).ravel()
