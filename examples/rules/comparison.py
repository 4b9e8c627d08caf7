"""Every rule on every uplink, with what was received and with estimates of what was sent."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from torch import nn

from paper.results import Row
from paper.world import World
from rmtllmf.errors import NonFiniteError
from rmtllmf.metrics import snr_db
from rmtllmf.resilience import search_scale
from rmtllmf.taskvec import TaskVector

from .candidates import CANDIDATES, Update
from .held import UPLINKS, Held

BOUNDS = ("individual", "base")
SCALES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # times the rule's own


def key_of(row: Row) -> str:
    """The key of the job that gave a row."""
    return "/".join([str(row["seed"]), row["rule"], row["uplink"], "shrunk" if row["shrunk"] else "as received"])


class Comparison:
    """Runs jobs, each of which is one fusion."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.held = lru_cache(maxsize=1)(lambda seed: Held(world, world.protocol, seed))
        self.fused = lru_cache(maxsize=1)(self._fused)  # the clean one, to which the others are compared

    def jobs(self, seeds: Sequence[int], rules: Sequence[str] = ()) -> list[tuple[str, partial[Row]]]:
        """All of them, those of one rule one after the other."""
        found = []
        for seed in seeds:
            rows: list[tuple[str, str, bool]] = [(name, "", False) for name in BOUNDS]
            for rule in rules or CANDIDATES:
                rows.append((rule, "clean", False))
                rows += [(rule, uplink, shrunk) for uplink in UPLINKS[1:] for shrunk in (False, True)]
            for rule, uplink, shrunk in rows:
                row = {"seed": seed, "rule": rule, "uplink": uplink, "shrunk": shrunk}
                found.append((key_of(row), partial(self.run, row)))
        return found

    def run(self, row: Row) -> Row:
        """The row with accuracies on all tasks, by the rule's own scale and by the one that a few samples choose."""
        held = self.held(row["seed"])
        if row["rule"] in BOUNDS:
            own = row["rule"] == "individual"
            models = [held.model(vector if own else None) for vector in held.stage.sent]
            return row | {"accuracy": self._accuracies(held, models)}
        try:
            fused, seconds = self._fused(row["seed"], row["rule"], row["uplink"], row["shrunk"])
        except NonFiniteError as error:
            return row | {"refused": str(error)}
        row = row | {"seconds": seconds}
        if isinstance(fused, nn.Module):
            return row | {"accuracy": self._accuracies(held, [fused])}
        updates = [fused] if isinstance(fused, Mapping) else list(fused)
        row["accuracy"] = self._accuracies(held, [held.model(update) for update in updates])
        if row["uplink"] != "clean":
            row["snr"] = self._snr(row["seed"], row["rule"], updates)
        if len(updates) == 1:
            found = search_scale(held.model(), self.world.base, updates[0], held.few(), scales=SCALES, refinements=0)
            scaled = held.model(TaskVector(updates[0]) * found.scale)
            row |= {"scale": found.scale, "searched": self._accuracies(held, [scaled])}
        return row

    def _fused(self, seed: int, rule: str, uplink: str, shrunk: bool) -> tuple[Any, float]:
        """What the rule makes of the vectors, and the seconds that took."""
        held = self.held(seed)
        vectors = held.vectors(uplink, shrunk)
        start = time.perf_counter()
        fused = CANDIDATES[rule].fuse(held, vectors)
        return fused, time.perf_counter() - start

    def _snr(self, seed: int, rule: str, updates: Sequence[Update]) -> float:
        """Of the updates, whose errors are their differences to the clean fusion's; the mean over tasks in dB."""
        clean, _ = self.fused(seed, rule, "clean", False)
        expected = [clean] if isinstance(clean, Mapping) else clean
        return statistics.fmean(snr_db(a, b) for a, b in zip(expected, updates, strict=True))

    def _accuracies(self, held: Held, models: Sequence[nn.Module]) -> dict[str, float]:
        """Of the one model on every task, or of each task's own."""
        tasks = self.world.protocol.tasks
        each = models if len(models) == len(tasks) else [models[0]] * len(tasks)
        return {task: held.accuracy(model, task) for task, model in zip(tasks, each, strict=True)}
