"""The claims of the paper's section IV, and whether rows of results bear them out.

Everything measured comes from the rows. The paper says little about how its words are to be decided; each claim tells
how it was decided here. Fusions are of all tasks together with the usual number of shots where nothing else is said,
and two numbers are compared over the seeds that have both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import fill

import numpy as np

from .protocol import Protocol
from .table import Row, Table, tabulate

ATTACKS = ("strongest_user", "sum_rate")
UPLINKS = ("ideal", *ATTACKS)
CLOSE = 0.05  # of normalised accuracy
FAR = 0.2
SIMILAR = 0.03  # twice what lies between 54.8 and 53.3 %
LITTLE = 0.02
LEVEL = 0.0025  # a task more changes the normalised accuracy by no more than this, on average
ENOUGH = 10  # shots


@dataclass(frozen=True)
class Claim:
    """One claim: in the paper's words and numbers, when it holds, what was measured, and if it holds.

    Where the rows do not tell, `holds` is None and `measured` says what there is, if anything.
    """

    text: str
    paper: str
    decided: str
    measured: str
    holds: bool | None

    def __str__(self) -> str:
        verdict = {True: "holds", False: "fails", None: "open"}[self.holds]
        lines = [
            f"  {verdict}  {self.text}",
            f"         paper: {self.paper}; here: {self.measured or 'not in these rows'}",
            f"         holds if {self.decided}",
        ]
        return "\n".join(fill(line, 120, subsequent_indent=" " * 11) for line in lines)


def claims(rows: Sequence[Row], protocol: Protocol | None = None) -> list[Claim]:
    """All claims, in the paper's order; `protocol` as in `table.tabulate`."""
    table = tabulate(rows, protocol)
    makers = (
        _near_the_baseline,
        _far_under_attack,
        _attacks_alike,
        _times_better,
        _poor_when_unprotected,
        _better_than_the_base,
        _not_increasing,
        _increasing,
        _cosines_protected,
        _cosines_attacked,
        _parts_alone,
        _ordered,
        _few_shots,
    )
    return [make(table) for make in makers]


def _near_the_baseline(table: Table) -> Claim:
    found = table.paired(("ideal", "both"), ("clean",))
    return Claim(
        "protected, the ideal uplink comes close to fusion without noise",
        "89.1 % against 91.2 %",
        f"it is at most {_points(CLOSE)} below",
        f"{_percent(found[0])} against {_percent(found[1])}" if found else "",
        found[1] - found[0] <= CLOSE if found else None,
    )


def _far_under_attack(table: Table) -> Claim:
    found = {name: table.paired((name, "both"), ("clean",)) for name in ATTACKS}
    return Claim(
        "protected, both attacks stay far below fusion without noise",
        "strongest user 54.8 %, sum rate 53.3 % against 91.2 %",
        f"both are at least {_points(FAR)} below",
        "; ".join(f"{_name(n)} {_percent(f[0])} against {_percent(f[1])}" for n, f in found.items() if f),
        _every(f[1] - f[0] >= FAR if f else None for f in found.values()),
    )


def _attacks_alike(table: Table) -> Claim:
    found = table.paired(*((name, "both") for name in ATTACKS))
    return Claim(
        "protected, the sum-rate attack does as much harm as that on the strongest user",
        "53.3 % and 54.8 %",
        f"they are at most {_points(SIMILAR)} apart",
        f"{_percent(found[1])} and {_percent(found[0])}" if found else "",
        abs(found[1] - found[0]) <= SIMILAR if found else None,
    )


def _times_better(table: Table) -> Claim:
    found = {name: table.paired((name, "both"), (name,)) for name in ATTACKS}
    ratios = {name: f[0] / f[1] if f[1] else float("inf") for name, f in found.items() if f}
    shown = [f"{_name(n)} {r:.1f} ({_percent(found[n][0])} / {_percent(found[n][1])})" for n, r in ratios.items()]  # type: ignore[index]
    return Claim(
        "under attack, the protected fusion is many times as good as the unprotected one",
        "9 to 14 times (unprotected 4 to 6 %)",
        "both ratios, rounded, are from 9 to 14",
        "; ".join(shown),
        _every(8.5 <= ratios[name] < 14.5 if name in ratios else None for name in ATTACKS),
    )


def _poor_when_unprotected(table: Table) -> Claim:
    found = table.paired(("ideal",), ("base",))
    return Claim(
        "unprotected, even the ideal uplink gives a poor fusion",
        "36.3 % (the base is not given)",
        "it is worse than the untouched base, which needs no uplink",
        f"{_percent(found[0])}, base {_percent(found[1])}" if found else "",
        found[0] < found[1] if found else None,
    )


def _better_than_the_base(table: Table) -> Claim:
    found = {name: table.paired((name, "both"), ("base",)) for name in ATTACKS}
    return Claim(
        "under attack, the protected fusion is worth more than the untouched base (implied, not said)",
        "54.8 % and 53.3 % (the base is not given)",
        "both are better than the base",
        "; ".join(f"{_name(n)} {_percent(f[0])}, base {_percent(f[1])}" for n, f in found.items() if f),
        _every(f[0] > f[1] if f else None for f in found.values()),
    )


