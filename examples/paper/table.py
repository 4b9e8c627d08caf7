"""What rows of results hold: normalised accuracies over subsets and seeds, numbers of the uplinks, what is missing.

Rows are described in `sweep`; they may be unfinished. All shares are of 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy.special import stdtrit

from rmtllmf.metrics import normalized_accuracy

from .protocol import CONDITIONS, PROTECTIONS, Protocol

Row = dict[str, Any]
Key = tuple[int, str, str, int, tuple[str, ...]]  # seed, condition, protection, shots, tasks

COSINES = ("cosine_sent", "cosine", "cosine_without_restored")
_UPLINK = "uplink"  # in place of a protection
_OF_NONE = ("base", "individual", "clean")  # conditions that no vector was sent over


@dataclass(frozen=True)
class Cell:
    """Normalised accuracies of all subsets of one `number` of tasks, under one condition and protection.

    `mean` and `interval` are of the seeds' means `by_seed`: half the width of the 95 % interval of Student's t, None
    for one seed. `spread` is the standard deviation over the subsets within a seed, None where there is one subset.
    `unfinished` are the seeds of which subsets are missing; `by_seed` of those is the mean of what there is.
    """

    condition: str
    protection: str
    shots: int
    number: int
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    mean: float
    interval: float | None
    spread: float | None
    lowest: float
    highest: float
    unfinished: tuple[int, ...]


@dataclass(frozen=True)
class Uplink:
    """Numbers of one condition, means over users and seeds; of each kind of cosines the mean matrix and the range."""

    condition: str
    seeds: tuple[int, ...]
    mse: float
    snr_db: float
    cosines: dict[str, list[list[float]]]
    ranges: dict[str, tuple[float, float]]  # smallest and largest between two vectors, in any seed


@dataclass(frozen=True)
class Table:
    """All that the rows hold; `shots` is the number of images a class where nothing else is said.

    `left_out` is the number of rows that the protocol does not ask for.
    """

    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    shots: int
    cells: tuple[Cell, ...]
    uplinks: tuple[Uplink, ...]
    missing: tuple[str, ...]
    left_out: int

    def cell(
        self, condition: str, protection: str = "unprotected", shots: int | None = None, number: int | None = None
    ) -> Cell | None:
        """By default of all tasks together and the usual number of shots; None if there is none."""
        if shots is None:
            shots = 0 if protection in ("unprotected", "restored") else self.shots
        wanted = (condition, protection, shots, len(self.tasks) if number is None else number)
        return next((c for c in self.cells if (c.condition, c.protection, c.shots, c.number) == wanted), None)

    def paired(self, *wanted: tuple[Any, ...]) -> list[float] | None:
        """The means of cells over the seeds that all of them have complete; None if there is no such seed."""
        cells = [self.cell(*arguments) for arguments in wanted]
        finished = [set(c.seeds) - set(c.unfinished) if c else set() for c in cells]
        seeds = set.intersection(*finished)
        if not seeds:
            return None
        return [mean(v for s, v in zip(c.seeds, c.by_seed, strict=True) if s in seeds) for c in cells if c]

    def differences(self, one: tuple[Any, ...], other: tuple[Any, ...]) -> list[float]:
        """One cell less another, for each seed that both have complete."""
        cells = [self.cell(*one), self.cell(*other)]
        found = [
            {s: v for s, v in zip(c.seeds, c.by_seed, strict=True) if s not in c.unfinished} if c else {} for c in cells
        ]
        return [found[0][seed] - found[1][seed] for seed in sorted(found[0].keys() & found[1].keys())]

    def conditions(self) -> list[str]:
        """The uplinks that there is anything of, in the paper's order."""
        there = {entry.condition for entry in (*self.cells, *self.uplinks)}
        return [name for name in CONDITIONS if name in there]


