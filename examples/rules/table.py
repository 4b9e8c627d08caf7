"""From rows to the tables: normalised accuracies, means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from paper.results import Row

from .candidates import CANDIDATES
from .held import UPLINKS

Found = dict[tuple[str, str, bool], list[float]]
COLUMNS = [("clean", False), *((uplink, shrunk) for shrunk in (False, True) for uplink in UPLINKS[1:])]


def normalised(rows: Iterable[Row], which: str) -> Found:
    """(rule, uplink, shrunk) -> for each seed the mean of accuracies relative to the task's own model, in %."""
    rows = list(rows)
    own = {row["seed"]: row["accuracy"] for row in rows if row["rule"] == "individual"}
    found: Found = {}
    for row in rows:
        accuracy: Mapping[str, float] | None = row.get(which)
        if accuracy is not None and row["seed"] in own:
            ratios = [accuracy[task] / own[row["seed"]][task] for task in accuracy]
            key = (row["rule"], row["uplink"], row["shrunk"])
            found.setdefault(key, []).append(100 * statistics.fmean(ratios))
    return found


def formatted(rows: Sequence[Row]) -> str:
    """All tables as text."""
    seeds = sorted({row["seed"] for row in rows})
    base = normalised(rows, "accuracy").get(("base", "", False))
    lines = [f"normalised accuracy, %, mean over seeds {seeds}; the base model has {_mean(base)}"]
    for which, title in (("accuracy", "by the rule's own scale"), ("searched", "by the best of eight scales")):
        found = normalised(rows, which)
        lines += [
            "",
            f"{title:40}{'as received':>28}{'posterior means':>30}",
            _line("", [_title(u) for u, _ in COLUMNS]),
        ]
        for rule, candidate in CANDIDATES.items():
            label = rule + (f" ({candidate.needs})" if candidate.needs else "")
            cells = [_mean(found.get((rule, *column))) for column in COLUMNS]
            if set(cells) != {"-"}:
                lines.append(_line(label, cells))
    received = [column for column in COLUMNS if column[0] != "clean" and not column[1]]
    lines += ["", "signal-to-noise ratio of the update as received, dB; seconds of the clean fusion"]
    lines.append(_line("", [*(_title(uplink) for uplink, _ in received), "seconds"]))
    for rule in CANDIDATES:
        mine = [row for row in rows if row["rule"] == rule]
        snr = [_mean([r["snr"] for r in mine if (r["uplink"], r["shrunk"]) == c and "snr" in r]) for c in received]
        seconds = [row["seconds"] for row in mine if row["uplink"] == "clean" and "seconds" in row]
        if seconds:
            lines.append(_line(rule, [*snr, f"{statistics.median(seconds):.2f}"]))
    return "\n".join(lines)


def _title(uplink: str) -> str:
    return {"strongest_user": "user", "sum_rate": "sum"}.get(uplink, uplink)


def _mean(values: Sequence[float] | None) -> str:
    return f"{statistics.fmean(values):.1f}" if values else "-"


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:32}" + "".join(f"{cell:>9}" for cell in cells)
