"""Which rule of fusion stands noise best, on the testbed: every rule on every uplink, into one table.

Results go line by line into a file; started again, a killed run goes on where it was, and several processes share the
work (RANK=0 WORLD_SIZE=2 and RANK=1 WORLD_SIZE=2, or torchrun --nproc-per-node 2).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from paper.protocol import TESTBED
from paper.results import Results, run
from paper.world import Testbed

from .candidates import CANDIDATES
from .comparison import Comparison, key_of
from .table import formatted

HERE = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not in the file yet, and report."""
    parser = argparse.ArgumentParser(prog="python -m rules", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rules", nargs="+", choices=list(CANDIDATES), metavar="RULE", help="default: all")
    parser.add_argument("--results", type=Path, metavar="FILE", default=HERE / "out" / "rules.jsonl")
    parser.add_argument("--table", type=Path, metavar="FILE", help="default: beside the results")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=HERE / ".cache" / "paper")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)  # for the same last bits
    protocol = replace(TESTBED, seeds=tuple(options.seeds))
    world = Testbed(protocol, options.cache)
    world.progress = not options.quiet
    options.results.parent.mkdir(parents=True, exist_ok=True)
    results = Results(options.results, protocol.identity() | {"base": world.identity()}, key=key_of)
    jobs = Comparison(world).jobs(options.seeds, options.rules or ())
    run(jobs, results, rank=rank, world=size, progress=not options.quiet and rank == 0)
    if rank == 0:
        text = formatted([row for row in results.rows() if row["seed"] in options.seeds])
        print(text)
        (options.table or options.results.with_suffix(".txt")).write_text(text + "\n")


if __name__ == "__main__":
    main()
