"""What saves a jammed fusion, on the testbed: every method under every condition, into one table; and what liars cost.

Results go line by line into a file; started again, a killed run goes on where it was, and several processes share the
work (RANK=0 WORLD_SIZE=2 and RANK=1 WORLD_SIZE=2, or torchrun --nproc-per-node 2).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from paper.protocol import TESTBED
from paper.results import Results, Row, run
from paper.world import Testbed, applied

from . import hostile, hostile_table
from .conditions import BLACK_BOX, KINDS
from .hostile import Hostile
from .methods import BOUNDS, METHODS
from .stage import Stage
from .table import draw, formatted

HERE = Path(__file__).parent.parent


def key_of(row: Row) -> str:
    """The key of the job that gave a row."""
    return "/".join([str(row["seed"]), row["kind"], row["condition"], row["method"]])


def name_of(job: str) -> str:
    """The method in the key of a job."""
    return job.rsplit("/", 1)[1]


class Experiment:
    """Runs jobs, each of which is one model and its accuracies."""

    def __init__(self, world: Testbed) -> None:
        self.world = world
        self.stage = lru_cache(maxsize=1)(lambda seed: Stage(world, world.protocol, seed))

    def jobs(self, seeds: Sequence[int]) -> list[tuple[str, partial[Row]]]:
        """All of them."""
        found = []
        for seed in seeds:
            rows = [("bound", "", name) for name in ("individual", *BOUNDS)]
            rows += [
                (kind, condition, name)
                for kind in KINDS
                for condition in BLACK_BOX
                for name, method in METHODS.items()
                if kind in method.kinds
            ]
            for kind, condition, name in rows:
                row = {"seed": seed, "kind": kind, "condition": condition, "method": name}
                found.append((key_of(row), partial(self.run, row)))
        return found

    def run(self, row: Row) -> Row:
        """The row with its accuracies."""
        stage, name = self.stage(row["seed"]), row["method"]
        if name == "individual":
            own = zip(stage.protocol.tasks, stage.sent, strict=True)
            found = {task: stage.accuracy(applied(vector, self.world.base), task) for task, vector in own}
        elif row["kind"] == "bound":
            found = stage.accuracies(BOUNDS[name](stage))
        else:
            found = METHODS[name].accuracies(stage, row["kind"], row["condition"])
        return row | {"accuracy": found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not in the file yet, and report."""
    parser = argparse.ArgumentParser(prog="python -m protection", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="only these, named as in the table; default: all"
    )
    parser.add_argument("--hostile", action="store_true", help="liars among the users instead")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default: in out/")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="default: beside the results")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=HERE / ".cache" / "paper")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)  # for the same last bits
    protocol = replace(TESTBED, seeds=tuple(options.seeds))
    world = Testbed(protocol, options.cache)
    world.progress = not options.quiet
    name, kind, key = ("hostile", Hostile, hostile.key_of) if options.hostile else ("protection", Experiment, key_of)
    path = options.results or HERE / "out" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(path, protocol.identity() | {"base": world.identity()}, key=key)
    jobs = kind(world).jobs(options.seeds)
    if options.methods:
        unknown = {*options.methods} - {name_of(key) for key, _ in jobs}
        if unknown:
            parser.error(f"argument --methods: found no {', '.join(sorted(unknown))}")
        jobs = [job for job in jobs if name_of(job[0]) in {"individual", *options.methods}]
    run(jobs, results, rank=rank, world=size, progress=not options.quiet and rank == 0)
    if rank == 0:
        rows = [row for row in results.rows() if row["seed"] in options.seeds]
        folder = options.figures or path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        text = hostile_table.formatted(rows, protocol.tasks) if options.hostile else formatted(rows)
        print(text)
        (folder / ("hostile.txt" if options.hostile else "table.txt")).write_text(text + "\n")
        for figure in [] if options.hostile else draw(rows, folder):
            print(f"figure: {figure}")


if __name__ == "__main__":
    main()