def tabulate(rows: Sequence[Row], protocol: Protocol | None = None) -> Table:
    """The table of the rows.

    Args:
        rows: in any order; none twice.
        protocol: tells exactly what is missing, and rows that it does not ask for are left out, because means over
            other subsets or seeds do not compare. Without it, all rows count, and every seed should have what one has.

    Raises:
        ValueError: a row twice, or of an unknown condition or protection.
    """
    found: dict[Key, Row] = {}
    for index, row in enumerate(rows):
        key = _key(row, f"rows[{index}]")
        if found.setdefault(key, row) is not row:
            raise ValueError(f"rows[{index}]: a second row of {key}; expected one")
    tasks = protocol.tasks if protocol else max((key[4] for key in found), key=len, default=())
    expected = _expected(found, tasks, protocol)
    found = {key: row for key, row in found.items() if key in expected}
    counts: dict[int, int] = defaultdict(int)
    for key in found:
        counts[key[3]] += key[3] > 0
    shots = protocol.shots if protocol else max(counts, key=lambda number: counts[number], default=0)

    individual = {key[0]: row["accuracy"] for key, row in found.items() if key[1] == "individual"}
    values: dict[tuple[Any, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    lacking: dict[tuple[Any, ...], set[int]] = defaultdict(set)
    for key in sorted(expected):  # the same last bits whatever the order of the rows
        seed, condition, protection, taken, names = key
        if condition == "individual" or protection == _UPLINK:
            continue
        group = (condition, protection, taken, len(names))
        if key in found and seed in individual:
            reference = {name: individual[seed][name] for name in names if name in individual[seed]}
            values[group][seed].append(normalized_accuracy(found[key]["accuracy"], reference))
        else:
            lacking[group].add(seed)
    conditions = ("base", "clean", *CONDITIONS)
    order = sorted(values, key=lambda g: (conditions.index(g[0]), PROTECTIONS.index(g[1]), *g[2:]))
    uplinks = {
        name: {key[0]: row["uplink"] for key, row in sorted(found.items()) if key[1:3] == (name, _UPLINK)}
        for name in CONDITIONS
    }
    return Table(
        seeds=tuple(sorted({key[0] for key in found})),
        tasks=tuple(tasks),
        shots=shots,
        cells=tuple(_cell(group, values[group], lacking[group]) for group in order),
        uplinks=tuple(_uplink(name, facts) for name, facts in uplinks.items() if facts),
        missing=tuple(_missing(expected, found.keys())),
        left_out=len(rows) - len(found),
    )


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of the mean, by Student's t; None for fewer than two values."""
    count = len(values)
    return float(stdtrit(count - 1, 0.975)) * stdev(values) / count**0.5 if count > 1 else None


def _key(row: Mapping[str, Any], where: str) -> Key:
    if "uplink" in row:
        key: Key = (row["seed"], row["condition"], _UPLINK, 0, ())
    else:
        key = (row["seed"], row["condition"], row["protection"], row["shots"], tuple(row["tasks"]))
    if key[1] not in (*_OF_NONE, *CONDITIONS) or key[2] not in (*PROTECTIONS, _UPLINK):
        raise ValueError(f"{where}: unknown condition {key[1]!r} or protection {key[2]!r}")
    return key


def _expected(found: Iterable[Key], tasks: tuple[str, ...], protocol: Protocol | None) -> set[Key]:
    """The keys of all rows that there should be."""
    if protocol:
        from .sweep import jobs_of  # it loads models and tasks

        jobs = ((j, j.protection == _UPLINK) for j in jobs_of(protocol))
        named = ((j, () if up else tuple(tasks[index] for index in j.subset)) for j, up in jobs)
        return {(j.seed, j.condition, j.protection, j.shots, names) for j, names in named}
    found = list(found)
    series = {key[1:4] for key in found}
    subsets = {key[4] for key in found if key[4]}
    of_subsets = {key[1:4] for key in found if 0 < len(key[4]) < len(tasks)} | {("clean", "unprotected", 0)}
    sent = {condition for condition, *_ in series if condition not in _OF_NONE}
    series |= {(name, "unprotected", 0) for name in _OF_NONE} | {(name, _UPLINK, 0) for name in sent}
    return {
        (seed, *one, names)
        for seed in {key[0] for key in found}
        for one in series
        for names in ([()] if one[1] == _UPLINK else subsets if one in of_subsets else [tasks])
    }


def _missing(expected: set[Key], found: Set[Key]) -> list[str]:
    """One line for each seed, uplink, protection or number of shots that rows are missing of; the widest one."""
    lines: list[str] = []

    def look(keys: set[Key], depth: int) -> None:
        """`keys` agree in as many of their parts as `depth` says."""
        if depth and (depth == 4 or not keys & found):
            say(keys, depth)
            return
        groups: dict[Any, set[Key]] = defaultdict(set)
        for key in sorted(keys):
            groups[key[depth]].add(key)
        if depth == 3:  # numbers of shots of which there is nothing, in one line
            gone = [shots for shots, group in groups.items() if not group & found]
            if gone:
                say({key for shots in gone for key in groups.pop(shots)}, 4)
        for group in groups.values():
            if not group <= found:
                look(group, depth + 1)

    def say(keys: set[Key], depth: int) -> None:
        seed, condition, protection, *_ = min(keys)
        shots = sorted({key[3] for key in keys})
        taken = [f"{', '.join(map(str, shots))} shot{'s' * (shots != [1])}"] if any(shots) else []
        what = f"{len(keys - found)} of {len(keys)} rows" if keys & found else "everything"
        note = "; nothing of this seed can be normalised" if condition == "individual" and depth > 1 else ""
        lines.append(f"{', '.join([f'seed {seed}', condition, protection, *taken][:depth])}: {what}{note}")

    look(expected, 0)
    return lines


def _cell(group: tuple[Any, ...], values: Mapping[int, Sequence[float]], lacking: set[int]) -> Cell:
    seeds = sorted(values)
    every = [values[seed] for seed in seeds]
    means = [mean(found) for found in every]
    free = sum(len(found) - 1 for found in every)
    squares = sum((value - centre) ** 2 for found, centre in zip(every, means, strict=True) for value in found)
    return Cell(
        *group,
        seeds=tuple(seeds),
        by_seed=tuple(means),
        mean=mean(means),
        interval=half_width(means),
        spread=(squares / free) ** 0.5 if free else None,
        lowest=min(map(min, every)),
        highest=max(map(max, every)),
        unfinished=tuple(sorted(lacking)),
    )


def _uplink(condition: str, facts: Mapping[int, Mapping[str, Any]]) -> Uplink:
    every = list(facts.values())
    stacks = {kind: np.array([fact[kind] for fact in every], dtype=float) for kind in COSINES}
    between = {kind: stack[:, ~np.eye(stack.shape[1], dtype=bool)] for kind, stack in stacks.items()}
    return Uplink(
        condition,
        tuple(facts),
        mse=mean(mean(fact["mse"]) for fact in every),
        snr_db=mean(mean(fact["snr_db"]) for fact in every),
        cosines={kind: stack.mean(0).tolist() for kind, stack in stacks.items()},
        ranges={kind: (float(pairs.min()), float(pairs.max())) for kind, pairs in between.items()},
    )
