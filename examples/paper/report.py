"""The report of rows of results: the tables of the paper's section IV and what became of its claims, text and JSON.

An unfinished file gives what there is: a mean over fewer seeds or subsets than there should be carries a star, and what
is missing is listed. Rows are described in `sweep`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from .claims import claims
from .protocol import CONDITIONS, PROTECTIONS, Protocol
from .table import COSINES, Cell, Row, Table, half_width, tabulate

__all__ = ["as_json", "claims", "formatted", "tabulate"]

LABELS = {
    "base": "base model, untouched",
    "clean": "clean fusion, no noise",
    "both": "restored and realigned",
    "attention": "restored, attention realigned",
} | {name: name.replace("_", " ") for name in (*CONDITIONS, "unprotected", "restored", "realigned")}
PAPER_MSE = {"ideal": 0.013, "strongest_user": 0.16, "sum_rate": 0.21}
PAPER_SNR = {"ideal": -16.2, "strongest_user": -21.7, "sum_rate": -27.3}  # dB


def as_json(rows: Sequence[Row], protocol: Protocol | None = None) -> dict[str, Any]:
    """The table and the claims as JSON values."""
    value = asdict(tabulate(rows, protocol)) | {"claims": [asdict(claim) for claim in claims(rows, protocol)]}
    return json.loads(json.dumps(value, allow_nan=False))


def formatted(rows: Sequence[Row], protocol: Protocol | None = None) -> str:
    """The whole report as text: four tables, the claims, and what is missing."""
    table = tabulate(rows, protocol)
    seeds = ", ".join(map(str, table.seeds)) or "none"
    left = f" ({table.left_out} that the protocol does not ask for are left out)" if table.left_out else ""
    parts = [f"{len(rows)} rows{left}; seeds: {seeds}; tasks: {', '.join(table.tasks) or 'none'}"]
    parts += [make(table) for make in (protections_table, numbers_table, uplinks_table, shots_table)]
    parts.append("\n".join(["claims of the paper", *map(str, claims(rows, protocol))]))
    if table.missing:
        parts.append("\n".join(["missing", *(f"  {line}" for line in table.missing)]))
    if any(cell.unfinished for cell in table.cells):
        parts.append("* a mean over fewer seeds or subsets than there should be")
    return "\n\n".join(part for part in parts if part)


def protections_table(table: Table) -> str:
    """All tasks together: protections down, uplinks across; ± is the 95 % interval over the seeds."""
    several = ", ± 95 % interval over the seeds" if len(table.seeds) > 1 else ""
    head = f"normalised accuracy of all {len(table.tasks)} tasks together, %{several}"
    names = table.conditions()
    there = [name for name in PROTECTIONS if any(table.cell(condition, name) for condition in names)]
    lines = [(LABELS[name], [_text(table.cell(condition, name), "interval") for condition in names]) for name in there]
    lines += [(LABELS[name], [_text(table.cell(name), "interval")]) for name in ("base", "clean") if table.cell(name)]
    apart = [table.differences((condition, "both"), ("base",)) for condition in names]
    if any(apart):
        lines.append(("both less the base, seed by seed", [_mean(values) for values in apart]))
    return _grid(head, [LABELS[name] for name in names], lines, 17)


def numbers_table(table: Table) -> str:
    """Against the number of tasks; ± is the standard deviation over the subsets."""
    head = "normalised accuracy against the number of tasks, %, ± standard deviation over the subsets"
    sizes = range(2, len(table.tasks) + 1)
    series = [("clean", "unprotected"), *((c, p) for c in table.conditions() for p in PROTECTIONS)]
    lines = []
    for condition, protection in series:
        cells = [table.cell(condition, protection, number=size) for size in sizes]
        if any(cells[:-1]):
            label = LABELS[condition] if condition == "clean" else f"{LABELS[condition]}, {LABELS[protection]}"
            lines.append((label, [_text(cell, "spread") for cell in cells]))
    return _grid(head, list(map(str, sizes)), lines, 13)


def uplinks_table(table: Table) -> str:
    """Mean squared errors and signal-to-noise ratios beside the paper's, and ranges of cosines."""
    heads = ["MSE", "paper", "SNR, dB", "paper", "cosines: sent", "received", "not restored"]
    lines = []
    for up in table.uplinks:
        numbers = [
            f"{up.mse:.3f}",
            f"{PAPER_MSE.get(up.condition, '-')}",
            f"{up.snr_db:.1f}",
            f"{PAPER_SNR.get(up.condition, '-')}",
        ]
        ranges = [f"{low + 0.0:.2f} to {high + 0.0:.2f}" for low, high in (up.ranges[kind] for kind in COSINES)]
        lines.append((LABELS[up.condition], numbers + ranges))
    return _grid("uplinks, means over users and seeds", heads, lines, 16)


def shots_table(table: Table) -> str:
    """All tasks together: protections down, images a class across; of uplinks with several numbers of them."""
    parts = []
    for condition in table.conditions():
        cells = [c for c in table.cells if c.condition == condition and c.number == len(table.tasks)]
        shots = sorted({cell.shots for cell in cells})
        if len([number for number in shots if number]) < 2:
            continue
        there = [name for name in PROTECTIONS if any(cell.protection == name for cell in cells)]
        lines = [(LABELS[n], [_text(table.cell(condition, n, k), "interval") for k in shots]) for n in there]
        head = f"the same against images a class, {LABELS[condition]}"
        parts.append(_grid(head, list(map(str, shots)), lines, 13))
    return "\n\n".join(parts)


def _text(cell: Cell | None, around: str) -> str:
    if cell is None:
        return "-"
    width = getattr(cell, around)
    return f"{100 * cell.mean:.1f}{'' if width is None else f' ± {100 * width:.1f}'}{'*' if cell.unfinished else ''}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    width = half_width(values)
    return f"{100 * mean(values):.1f}{'' if width is None else f' ± {100 * width:.1f}'}"


def _grid(head: str, columns: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]], width: int) -> str:
    """Lines of a label and texts; nothing where there are no lines."""
    if not lines:
        return ""
    margin = max(len(label) for label, _ in lines) + 1
    body = [label.ljust(margin) + "".join(text.rjust(width) for text in texts) for label, texts in lines]
    return "\n".join([head, " " * margin + "".join(name.rjust(width) for name in columns), *body])
