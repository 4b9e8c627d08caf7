"""The accuracy of fusions under attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._state import finite_number
from ..errors import InputError
from ._axes import GREEN, GREY, ORANGE, SKY, axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["fusion_chart"]

_METHODS = {
    "unprotected": ("unprotected", GREY),
    "restored": ("embeddings restored", SKY),
    "realigned": ("realigned", ORANGE),
    "both": ("restored and realigned", GREEN),
}
_CONDITIONS = {
    "ideal": "ideal uplink",
    "strongest_user": "strongest-user attack",
    "sum_rate": "sum-rate attack",
}
_LINES = {"clean": ("fusion without noise", "-"), "base": ("base model", "--")}


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
    ax = axes_of(ax, (7.6, 4.2))
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
