"""The whole chain on real input: eight fine-tuned models, a jammed uplink, one repaired multi-task model.

Eight users fine-tune the same small vision transformer on eight image tasks and send their task vectors over an uplink
that is undisturbed, jammed at its strongest user, or jammed for the least sum rate. The base station adds them up, and
repairs the sum in four ways. What is printed is the accuracy of the result, relative to the eight fine-tuned models.

    python examples/quickstart.py                       one seed, about three minutes on two cores
    python examples/quickstart.py --seeds 5 --json table.json

Fine-tuned task vectors and finished seeds are cached in examples/.cache; --fresh starts over.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))  # the testbed lies beside this file

from rmtllmf.channel import Reception, UplinkScenario, sic, strongest_user_covariance, transmit, worst_case_covariance
from rmtllmf.metrics import accuracy, normalized_accuracy, snr_db
from rmtllmf.plot import fusion_chart
from rmtllmf.resilience import embedding_keys, few_shot, realign, resilient_fusion, restore
from rmtllmf.taskvec import TaskVector, task_arithmetic
from testbed import TASKS, Task, base_encoder, finetune, load_task, prototype_head
from testbed.model import BASE_FILE

HERE = Path(__file__).parent
CONDITIONS = ("ideal", "strongest_user", "sum_rate")
METHODS = ("unprotected", "restored", "realigned", "both")

Row = dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Protocol:
    """Everything that decides the numbers, besides the seed."""

    tasks: tuple[str, ...] = TASKS
    images: int | None = None  # cap on training and test images of a task
    finetuning_steps: int | None = None  # None: the testbed's own settings
    shots: int = 10
    realignment_steps: int = 60
    realignment_lr: float = 1e-3
    realignment_batch: int = 16  # images of every task in every step
    jamming: float = 124.0  # the jammer's power, in units of the thermal noise power per antenna
    blocks: int = 50  # independent draws of the uplink that a task vector passes through, one after the other
    # A min-max quantiser in front of a QAM modulator scales symbols by the peak of what it sends. The paper's SNRs
    # imply a peak of 30 to 57 times the rms for CLIP ViT-B/16; this small model's own is about 4, so the ratio is set.
    peak_to_rms: float = 30.0


def receptions(protocol: Protocol, seed: int) -> dict[str, Reception]:
    """The paper's uplink and its two jammers, heard by a receiver that does not know of them."""
    up = UplinkScenario(num_users=len(protocol.tasks)).draw(protocol.blocks, seed=seed)
    power = protocol.jamming * up.noise
    thermal = up.noise_covariance
    jammers = {
        "ideal": torch.zeros_like(thermal),
        "strongest_user": strongest_user_covariance(up.H, up.P, power),
        "sum_rate": worst_case_covariance(up.H, up.P, power, noise=up.noise),
    }
    return {
        name: sic(up.H, up.P, jammer + thermal, designed_for=thermal, order="strongest_first")
        for name, jammer in jammers.items()
    }


def evaluate(encoder: nn.Module, heads: Mapping[str, nn.Module], tasks: Mapping[str, Task]) -> dict[str, float]:
    """Accuracy on every task's test set."""
    return {
        name: accuracy(encoder, DataLoader(task.test, batch_size=250), head=heads[name]) for name, task in tasks.items()
    }


def finetuned_vectors(
    protocol: Protocol,
    base: nn.Module,
    heads: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    seed: int,
    cache: Path,
) -> list[TaskVector]:
    """One task vector a task, fine-tuned or from the cache."""

    def vector(name: str) -> TaskVector:
        path = cache / f"seed-{seed}-{name}.safetensors"
        if path.exists():
            return TaskVector.load(path)
        options = {} if protocol.finetuning_steps is None else {"steps": protocol.finetuning_steps}
        tuned = finetune(base, heads[name], tasks[name], seed=seed, progress=True, **options)
        result = TaskVector.between(base, tuned)
        result.save(path)
        return result

    return side_by_side([partial(vector, name) for name in tasks])


def fusion_methods(
    protocol: Protocol,
    base: nn.Module,
    heard: Sequence[TaskVector],
    heads: Mapping[str, nn.Module],
    tasks: Mapping[str, Task],
    seed: int,
) -> dict[str, Callable[[], nn.Module]]:
    """How to make the fused model: without protection, with each half of it, and with both."""

    def shots() -> dict[str, tuple[nn.Module, DataLoader[Any]]]:
        source = torch.Generator().manual_seed(seed)
        options = {"batch_size": protocol.realignment_batch, "shuffle": True, "generator": source}
        return {
            name: (heads[name], DataLoader(few_shot(task.train, protocol.shots, seed=seed), **options))
            for name, task in tasks.items()
        }

    settings = {"steps": protocol.realignment_steps, "lr": protocol.realignment_lr, "progress": True}
    fused = task_arithmetic(heard).apply_to(base.state_dict())

    def loaded(state: Mapping[str, torch.Tensor]) -> nn.Module:
        model = copy.deepcopy(base).requires_grad_()
        model.load_state_dict(state)
        return model

    def realigned() -> nn.Module:
        model = loaded(fused)
        realign(model, shots(), **settings)
        return model

    def both() -> nn.Module:
        model = loaded(fused)
        resilient_fusion(model, base, heard, shots(), **settings)
        return model

    return {
        "unprotected": lambda: loaded(fused),
        "restored": lambda: loaded(restore(fused, base, embedding_keys(base))),
        "realigned": realigned,
        "both": both,
    }


