"""From rows about liars to their table: normalised accuracies of the honest users' tasks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from paper.results import Row

from .defences import DEFENCES
from .hostile import ALONE, COUNTS, NOBODY
from .liars import ATTACKS, UPLINKS, honest_of, liars_of
from .table import cell

Cells = dict[tuple[str, str, int, str], dict[int, float]]


def over_the_honest(rows: Iterable[Row], count: int, tasks: Sequence[str]) -> Cells:
    """(uplink, attack, liars, fusion) -> seed -> mean of accuracies relative to the task's own model, in %.

    Over the tasks of those users who are honest when `count` lie, also where nobody does, so that rows compare.
    """
    rows = list(rows)
    own = {row["seed"]: row["accuracy"] for row in rows if row["fusion"] == "individual"}
    found: Cells = {}
    for row in rows:
        if "accuracy" in row and row["fusion"] != "individual" and row["count"] in (0, count) and row["seed"] in own:
            liars = liars_of(row["seed"], count, len(tasks))
            kept = [tasks[user] for user in honest_of(liars, len(tasks))]
            ratios = [row["accuracy"][task] / own[row["seed"]][task] for task in kept]
            found.setdefault(_key(row), {})[row["seed"]] = 100 * statistics.fmean(ratios)
    return found


def formatted(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """All tables as text."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "normalised accuracy, %, over the tasks of the users who are honest in that table, also where nobody lies:",
        f"mean over seeds {seeds} and half the width of its 95 % interval; below, how many users were left out,",
        "liars + honest, a seed on average; in brackets how many seeds there are, where not all",
    ]
    for uplink in UPLINKS:
        for count in COUNTS:
            found = over_the_honest(rows, count, tasks)
            if not any(key[0] == uplink and key[2] == count for key in found):
                continue
            title = f"{uplink}, {count} of {len(tasks)} {'lies' if count == 1 else 'lie'}"
            lines += ["", _line(title, (NOBODY, *ATTACKS))]
            lines.append(_line(ALONE, [cell(found.get((uplink, ALONE, count, "task arithmetic")), seeds)]))
            for fusion in DEFENCES:
                keys = [(uplink, NOBODY, 0, fusion), *((uplink, attack, count, fusion) for attack in ATTACKS)]
                some = [[row for row in rows if _key(row) == key] for key in keys]
                refused = [any("refused" in row for row in each) for each in some]
                cells = [
                    "refused" if no else cell(found.get(key), seeds) for key, no in zip(keys, refused, strict=True)
                ]
                lines.append(_line(fusion, cells))
                who = [_left_out(each) for each in some]
                if any(who):
                    lines.append(_line("  left out", who))
    return "\n".join(lines)


def _key(row: Row) -> tuple[str, str, int, str]:
    return row["uplink"], row["attack"], row["count"], row["fusion"]


def _left_out(rows: Sequence[Row]) -> str:
    told = [row for row in rows if row.get("left_out") is not None]
    if not told:
        return ""
    right = statistics.fmean(len(set(row["left_out"]) & set(row["liars"])) for row in told)
    wrong = statistics.fmean(len(set(row["left_out"]) - set(row["liars"])) for row in told)
    return f"{right:g} + {wrong:g}"


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:24}" + "".join(f"{text:>16}" for text in cells)
