"""From rows to the table and its figure: normalised accuracies, means over seeds with 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from .conditions import BLACK_BOX, KINDS
from .methods import BOUNDS, CODES, MAIN, METHODS, REALIGNMENTS

Row = dict[str, Any]
TITLES = {"black_box": "Black box (white noise)", "link": "Whole link (by peak, unaware, or as said)"}
GROUPS = {
    "": MAIN,
    "other realignments of the same estimate": REALIGNMENTS,
    "codes in place of the vectors, at equal channel uses": CODES,
}
DIFFERENCES = (
    ("protect", "base"),
    ("protect", "R-MTLLMF"),
    ("protect, 10 shots", "R-MTLLMF"),
    ("protect, 10 shots", "base realigned"),
    *((name, "shrink, realigned") for name in REALIGNMENTS),
)


def normalised(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[int, float]]:
    """(kind, condition, method) -> seed -> the mean over tasks of accuracy relative to the task's own model, in %."""
    rows = list(rows)
    own = {row["seed"]: row["accuracy"] for row in rows if row["method"] == "individual"}
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        reference = own.get(row["seed"])
        if reference is not None:
            ratios = [row["accuracy"][task] / reference[task] for task in reference]
            key = (row["kind"], row["condition"], row["method"])
            found.setdefault(key, {})[row["seed"]] = 100 * statistics.fmean(ratios)
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; infinite for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def formatted(rows: Sequence[Row]) -> str:
    """All tables as text."""
    found = normalised(rows)
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"normalised accuracy, %: mean over seeds {seeds} and half the width of its 95 % interval;",
        "in brackets how many seeds there are, where not all",
        "",
    ]
    for name in BOUNDS:
        lines.append(_line(name, [cell(found.get(("bound", "", name)), seeds)]))
    for kind in KINDS:
        lines += ["", _line(TITLES[kind], [_heading(kind, condition) for condition in BLACK_BOX])]
        for title, group in GROUPS.items():
            of_kind = {name: method for name, method in group.items() if kind in method.kinds}
            tried = any((kind, condition, name) in found for name in of_kind for condition in BLACK_BOX)
            lines += [f"{title}:"] if title and tried else []
            for name, method in of_kind.items():
                label = "  " * bool(title) + name + ("" if method.data else " (no data)")
                of_method = [found.get((kind, condition, name)) for condition in BLACK_BOX]
                if any(of_method):
                    lines.append(_line(label, [cell(values, seeds) for values in of_method]))
        lines.append("differences, seed by seed:")
        for name, other in DIFFERENCES:
            apart = [_minus(found, (kind, condition, name), other) for condition in BLACK_BOX]
            if any(apart):
                lines.append(_line(f"  {name} - {other}", [cell(values, seeds) for values in apart]))
    return "\n".join(lines)


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:50}" + "".join(f"{cell:>16}" for cell in cells)


def _minus(
    found: dict[tuple[str, str, str], dict[int, float]], key: tuple[str, str, str], other: str
) -> dict[int, float]:
    """Seed -> difference to another method under the same condition, or to a bound."""
    kind, condition, _ = key
    reference = found.get((kind, condition, other)) or found.get(("bound", "", other)) or {}
    return {seed: value - reference[seed] for seed, value in found.get(key, {}).items() if seed in reference}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The table as two pictures: the methods, and variants of their parts beside what these are variants of."""
    compared = ["unprotected", "shrink", "shrink, realigned"]
    variants = [name for name in METHODS if name in {*compared, *REALIGNMENTS, *CODES}]
    return [
        _dots(rows, list(MAIN), folder / "protection.png", 9.0),
        _dots(rows, variants, folder / "variants.png", 6.5),
    ]


def _dots(rows: Sequence[Row], chosen: Sequence[str], path: Path, height: float) -> Path:
    """A dot a method with its interval, bounds as lines."""
    import matplotlib.pyplot as plt

    found = normalised(rows)
    named = {kind: [name for name in reversed(chosen) if kind in METHODS[name].kinds] for kind in KINDS}
    ratios = [max(1, len(names)) for names in named.values()]
    figure, axes = plt.subplots(
        2, 3, figsize=(13, height), sharex=True, layout="constrained", gridspec_kw={"height_ratios": ratios}
    )
    for i, (kind, names) in enumerate(named.items()):
        for ax, condition in zip(axes[i], BLACK_BOX, strict=True):
            for y, name in enumerate(names):
                values = list(found.get((kind, condition, name), {}).values())
                if values:
                    mean, half = interval(values)
                    colour = "tab:blue" if METHODS[name].data else "tab:orange"
                    ax.errorbar(mean, y, xerr=half if math.isfinite(half) else None, fmt="o", color=colour, capsize=3)
            for name, style in (("base", ":"), ("base realigned", "-."), ("clean", "--"), ("clean realigned", "-")):
                values = list(found.get(("bound", "", name), {}).values())
                if values:
                    ax.axvline(statistics.fmean(values), color="grey", linestyle=style, label=name)
            ax.set_yticks(range(len(names)), names if condition == "ideal" else [""] * len(names))
            ax.set_title(_heading(kind, condition))
            ax.set_xlim(0, 100)
            ax.grid(axis="x", alpha=0.3)
        axes[i][1].set_xlabel("normalised accuracy (%)")
    axes[0][0].errorbar([], [], fmt="o", color="tab:orange", label="no data")
    axes[0][0].errorbar([], [], fmt="o", color="tab:blue", label="10 shots a class")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _heading(kind: str, condition: str) -> str:
    name = condition.replace("_", " ")
    return f"{BLACK_BOX[condition]:g} dB" if kind == "black_box" else name


def cell(values: dict[int, float] | None, seeds: Sequence[int]) -> str:
    """Mean and interval, and the number of seeds where it is not that of all."""
    if not values:
        return "-"
    mean, half = interval(list(values.values()))
    some = f" [{len(values)}]" if len(values) < len(seeds) else ""
    return f"{mean:.1f}" + (f" ± {half:.1f}" if math.isfinite(half) else "") + some