def run_seed(protocol: Protocol, seed: int, cache: Path) -> list[Row]:
    """All conditions and methods for one seed: rows of condition, method and normalised accuracy."""
    tasks = {name: load_task(name, fewer=protocol.images) for name in protocol.tasks}
    base = base_encoder()
    heads = {name: prototype_head(base, task) for name, task in tasks.items()}
    vectors = finetuned_vectors(protocol, base, heads, tasks, seed, cache)

    individual = {}
    for name, vector in zip(tasks, vectors, strict=True):
        tuned = vector.apply_to(copy.deepcopy(base))
        individual |= evaluate(tuned, heads, {name: tasks[name]})
    print("fine-tuned:", "  ".join(f"{name} {value:.0%}" for name, value in individual.items()))

    jobs: dict[tuple[str, str], Callable[[], nn.Module]] = {
        ("none", "base"): lambda: base,
        ("none", "clean"): lambda: task_arithmetic(vectors).apply_to(copy.deepcopy(base)),
    }
    rms = mean(vector.norm() / sum(tensor.numel() for tensor in vector.values()) ** 0.5 for vector in vectors)
    for condition, reception in receptions(protocol, seed).items():
        heard = transmit(vectors, reception, seed=seed, scale=protocol.peak_to_rms * rms)
        snr = mean(snr_db(sent, got) for sent, got in zip(vectors, heard, strict=True))
        print(f"{condition}: mean squared error {float(reception.mse.mean()):.3f}, parameter SNR {snr:.1f} dB")
        methods = fusion_methods(protocol, base, heard, heads, tasks, seed)
        jobs |= {(condition, method): make for method, make in methods.items()}

    def value(make: Callable[[], nn.Module]) -> float:
        return normalized_accuracy(evaluate(make(), heads, tasks), individual)

    values = side_by_side([partial(value, make) for make in jobs.values()], "fused models")
    return [
        {"condition": condition, "method": method, "value": result}
        for (condition, method), result in zip(jobs, values, strict=True)
    ]


def side_by_side(jobs: Sequence[Callable[[], Result]], progress: str | None = None) -> list[Result]:
    """The jobs' results in order, two jobs at a time on one thread each: small models gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(2, threads)) as pool:
            running = [pool.submit(job) for job in jobs]
            for _ in tqdm(as_completed(running), progress, len(running), disable=progress is None):
                pass
            return [job.result() for job in running]
    finally:
        torch.set_num_threads(threads)


def cached_seed(protocol: Protocol, seed: int, cache: Path) -> list[Row]:
    """`run_seed`, or what it gave before under the same protocol, base model and code."""
    path = cache / f"seed-{seed}.json"
    if path.exists():
        print(f"seed {seed}: cached, --fresh to redo")
        return json.loads(path.read_text())
    rows = run_seed(protocol, seed, cache)
    write_json(path, rows)
    return rows


def cache_folder(protocol: Protocol, root: Path) -> Path:
    """A folder for this protocol, base model and version of the testbed: anything else starts afresh."""
    digest = hashlib.blake2b(json.dumps(asdict(protocol)).encode(), digest_size=8)
    for path in [BASE_FILE, Path(__file__), *sorted(BASE_FILE.parent.glob("*.py"))]:
        digest.update(path.read_bytes())
    folder = root / digest.hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, value: object) -> None:
    """Atomically: the whole file or the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def table(rows_per_seed: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows {"condition", "method", "mean", "values"}, one value a seed."""
    result = []
    for rows in zip(*rows_per_seed, strict=True):
        values = [row["value"] for row in rows]
        result.append(
            {"condition": rows[0]["condition"], "method": rows[0]["method"], "mean": mean(values), "values": values}
        )
    return result


def formatted(rows: Sequence[Row]) -> str:
    """The table as text: methods down, conditions across."""

    def cell(condition: str, method: str) -> str:
        (row,) = (row for row in rows if (row["condition"], row["method"]) == (condition, method))
        spread = f" ± {100 * stdev(row['values']):.1f}" if len(row["values"]) > 1 else ""
        return f"{100 * row['mean']:.1f}{spread} %"

    lines = ["normalised accuracy".ljust(22) + "".join(name.replace("_", " ").rjust(18) for name in CONDITIONS)]
    lines += [
        method.ljust(22) + "".join(cell(condition, method).rjust(18) for condition in CONDITIONS) for method in METHODS
    ]
    lines.append(f"{'base model, untouched'.ljust(22)}{cell('none', 'base').rjust(18)}")
    lines.append(f"{'clean fusion, no noise'.ljust(22)}{cell('none', 'clean').rjust(18)}")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """The table as a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    fusion_chart(rows, ax=figure.add_subplot())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None, protocol: Protocol | None = None) -> list[Row]:
    """Parse the command line, run what is not cached, print and draw; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="number of seeds (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE", default=HERE / "out" / "quickstart.png")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=HERE / ".cache" / "quickstart")
    parser.add_argument("--fresh", action="store_true", help="forget what is cached")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    protocol = protocol or Protocol()
    begin = time.monotonic()
    cache = cache_folder(protocol, options.cache)
    if options.fresh:
        shutil.rmtree(cache)
        cache = cache_folder(protocol, options.cache)
    rows = table([cached_seed(protocol, seed, cache) for seed in range(options.seeds)])
    print(f"\n{formatted(rows)}\n")
    draw(rows, options.figure)
    print(f"figure: {options.figure}")
    if options.json:
        write_json(options.json, rows)
        print(f"table: {options.json}")
    print(f"{time.monotonic() - begin:.0f} s")
    return rows


if __name__ == "__main__":
    main()
