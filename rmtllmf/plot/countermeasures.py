"""What each countermeasure on the physical layer buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._state import finite_number
from ..errors import InputError
from ._axes import BLUE, ORANGE, axes_of, bare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["countermeasure_chart"]

_JAMMERS = {"SU": ("strongest-user attack", "o", BLUE), "SR": ("sum-rate attack", "s", ORANGE)}


def countermeasure_chart(rows: Sequence[Mapping[str, Any]], *, ax: Axes | None = None) -> Axes:
    """A line for each countermeasure, a marker for each jammer at the mean squared error that is left.

    Args:
        rows: mappings with `name`, `uses` (channel uses per symbol of every user), `mean` (mean squared error by
            jammer, above 0: a mapping with the keys "SU", "SR" or one of them) and `error` (its standard error,
            likewise). The first row is what the others are compared with: dotted lines mark its means.
        ax: where to draw; None: a new figure.

    Returns:
        The Axes, with the first row on top. Bars are one standard error either way, where it is wider than the marker.

    Raises:
        InputError: no rows, a row that lacks an entry, an unknown jammer, a mean that is not above 0, numbers that are
            not finite. TypeError: no mappings. ImportError: matplotlib is missing.

    Source: the rows of ``examples/countermeasures.py``.

    Example:
        >>> rows = [
        ...     {"name": "unaware", "uses": 1, "mean": {"SU": 0.14, "SR": 0.21}, "error": {"SU": 0.003, "SR": 0.002}},
        ...     {"name": "HARQ", "uses": 2, "mean": {"SU": 0.02, "SR": 0.09}, "error": {"SU": 0.001, "SR": 0.001}},
        ... ]
        >>> ax = countermeasure_chart(rows)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['unaware', 'HARQ (2 uses)']
    """
    table = _table(rows)
    ax = axes_of(ax, (7.2, 1.5 + 0.25 * len(table)))
    for jammer, (label, marker, colour) in _JAMMERS.items():
        places = [index for index, (_, cells) in enumerate(table) if jammer in cells]
        if not places:
            continue
        means = [table[index][1][jammer][0] for index in places]
        errors = [table[index][1][jammer][1] for index in places]
        ax.errorbar(
            means, places, xerr=errors, fmt=marker, color=colour, markersize=5, elinewidth=1.2, capsize=2.5, label=label
        )
        if places[0] == 0:
            ax.axvline(means[0], color=colour, linestyle=":", linewidth=1.2, zorder=1)
    ax.set_xscale("log")
    ax.set_yticks(range(len(table)), [name for name, _ in table])
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("mean squared error of a symbol, averaged over users and draws")
    bare(ax)
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False, fontsize=9)
    return ax


def _table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """Label, and for each jammer mean and standard error."""
    if isinstance(rows, Mapping | str) or not isinstance(rows, Sequence):
        raise TypeError(f"rows: expected a sequence of mappings, got {type(rows).__name__}")
    if not rows:
        raise InputError("rows: expected at least one row, got none")
    table = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"rows[{index}]: expected a mapping, got {type(row).__name__}")
        missing = [key for key in ("name", "uses", "mean", "error") if key not in row]
        if missing:
            raise InputError(f"rows[{index}]: lacks {', '.join(missing)}; expected name, uses, mean and error")
        mean, error = row["mean"], row["error"]
        if not isinstance(mean, Mapping) or not isinstance(error, Mapping):
            raise TypeError(f"rows[{index}]: expected mean and error as mappings by jammer")
        unknown = sorted(str(key) for key in {*mean, *error} - set(_JAMMERS))
        if unknown or not mean or set(mean) != set(error):
            raise InputError(
                f"rows[{index}]: expected mean and error of the same jammers, of {list(_JAMMERS)}; "
                f"got {list(mean)} and {list(error)}"
            )
        cells = {}
        for jammer in mean:
            value = finite_number(mean[jammer], f"rows[{index}]['mean'][{jammer!r}]", positive=True)
            spread = finite_number(error[jammer], f"rows[{index}]['error'][{jammer!r}]")
            if spread < 0:
                raise InputError(f"rows[{index}]['error'][{jammer!r}]: expected at least 0, got {spread}")
            cells[jammer] = (value, spread)
        uses = finite_number(row["uses"], f"rows[{index}]['uses']", positive=True)
        table.append((f"{row['name']} ({uses:g} uses)" if uses != 1 else str(row["name"]), cells))
    return table
