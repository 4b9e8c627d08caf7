"""What liars among the users cost, with and without defences: the fusions that are tried."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

from paper.results import Row
from paper.world import World, applied
from rmtllmf.errors import NonFiniteError
from rmtllmf.taskvec import task_arithmetic

from .defences import DEFENCES
from .liars import ATTACKS, UPLINKS, heard_from, liars_of, without
from .stage import Stage

COUNTS = (1, 2)  # of liars
NOBODY, ALONE = "nobody lies", "liars kept out"


def key_of(row: Row) -> str:
    """The key of the job that gave a row."""
    return "/".join(str(row[name]) for name in ("seed", "uplink", "attack", "count", "fusion"))


class Hostile:
    """Runs jobs, each of which is one fusion of what honest users and liars sent."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stage = lru_cache(maxsize=1)(lambda seed: Stage(world, world.protocol, seed))

    def jobs(self, seeds: Sequence[int]) -> list[tuple[str, partial[Row]]]:
        """All of them; every seed has its own liars."""
        users, found = len(self.world.protocol.tasks), []
        for seed in seeds:
            rows: list[tuple[str, str, int, str]] = [("", "", 0, "individual")]
            for uplink in UPLINKS:
                rows += [(uplink, NOBODY, 0, fusion) for fusion in DEFENCES]
                for count in COUNTS:
                    rows.append((uplink, ALONE, count, "task arithmetic"))
                    rows += [(uplink, attack, count, fusion) for attack in ATTACKS for fusion in DEFENCES]
            for uplink, attack, count, fusion in rows:
                liars = liars_of(seed, count, users) if count else []
                row = {"seed": seed, "uplink": uplink, "attack": attack, "count": count, "fusion": fusion}
                row |= {"liars": liars}
                found.append((key_of(row), partial(self.run, row)))
        return found

    def run(self, row: Row) -> Row:
        """The row with its accuracies on all tasks, or with why nothing was fused."""
        stage, liars = self.stage(row["seed"]), row["liars"]
        if row["fusion"] == "individual":
            own = zip(stage.protocol.tasks, stage.sent, strict=True)
            return row | {
                "accuracy": {task: stage.accuracy(applied(vector, self.world.base), task) for task, vector in own}
            }
        if row["attack"] == ALONE:
            kept = without(heard_from(stage, row["uplink"], None, liars), liars)
            return row | {"accuracy": stage.accuracies(stage.model(task_arithmetic(kept)))}
        heard = heard_from(stage, row["uplink"], None if row["attack"] == NOBODY else row["attack"], liars)
        try:
            fused = DEFENCES[row["fusion"]](stage, heard)
        except NonFiniteError as error:
            return row | {"refused": str(error)}
        return row | {"accuracy": stage.accuracies(fused.model), "left_out": fused.left_out}
