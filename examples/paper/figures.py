"""The pictures of the paper's section IV, from rows of results: figures 2 to 5.

Colours are told apart with any kind of colour vision; line styles and markers do the same in grey. A curve that is
drawn from fewer seeds or subsets than there should be is called unfinished in the legend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from rmtllmf.plot import similarity_heatmap

from ._files import replacing
from .protocol import Protocol
from .table import COSINES, Cell, Row, Table, tabulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette
BLACK, BLUE, ORANGE, GREEN, PURPLE, GREY = "#000000", "#0072B2", "#D98200", "#009E73", "#B3578D", "#777777"
UPLINKS = {
    "ideal": ("ideal uplink", BLUE, "o"),
    "strongest_user": ("strongest user attacked", ORANGE, "s"),
    "sum_rate": ("sum rate attacked", PURPLE, "^"),
    "barrage": ("white barrage", GREEN, "D"),
}
PANELS = ("as sent", "as received", "as received, without restored embeddings")
PARTS = {
    "both": ("restored and realigned", BLUE, "o", "-"),
    "attention": ("restored, only attention realigned", GREEN, "D", "-."),
    "realigned": ("realigned only", ORANGE, "s", "--"),
    "restored": ("restored only, no images", PURPLE, "", ":"),
}


class NothingToDrawError(ValueError):
    """The rows hold nothing of what a figure shows."""


def draw(rows: Sequence[Row], folder: str | os.PathLike[str], protocol: Protocol | None = None) -> list[Path]:
    """Write the figures that the rows hold something of; a line is printed for each that they do not.

    Args:
        rows: as in `sweep`, unfinished or not.
        folder: made where there is none. A file in it is replaced as a whole.
        protocol: of the rows, as in `table.tabulate`.

    Returns:
        The files that were written.
    """
    figures: dict[str, Callable[..., Figure]] = {"figure-2-number-of-tasks": accuracy_figure}
    for condition in UPLINKS:
        number = "4" if condition == "sum_rate" else "3"  # the paper's; the other uplinks' belong to the first
        name = f"figure-{number}-cosines-{condition.replace('_', '-')}"
        figures[name] = partial(cosine_figure, condition=condition)
    figures["figure-5-shots"] = ablation_figure
    there = {row["condition"] for row in rows}
    written = []
    for name, make in figures.items():
        condition = getattr(make, "keywords", {}).get("condition")
        if condition == "barrage" and condition not in there:  # not the paper's
            continue
        try:
            figure = make(rows, protocol=protocol)
        except NothingToDrawError as error:
            print(f"{name}: skipped, {error}")
            continue
        written.append(_save(figure, Path(folder) / f"{name}.png"))
    return written


def accuracy_figure(rows: Sequence[Row], *, protocol: Protocol | None = None) -> Figure:
    """Figure 2: normalised accuracy against the number of tasks; where there are several seeds, each beside.

    Bands are one standard deviation over the subsets, up and down.

    Raises:
        NothingToDrawError: no fusion of any number of tasks.
    """
    table = tabulate(rows, protocol)
    curves: list[tuple[str, str, str, dict[str, Any]]] = []
    for condition, (label, colour, marker) in UPLINKS.items():
        style = {"color": colour, "marker": marker}
        curves.append((condition, "both", f"{label}, protected", style))
        curves.append((condition, "unprotected", f"{label}, unprotected", style | {"linestyle": "--", "mfc": "white"}))
    curves.sort(key=lambda curve: curve[1] == "unprotected")
    curves.insert(0, ("clean", "unprotected", "no noise, unprotected (baseline)", {"color": BLACK, "marker": "x"}))
    curves = [curve for curve in curves if _against_number(table, *curve[:2])]
    if not curves:
        raise NothingToDrawError("there are no accuracies of fusions with those of the individual models beside")
    several = len(table.seeds) > 1
    figure = Figure(figsize=(12.5 if several else 7.6, 5.8), layout="constrained")
    panels = figure.subplots(1, 2 if several else 1, sharey=True, squeeze=False)[0]
    for condition, protection, label, style in curves:
        cells = _against_number(table, condition, protection)
        style = {"markersize": 6} | style
        _curve(
            panels[0],
            [cell.number for cell in cells],
            cells,
            label,
            style,
            around="spread",
            expected=len(table.tasks) - 1,
        )
        for seed in table.seeds if several else ():
            points = [(cell.number, 100 * _of(cell, seed)) for cell in cells if seed in cell.seeds]
            if points:
                panels[1].plot(*zip(*points, strict=True), linewidth=0.9, alpha=0.8, **(style | {"markersize": 3.5}))
    base = table.cell("base")
    for panel in panels:
        if base:
            line = panel.axhline(100 * base.mean, color=GREY, linestyle=":", linewidth=1.8, zorder=1.5)
            line.set_label("base model, untouched")
        _dress(panel, "number of tasks")
        panel.set_xticks(range(2, len(table.tasks) + 1))
    panels[0].set_ylabel("normalised accuracy (%)")
    if several:
        panels[0].set_title(f"mean of {len(table.seeds)} seeds; bands: standard deviation over the subsets", size=10)
        panels[1].set_title("means over the subsets, each seed by itself", size=10)
    else:
        panels[0].set_title("mean over the subsets; bands: their standard deviation", size=10)
    columns, names = (3 if several else 2), panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3)
    return figure


def cosine_figure(rows: Sequence[Row], condition: str, *, protocol: Protocol | None = None) -> Figure:
    """Figures 3 and 4: cosines between the task vectors of one uplink, as sent and as received; means over the seeds.

    Raises:
        NothingToDrawError: no row of this uplink.
    """
    table = tabulate(rows, protocol)
    up = next((entry for entry in table.uplinks if entry.condition == condition), None)
    if up is None:
        raise NothingToDrawError(f"there are no numbers of the uplink {condition!r}")
    size = len(up.cosines[COSINES[0]])
    names = table.tasks if len(table.tasks) == size else None
    margin = 2.0 + 0.09 * max(map(len, names or ["8"]))
    # two panels wide, so that the numbers can be read on a page
    figure = Figure(figsize=(2 * (margin + 0.42 * size), 2 * (margin + 0.34 * size)), layout="constrained")
    *panels, empty = figure.subplots(2, 2).flat
    empty.axis("off")
    for ax, kind, title in zip(panels, COSINES, PANELS, strict=True):
        similarity_heatmap(up.cosines[kind], names, ax=ax)
        low, high = (round(float(cosine), 2) + 0.0 for cosine in up.ranges[kind])  # + 0.0 turns -0.00 into 0.00
        ax.set_title(f"{title}\nbetween two tasks {low:.2f} to {high:.2f}", size=11)
    seeds = f"; mean of {len(up.seeds)} seeds" if len(up.seeds) > 1 else ""
    figure.suptitle(f"cosines between task vectors: {UPLINKS[condition][0]}{seeds}")
    return figure


def ablation_figure(rows: Sequence[Row], *, protocol: Protocol | None = None) -> Figure:
    """Figure 5: normalised accuracy of all tasks against the shots of realignment, for both parts and each alone.

    Of the first uplink with several numbers of shots. Bands are the 95 % intervals over the seeds.

    Raises:
        NothingToDrawError: no uplink with several numbers of shots.
    """
    table = tabulate(rows, protocol)
    for condition in table.conditions():
        cells = {part: _against_shots(table, condition, part) for part in PARTS}
        shots = sorted({cell.shots for found in cells.values() for cell in found if cell.shots})
        if len(shots) > 1:
            break
    else:
        raise NothingToDrawError("there is no uplink with several numbers of shots")
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    ax = figure.add_subplot()
    ax.set_xscale("log")
    for part, (label, colour, marker, dashes) in PARTS.items():
        found = cells[part]
        if not found:
            continue
        style = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 6}
        if part == "restored":  # takes no shots: the same wherever it is drawn
            _curve(ax, [shots[0], shots[-1]], found * 2, label, style, around="interval", expected=2)
        else:
            _curve(ax, [cell.shots for cell in found], found, label, style, around="interval", expected=len(shots))
    ax.minorticks_off()
    ax.set_xticks(shots, [str(number) for number in shots])
    _dress(ax, "shots (images a class, logarithmic)")
    ax.set_ylabel("normalised accuracy (%)")
    seeds = f"; mean of {len(table.seeds)} seeds, bands: 95 % intervals" if len(table.seeds) > 1 else ""
    ax.set_title(f"{UPLINKS[condition][0]}, all {len(table.tasks)} tasks{seeds}", size=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=3)
    return figure


def _against_number(table: Table, condition: str, protection: str) -> list[Cell]:
    """The cells of all numbers of tasks from 2 on; none where there is nothing but all tasks."""
    numbers = range(2, len(table.tasks) + 1)
    cells = [cell for number in numbers if (cell := table.cell(condition, protection, number=number))]
    return cells if len(cells) > 1 or len(numbers) == 1 else []


def _against_shots(table: Table, condition: str, protection: str) -> list[Cell]:
    wanted = (condition, protection, len(table.tasks))
    return [cell for cell in table.cells if (cell.condition, cell.protection, cell.number) == wanted]


def _of(cell: Cell, seed: int) -> float:
    return cell.by_seed[cell.seeds.index(seed)]


def _curve(
    ax: Axes, x: list[int], cells: list[Cell], label: str, style: dict[str, Any], *, around: str, expected: int
) -> None:
    """A line through the means, with a band of this width around where there is one."""
    if any(cell.unfinished for cell in cells) or len(cells) < expected:
        label = f"{label[:-1]}, unfinished)" if label.endswith(")") else f"{label} (unfinished)"
    means = [100 * cell.mean for cell in cells]
    # one subset has no spread; the interval of one seed is not known, and nothing is drawn there
    nothing = 0.0 if around == "spread" else float("nan")
    widths = [nothing if (width := getattr(cell, around)) is None else 100 * width for cell in cells]
    ax.plot(x, means, label=label, **({"linewidth": 1.6} | style))
    if any(width > 0 for width in widths):
        low, high = zip(*((m - w, m + w) for m, w in zip(means, widths, strict=True)), strict=True)
        ax.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _dress(ax: Axes, label: str) -> None:
    ax.set_xlabel(label)
    ax.set_ylim(bottom=0)
    ax.grid(True, color="#dddddd", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    """The whole file, or the old one."""
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")
    return path
