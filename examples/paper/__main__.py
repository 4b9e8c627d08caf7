"""Run the paper's experiment: every uplink, every protection, every subset of the tasks.

    python -m paper                        the small testbed, 4 subsets a size, one seed: about ten minutes on two cores
    python -m paper --full                 all 247 subsets of each condition
    python -m paper clip --data FOLDER     CLIP ViT-B/16 and the paper's eight data sets
    torchrun --nproc-per-node 2 -m paper   shared by two processes, with the same numbers

Run it in the folder examples. Results go line by line into a file as they are found; killed and started again it goes
on where it was, and several processes of one machine may work on one file. Every option of the protocol has the name
of its field in `protocol.Protocol`; seeds, subsets, conditions and protections may be added to a file later.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from rmtllmf.errors import InputError

from ._files import replacing
from .figures import draw
from .protocol import READY, Protocol, add_options, from_options
from .report import as_json, formatted
from .results import Results, ResultsError, run
from .sweep import Row, Sweep, jobs_of, key_of
from .world import World, world_of

HERE = Path(__file__).parents[1]
CLIP_ONLY = ("data", "device", "parallel", "workers")


def open_results(path: Path, protocol: Protocol, world: World) -> Results:
    """The file of results of a protocol on a base model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return Results(path, protocol.identity() | {"base": world.identity()}, key=key_of)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse the command line, run what is not in the file yet, report; returns the file."""
    parser = argparse.ArgumentParser(
        prog="python -m paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", nargs="?", default="testbed", choices=sorted(READY))
    parser.add_argument("--full", action="store_true", help="all subsets of tasks; the same as --subsets 0")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default: out/paper-SETTING.jsonl")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="default: beside the results")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of the data sets (clip); default: data")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=HERE / ".cache" / "paper")
    parser.add_argument("--device", help="where models run (clip); cuda: torchrun's processes take a GPU each")
    parser.add_argument(
        "--parallel", choices=("ddp", "fsdp"), help="how torchrun's processes fine-tune together (clip)"
    )
    parser.add_argument("--workers", type=int, help="processes that load images for fine-tuning (clip)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        protocol = from_options(options.setting, options)
    except ValueError as error:
        parser.error(str(error))
    if options.full:
        protocol = replace(protocol, subsets=0)
    for name in CLIP_ONLY if protocol.setting == "testbed" else ():
        if getattr(options, name) is not None:
            parser.error(f"--{name}: the testbed has its own data, and runs on the CPU, a process a model")
    if options.parallel and not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        parser.error("--parallel: needs several processes; start it with torchrun --nproc-per-node N -m paper")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    path = options.results or HERE / "out" / f"paper-{protocol.setting}.jsonl"
    begin = time.monotonic()
    torch.set_num_threads(1 if protocol.setting == "testbed" else torch.get_num_threads())  # for the same last bits
    real = {"device": device_of(options.device), "parallel": options.parallel, "workers": options.workers or 0}
    try:
        data = options.data or HERE / "data"
        world = world_of(protocol, options.cache, data, **({} if protocol.setting == "testbed" else real))
        sweep = Sweep(protocol, world)
        world.progress = not options.quiet
    except ValueError as error:
        parser.error(str(error))
    try:
        results = open_results(path, protocol, world)
    except ResultsError as error:
        sys.exit(f"{error}\n--results: choose another file, or the protocol that this one was begun with")
    jobs = [(job.key(protocol.tasks), job) for job in jobs_of(protocol)]
    if most := max((job.shots for key, job in jobs if key not in results), default=0):
        world.shots(protocol.tasks, most, 0)  # too few images, or none, are told before hours are spent
    if options.parallel:
        world.prepare(protocol.seeds)  # all processes fine-tune together, before they go their own ways
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    run(
        [(key, partial(sweep.run, job)) for key, job in jobs],
        results,
        rank=rank,
        world=size,
        progress=not options.quiet and rank == 0,
    )
    if rank == 0:
        report(results.rows(), protocol, options.figures or path.with_suffix(""))
        print(f"results: {path}\n{time.monotonic() - begin:.0f} s")
    return path


def device_of(said: str | None) -> str:
    """The device of this process: of several that torchrun started on one machine, each has its own GPU."""
    count = torch.cuda.device_count() if said == "cuda" and "LOCAL_RANK" in os.environ else 0
    return f"cuda:{int(os.environ['LOCAL_RANK']) % count}" if count else said or "cpu"


def report(rows: Sequence[Row], protocol: Protocol, folder: Path) -> None:
    """Print the tables and the claims, and draw the figures."""
    text = formatted(rows, protocol)
    if protocol.setting == "clip":
        text += "\n\n" + published([row for row in rows if row["seed"] in protocol.seeds])
    print(f"\n{text}\n")
    folder.mkdir(parents=True, exist_ok=True)
    for path in draw(rows, folder, protocol):
        print(f"figure: {path}")
    write(folder / "report.txt", text + "\n")
    write(folder / "table.json", json.dumps(as_json(rows, protocol), indent=1) + "\n")


def published(rows: Sequence[Row]) -> str:
    """The published accuracies beside what was measured here: untouched and fine-tuned."""
    from rmtllmf.clip import PUBLISHED

    def measured(condition: str, name: str) -> str:
        values = [row["accuracy"][name] for row in rows if row["condition"] == condition and name in row["accuracy"]]
        return f"{100 * sum(values) / len(values):.1f}" if values else "-"

    lines = ["accuracy, %   base (published)   fine-tuned (published)"]
    for name, model in PUBLISHED.items():
        base, tuned = measured("base", name), measured("individual", name)
        lines.append(f"{name:12s} {base:>6s} ({100 * model.zero_shot:.1f}) {tuned:>14s} ({100 * model.finetuned:.1f})")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Atomically: the whole file or the old one."""
    with replacing(path) as part:
        part.write_text(text)


if __name__ == "__main__":
    try:
        main()
    except (InputError, ResultsError, FileNotFoundError) as error:  # what the user can do something about
        sys.exit(str(error))
