"""Figures: the similarity of task vectors, and the accuracy of fusions under attack.

The only part of the library that knows matplotlib, which is imported when a function is called. Every function takes
``ax=None`` and returns the Axes; without `ax` it draws on a figure of its own that pyplot does not know, to be saved
with ``ax.figure.savefig(...)``. In a notebook pass an Axes of ``matplotlib.pyplot.subplots()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ._state import finite_number
from .errors import InputError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["fusion_chart", "similarity_heatmap"]

# Okabe and Ito's palette: told apart with any kind of colour vision
_METHODS = {
    "unprotected": ("unprotected", "#999999"),
    "restored": ("embeddings restored", "#56B4E9"),
    "realigned": ("realigned", "#E69F00"),
    "both": ("restored and realigned", "#009E73"),
}
_CONDITIONS = {
    "ideal": "ideal uplink",
    "strongest_user": "strongest-user attack",
    "sum_rate": "sum-rate attack",
}
_LINES = {"clean": ("fusion without noise", "-"), "base": ("base model", "--")}


def similarity_heatmap(
    similarity: Tensor | ArrayLike, names: Sequence[str] | None = None, *, ax: Axes | None = None
) -> Axes:
    """A matrix of cosines as a heat map with the numbers written in.

    Args:
        similarity: (N, N) cosines, as of `rmtllmf.metrics.cosine_similarity`. The colours run from 0 to 1, or from -1
            to 1 if an entry is below -0.05.
        names: N labels; None: no labels but numbers.
        ax: where to draw; None: a new figure.

    Returns:
        The Axes.

    Raises:
        ShapeError: no square matrix, or another number of names. NonFiniteError: NaN or infinity.
        InputError: entries outside -1 and 1. ImportError: matplotlib is missing.

    Source: R-MTLLMF, figure of cosine similarities.

    Example:
        >>> ax = similarity_heatmap([[1.0, 0.1], [0.1, 1.0]], ["mnist", "svhn"])
        >>> [text.get_text() for text in ax.texts]
        ['1.00', '0.10', '0.10', '1.00']
    """
    values = _matrix(similarity)
    size = len(values)
    labels = [str(index) for index in range(size)] if names is None else [str(name) for name in names]
    if len(labels) != size:
        raise ShapeError(f"names: expected one for each of the {size} rows, got {len(labels)}")
    margin = 0.09 * max(map(len, labels))  # inches that the longest label takes
    ax = _axes(ax, (2.0 + margin + 0.55 * size, 1.0 + margin + 0.55 * size))
    signed = bool((values < -0.05).any())
    low, colours = (-1.0, "RdBu_r") if signed else (0.0, "viridis")
    image = ax.imshow(values, vmin=low, vmax=1.0, cmap=colours)
    for row in range(size):
        for column in range(size):
            red, green, blue = image.cmap(image.norm(values[row, column]))[:3]
            luminance = 0.299 * red + 0.587 * green + 0.114 * blue
            # + 0.0 turns -0.00 into 0.00
            text = f"{round(float(values[row, column]), 2) + 0.0:.2f}"
            ax.text(column, row, text, ha="center", va="center", color="black" if luminance > 0.5 else "white", size=9)
    ax.set_xticks(range(size), labels, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(size), labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("cosine similarity")
    return ax


def fusion_chart(rows: Sequence[Mapping[str, Any]], *, ax: Axes | None = None) -> Axes:
    """Grouped bars of normalised accuracy: a group for every condition of the uplink, a bar for every method.

    Args:
        rows: mappings with `condition` ("ideal", "strongest_user", "sum_rate"), `method` ("unprotected", "restored",
            "realigned", "both"), `mean` (a share, not percent) and `values` (one a seed; more than one give an error
            bar of one standard deviation). Condition "none" with the methods "base" and "clean" gives horizontal lines.
            What is missing is left out: one condition alone will do.
        ax: where to draw; None: a new figure.

    Returns:
        The Axes.

    Raises:
        InputError: no rows, an unknown condition or method, a row twice, a row that lacks an entry, numbers that are
            not finite. ImportError: matplotlib is missing.

    Source: R-MTLLMF, figure of normalised accuracies.

    Example:
        >>> rows = [
        ...     {"condition": "ideal", "method": "unprotected", "mean": 0.8, "values": [0.8]},
        ...     {"condition": "none", "method": "clean", "mean": 0.85, "values": [0.85]},
        ... ]
        >>> ax = fusion_chart(rows)
        >>> [float(bar.get_height()) for bar in ax.patches], ax.get_ylabel()
        ([80.0], 'normalised accuracy (%)')
    """
    table = _table(rows)
    conditions = [name for name in _CONDITIONS if any(condition == name for condition, _ in table)]
    methods = [name for name in _METHODS if any(condition != "none" and method == name for condition, method in table)]
    ax = _axes(ax, (7.6, 4.2))
    width = 0.8 / max(1, len(methods))
    for place, method in enumerate(methods):
        label, colour = _METHODS[method]
        groups = [index for index, condition in enumerate(conditions) if (condition, method) in table]
        cells = [table[conditions[index], method] for index in groups]
        offset = (place - (len(methods) - 1) / 2) * width
        heights, spreads = [100 * mean for mean, _ in cells], [100 * spread for _, spread in cells]
        bars = ax.bar(
            [index + offset for index in groups],
            heights,
            0.92 * width,
            yerr=spreads if any(spreads) else None,
            capsize=2.5,
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
            color=colour,
            label=label,
        )
        # inside the bars, where error bars and lines do not reach; above those too low for a number
        for bar, height, spread in zip(bars, heights, spreads, strict=True):
            low = height - spread < 7
            ax.annotate(
                f"{height:.0f}",
                (bar.get_x() + bar.get_width() / 2, max(height + spread, 0) if low else 0),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                size=8,
            )
    for method, (label, style) in _LINES.items():
        if ("none", method) in table:
            mean = 100 * table["none", method][0]
            ax.axhline(mean, color="black", linestyle=style, linewidth=1.2, label=f"{label} ({mean:.0f} %)", zorder=1.5)
    ax.set_xticks(range(len(conditions)), [_CONDITIONS[name] for name in conditions])
    if conditions:
        ax.set_xlim(-0.5, len(conditions) - 0.5)
    ax.set_ylabel("normalised accuracy (%)")
    top = max(100 * (mean + spread) for mean, spread in table.values())
    ax.set_ylim(0, max(100.0, 1.05 * top))
    ax.yaxis.grid(True, color="#dddddd", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)
    return ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("rmtllmf.plot needs matplotlib; install it: pip install 'rmtllmf[plot]'") from error
    if ax is None:
        return Figure(figsize=size, layout="constrained").add_subplot()
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected a matplotlib Axes, got {type(ax).__name__}")
    return ax


def _matrix(similarity: Tensor | ArrayLike) -> NDArray[np.float64]:
    if isinstance(similarity, Tensor):
        similarity = similarity.detach().cpu().numpy()
    values = np.asarray(similarity)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"similarity: expected real numbers, got an array of dtype {values.dtype}")
    values = values.astype(np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise ShapeError(f"similarity: expected a square matrix (N, N), got shape {values.shape}")
    if not np.isfinite(values).all():
        raise NonFiniteError("similarity: holds NaN or infinity; expected cosines")
    if np.abs(values).max() > 1 + 1e-6:
        raise InputError(f"similarity: expected cosines between -1 and 1, got {float(np.abs(values).max())}")
    return values


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """(condition, method) -> mean and standard deviation, as shares."""
    if isinstance(rows, Mapping | str) or not isinstance(rows, Sequence):
        raise TypeError(f"rows: expected a sequence of mappings, got {type(rows).__name__}")
    if not rows:
        raise InputError("rows: expected at least one row, got none")
    table: dict[tuple[str, str], tuple[float, float]] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"rows[{index}]: expected a mapping, got {type(row).__name__}")
        missing = [key for key in ("condition", "method", "mean") if key not in row]
        if missing:
            raise InputError(f"rows[{index}]: lacks {', '.join(missing)}; expected condition, method, mean and values")
        condition, method = row["condition"], row["method"]
        if condition not in (*_CONDITIONS, "none"):
            raise InputError(f"rows[{index}]: condition is {condition!r}; expected one of {[*_CONDITIONS, 'none']}")
        known = list(_LINES if condition == "none" else _METHODS)
        if method not in known:
            raise InputError(f"rows[{index}]: method is {method!r}; expected one of {known} for {condition!r}")
        if (condition, method) in table:
            raise InputError(f"rows[{index}]: a second row for {condition!r}, {method!r}; expected one")
        values = [finite_number(value, f"rows[{index}]['values']") for value in row.get("values") or ()]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        table[condition, method] = (finite_number(row["mean"], f"rows[{index}]['mean']"), spread)
    return table