def _not_increasing(table: Table) -> Claim:
    series = [(name, way) for name in UPLINKS for way in ("unprotected", "both") if (name, way) != ("ideal", "both")]
    found = {one: _slope(table, *one) for one in series}
    return Claim(
        "accuracies do not increase with the number of tasks, except protected on the ideal uplink",
        "no numbers",
        f"of a straight line through each of the other five curves, the slope is at most {_slope_text(LEVEL)}",
        "; ".join(f"{_name(n)}, {way} {_slope_text(s)}" for (n, way), s in found.items() if s is not None),
        _every(None if s is None else s <= LEVEL for s in found.values()),
    )


def _increasing(table: Table) -> Claim:
    slope = _slope(table, "ideal", "both")
    return Claim(
        "protected on the ideal uplink, accuracy increases with the number of tasks",
        "no numbers",
        f"the slope of a straight line through the curve is above {_slope_text(LEVEL)}",
        "" if slope is None else _slope_text(slope),
        None if slope is None else slope > LEVEL,
    )


def _cosines_protected(table: Table) -> Claim:
    found = next((up.ranges["cosine_without_restored"] for up in table.uplinks if up.condition == "ideal"), None)
    return Claim(
        "protected on the ideal uplink (without the restored embeddings), task vectors stay nearly orthogonal",
        "cosines of at most 0.24",
        "the largest one, rounded, is at most 0.24",
        f"at most {found[1]:.2f}" if found else "",
        round(found[1], 2) <= 0.24 if found else None,
    )


def _cosines_attacked(table: Table) -> Claim:
    found = next((up.ranges["cosine"] for up in table.uplinks if up.condition == "sum_rate"), None)
    return Claim(
        "unprotected, the sum-rate attack makes task vectors similar",
        "cosines between 0.48 and 0.52",
        "all, rounded, are from 0.48 to 0.52",
        f"between {found[0] + 0.0:.2f} and {found[1] + 0.0:.2f}" if found else "",
        round(found[0], 2) >= 0.48 and round(found[1], 2) <= 0.52 if found else None,
    )


def _parts_alone(table: Table) -> Claim:
    found = {part: table.paired(("ideal", part), ("ideal", "both")) for part in ("restored", "realigned")}
    worse = {part: 1 - f[0] / f[1] for part, f in found.items() if f and f[1]}
    return Claim(
        "on the ideal uplink, each part of the protection alone is much worse than both",
        "21 to 53 % worse",
        "1 - part / both, rounded, is from 21 to 53 % for both parts",
        "; ".join(
            f"{part} {_percent(w)} ({_percent(found[part][0])} / {_percent(found[part][1])})"  # type: ignore[index]
            for part, w in worse.items()
        ),
        _every(0.205 <= worse[part] < 0.535 if part in worse else None for part in found),
    )


def _ordered(table: Table) -> Claim:
    ways = ("unprotected", "restored", "realigned", "both")
    pairs = [(name, *pair) for name in UPLINKS for pair in ((0, 1), (0, 2), (1, 3), (2, 3))]
    found = [table.paired((name, ways[low]), (name, ways[high])) for name, low, high in pairs]
    broken = [
        f"{_name(name)}: {ways[low]} {_percent(f[0])}, {ways[high]} {_percent(f[1])}"
        for (name, low, high), f in zip(pairs, found, strict=True)
        if f and f[0] >= f[1]
    ]
    compared = sum(f is not None for f in found)
    return Claim(
        "on every uplink, the unprotected fusion is worse than with either part alone, and that than both",
        "in figure 5, of the ideal uplink",
        f"all {len(pairs)} comparisons come out so",
        "; ".join(broken) or (f"{compared} of {len(pairs)} comparisons come out so" if compared else ""),
        _every(f[0] < f[1] if f else None for f in found),
    )


def _few_shots(table: Table) -> Claim:
    shots = {c.shots for c in table.cells if (c.condition, c.protection) == ("ideal", "both") and c.shots}
    most = max(shots, default=0)
    found = table.paired(("ideal", "both", ENOUGH), ("ideal", "both", most)) if most > ENOUGH else None
    fewest = (
        table.paired(("ideal", "both", min(shots)), ("ideal", "both", ENOUGH))
        if min(shots, default=ENOUGH) < ENOUGH
        else None
    )
    before = f", {_signed(fewest[1] - fewest[0])} from {min(shots)} to {ENOUGH}" if found and fewest else ""
    return Claim(
        "protected on the ideal uplink, more than 10 shots a class bring little",
        "diminishing returns beyond 10 (no numbers)",
        f"the most shots gain at most {_points(LITTLE)} over {ENOUGH}",
        f"{_signed(found[1] - found[0])} from {ENOUGH} to {most}{before}" if found else "",
        found[1] - found[0] <= LITTLE if found else None,
    )


def _slope(table: Table, condition: str, protection: str) -> float | None:
    """Of a straight line (least squares) through the means of 2 ... N tasks; None if one is unfinished, or N < 4."""
    sizes = range(2, len(table.tasks) + 1)
    found = table.paired(*((condition, protection, None, size) for size in sizes)) if len(sizes) > 2 else None
    return float(np.polyfit(np.array(sizes), found, 1)[0]) if found else None


def _every(flags: Iterable[bool | None]) -> bool | None:
    """False if any is; None if one is not known and the others are true."""
    flags = list(flags)
    if False in flags:
        return False
    return None if None in flags else True


def _name(condition: str) -> str:
    return condition.replace("_", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:g} points"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} points"


def _slope_text(slope: float) -> str:
    return f"{100 * slope:+.2f} points a task"
