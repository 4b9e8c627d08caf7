"""The jobs of the experiment, each of which gives one row of results, and how they share what is expensive.

Rows are of three kinds:

- accuracy: ``{"seed", "condition", "protection", "shots", "tasks", "accuracy"}``, the accuracy of one fused model on
  each of its own tasks. The condition is an uplink, or "clean": vectors that were never sent.
- the same with the condition "base" (the untouched base) or "individual" (every task's own fine-tuned model).
- uplink: ``{"seed", "condition", "uplink"}``, numbers about the received vectors; see `uplink.facts`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

import rmtllmf.taskvec
from rmtllmf.metrics import accuracy
from rmtllmf.resilience import attention_keys, embedding_keys, realign
from rmtllmf.taskvec import TaskVector

from .finetune import drawing
from .fusion import Fuser
from .protocol import Protocol, Subset, named
from .uplink import facts, received, reception
from .world import World, applied

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one row of results is about."""

    seed: int
    condition: str
    protection: str
    shots: int
    subset: Subset

    def key(self, tasks: Sequence[str]) -> str:
        """The same for the same job of the same protocol."""
        if self.protection == "uplink":
            return f"{self.seed}/{self.condition}/uplink"
        return "/".join([str(self.seed), self.condition, self.protection, str(self.shots), *named(tasks, self.subset)])


def key_of(row: Row) -> str:
    """The key of the job that gave a row."""
    if "uplink" in row:
        return f"{row['seed']}/{row['condition']}/uplink"
    return "/".join([str(row["seed"]), row["condition"], row["protection"], str(row["shots"]), *row["tasks"]])


def jobs_of(protocol: Protocol) -> list[Job]:
    """All jobs, in an order in which neighbours share vectors and partial sums; no two alike."""
    every = tuple(range(len(protocol.tasks)))
    subsets = protocol.chosen_subsets()
    jobs: list[Job] = []
    for seed in protocol.seeds:
        jobs += [Job(seed, "base", "unprotected", 0, every), Job(seed, "individual", "unprotected", 0, every)]
        jobs += [Job(seed, "clean", "unprotected", 0, subset) for subset in subsets]
        for condition in protocol.conditions:
            jobs.append(Job(seed, condition, "uplink", 0, every))
            for protection in protocol.protections:
                shots = shots_of(protection, protocol.shots)
                jobs += [Job(seed, condition, protection, shots, subset) for subset in subsets]
            varied = (protocol.shots, *(protocol.ablation_shots if condition == protocol.conditions[0] else ()))
            for protection in protocol.ablation:
                for shots in varied:
                    jobs.append(Job(seed, condition, protection, shots_of(protection, shots), every))
    return list(dict.fromkeys(jobs))


def shots_of(protection: str, shots: int) -> int:
    """How many images a class a protection takes."""
    return 0 if protection in ("unprotected", "restored") else shots


class Sweep:
    """Runs jobs; holds what neighbouring jobs share: the vectors of a seed, and the received ones of a condition."""

    def __init__(self, protocol: Protocol, world: World) -> None:
        if protocol.rule not in rmtllmf.taskvec.__all__:
            raise ValueError(f"rule: rmtllmf.taskvec has no rule {protocol.rule!r}")
        if why := _unfit(getattr(rmtllmf.taskvec, protocol.rule)):
            raise ValueError(f"rule: {protocol.rule!r} {why}")
        self.protocol, self.world = protocol, world
        self._sent = lru_cache(maxsize=1)(self._make_sent)
        self._fuser = lru_cache(maxsize=1)(self._make_fuser)
        self._heard = lru_cache(maxsize=1)(self._make_heard)

    def run(self, job: Job) -> Row:
        """The row of one job, whatever ran before it."""
        if job.protection == "uplink":
            heard, mse = self._heard(job.seed, job.condition)
            restored = embedding_keys(self.world.base)
            return {
                "seed": job.seed,
                "condition": job.condition,
                "uplink": facts(self._sent(job.seed), heard, mse, restored),
            }
        names = named(self.protocol.tasks, job.subset)
        if job.condition == "individual":
            vectors = dict(zip(self.protocol.tasks, self._sent(job.seed), strict=True))
            values = {name: self.accuracy(applied(vectors[name], self.world.base), [name])[name] for name in names}
        else:
            values = self.accuracy(self.model(job), names)
        return {
            "seed": job.seed,
            "condition": job.condition,
            "protection": job.protection,
            "shots": job.shots,
            "tasks": names,
            "accuracy": values,
        }

    def model(self, job: Job) -> nn.Module:
        """The fused model of a job; good until the next call."""
        if job.condition == "base":
            return self.world.base
        embeddings = sorted(embedding_keys(self.world.base))
        fuser = self._fuser(job.seed, job.condition)
        if job.protection == "unprotected":
            return fuser.fused(job.subset)
        kept = [] if job.protection == "realigned" else embeddings
        model = fuser.fused(job.subset, kept)
        if job.protection != "restored":
            shots = self.world.shots(named(self.protocol.tasks, job.subset), job.shots, job.seed)
            device = next(model.parameters()).device
            with drawing(device, job.seed, "realignment"):  # crops and dropout do not go by what was drawn before
                realign(
                    model,
                    shots,
                    steps=self.protocol.realignment_steps,
                    lr=self.protocol.realignment_lr,
                    frozen=kept,
                    trainable=sorted(attention_keys(model)) if job.protection == "attention" else None,
                )
        return model

    def accuracy(self, model: nn.Module, names: Sequence[str]) -> dict[str, float]:
        """On the test sets of these tasks only."""
        return {name: accuracy(model, self.world.test(name), head=self.world.arena(name).head) for name in names}

    # Each forgets what is of no more use before it makes its own: of a large model both would not fit.

    def _make_sent(self, seed: int) -> list[TaskVector]:
        for made in (self._fuser, self._heard, self._sent):
            made.cache_clear()
        return self.world.vectors(seed)

    def _make_heard(self, seed: int, condition: str) -> tuple[list[TaskVector], list[float]]:
        for made in (self._fuser, self._heard):
            made.cache_clear()
        sent = self._sent(seed)
        if condition == "clean":
            return sent, []
        channel = reception(self.protocol, condition, seed)
        mse = [float(value) for value in channel.mse.mean(0)]
        return received(self.protocol, sent, channel, seed), mse

    def _make_fuser(self, seed: int, condition: str) -> Fuser:
        self._fuser.cache_clear()
        rule: Callable[..., Any] = getattr(rmtllmf.taskvec, self.protocol.rule)
        heard, _ = self._heard(seed, condition)
        return Fuser(self.world.base, heard, rule, self.protocol.scale or None)


def _unfit(rule: Callable[..., Any]) -> str:
    """Why a function of `rmtllmf.taskvec` cannot fuse vectors by itself; nothing if it can."""
    parameters = [] if isinstance(rule, type) else list(inspect.signature(rule).parameters.values())
    if not parameters or parameters[0].name != "vectors" or "scale" not in {one.name for one in parameters}:
        return "does not fuse task vectors"
    needed = [one.name for one in parameters[1:] if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    return f"needs {', '.join(needed)}, which the experiment does not set" if needed else ""
