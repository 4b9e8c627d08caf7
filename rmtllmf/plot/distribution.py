"""How errors are distributed over users and draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ._axes import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, axes_of, bare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["mse_distribution"]

_COLOURS = (GREY, BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
_STYLES = ("-", "--", "-.", ":")


def mse_distribution(mse_by_label: Mapping[str, Tensor | ArrayLike], *, ax: Axes | None = None) -> Axes:
    r"""The share of users and draws whose mean squared error is at most so large, a curve for each jammer or receiver.

    .. math:: F(x) = \frac{1}{n} \sum_{i=1}^{n} [\mu_i \le x]

    Args:
        mse_by_label: label -> mean squared errors of any shape, such as ``reception.mse`` (draws, Q). An error of
            zero counts, but has no place on the logarithmic axis.
        ax: where to draw; None: a new figure.

    Returns:
        The Axes. A dot on each curve marks its mean, which the legend names.

    Raises:
        InputError: no labels, no numbers, or a negative one. NonFiniteError: NaN or infinity.
        TypeError: no mapping, or no real numbers. ImportError: matplotlib is missing.

    Source: the empirical distribution function; R-MTLLMF reports the means.

    Example:
        >>> ax = mse_distribution({"ideal": [0.01, 0.03], "jammed": [[0.1, 0.2], [0.3, 0.4]]})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['ideal (mean .020)', 'jammed (mean .250)']
        >>> ax.lines[0].get_xydata()
        array([[1.e-02, 5.e+01],
               [3.e-02, 1.e+02]])
    """
    if not isinstance(mse_by_label, Mapping):
        raise TypeError(f"mse_by_label: expected a mapping of label to errors, got {type(mse_by_label).__name__}")
    if not mse_by_label:
        raise InputError("mse_by_label: expected at least one label, got none")
    errors = {str(label): _errors(values, label) for label, values in mse_by_label.items()}
    ax = axes_of(ax, (6.0, 3.8))
    for index, (label, x) in enumerate(errors.items()):
        share = 100 * np.arange(1, x.size + 1) / x.size
        colour, style = _COLOURS[index % len(_COLOURS)], _STYLES[index % len(_STYLES)]
        mean = float(x.mean())
        shown = f"{mean:.3f}".removeprefix("0") if mean >= 5e-4 else f"{mean:.1e}"
        text = f"{label} (mean {shown})"
        ax.plot(x, share, color=colour, linestyle=style, drawstyle="steps-post", linewidth=1.6, label=text)
        below = 100 * np.searchsorted(x, mean, side="right") / x.size
        ax.plot([mean], [below], "o", color=colour, markersize=5, markeredgecolor="white", zorder=3)
    ax.set_xscale("log")
    ax.set_ylim(0, 100)
    ax.set_xlabel("mean squared error of a symbol (variance of the symbol: 1)")
    ax.set_ylabel("users and draws up to it (%)")
    bare(ax)
    ax.legend(loc="upper left", frameon=False, fontsize=9, handlelength=2.6)
    return ax


def _errors(values: Tensor | ArrayLike, label: object) -> NDArray[np.float64]:
    """All of them, in ascending order."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    name = f"mse_by_label[{label!r}]"
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: expected real numbers, got an array of dtype {array.dtype}")
    if not array.size:
        raise InputError(f"{name}: expected at least one number, got none")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name}: holds NaN or infinity; expected finite errors")
    if (array < 0).any():
        raise InputError(f"{name}: expected errors >= 0, got {array.min()}")
    return np.sort(array.astype(np.float64), axis=None)
