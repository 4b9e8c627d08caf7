"""The methods that are compared: each makes a model of what was received."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from paper.finetune import drawing
from paper.protocol import Protocol
from paper.world import World
from rmtllmf.resilience import (
    embedding_keys,
    harmful_keys,
    joint_shrink,
    low_rank_code,
    measured_sensitivity,
    mse_optimal_weights,
    protect,
    realign,
    repetitions,
    resilient_fusion,
    restore,
    shrink,
    spectral_shrink,
)
from rmtllmf.taskvec import TaskVector, heuristic_scale, task_arithmetic

from .conditions import KINDS, Heard, black_box, link

PROBES = 64  # random pictures that sensitivities are measured on


class Stage:
    """A world and a seed: base model, clean vectors, samples; and models made of them."""

    def __init__(self, world: World, protocol: Protocol, seed: int) -> None:
        self.world, self.protocol, self.seed = world, protocol, seed

    @cached_property
    def sent(self) -> list[TaskVector]:
        """The clean task vectors."""
        return self.world.vectors(self.seed)

    @cached_property
    def noise(self) -> list[Tensor]:
        """Random pictures: no data."""
        picture, _ = self.world.arena(self.protocol.tasks[0]).test[0]
        return [torch.randn(PROBES, *picture.shape, generator=torch.Generator().manual_seed(self.seed))]

    def shots(self, *, seen: bool = True) -> dict[str, Any]:
        """The same few labelled pictures of every class of every task, for every method.

        `protect` looks at all of them once before it realigns. So that all realign on the same batches in the same
        order, the others' have been `seen` once, too.
        """
        shots = self.world.shots(self.protocol.tasks, self.protocol.shots, self.seed)
        for _, batches in shots.values() if seen else ():
            for _ in batches:
                pass
        return shots

    def model(self, update: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The base model, plus an update."""
        model = copy.deepcopy(self.world.base)
        return model if update is None else TaskVector(update).apply_to(model)

    def realigned(self, model: nn.Module) -> nn.Module:
        """After the paper's number of steps on the few pictures, with nothing frozen."""
        with drawing(torch.device("cpu"), self.seed, "realignment"):
            realign(model, self.shots(), steps=self.protocol.realignment_steps, lr=self.protocol.realignment_lr)
        return model


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        make: a model from a stage and what was heard.
        data: whether it takes the labelled pictures.
        kinds: of conditions that it is for.
        scaled, aware: of the whole link; see `link`.
        times: as often every number is sent in the channel uses of the vectors: low-rank codes of them.
    """

    make: Callable[[Stage, Heard], nn.Module]
    data: bool = False
    kinds: tuple[str, ...] = KINDS
    scaled: str = "peak"
    aware: bool = False
    times: int = 1

    def heard(self, stage: Stage, kind: str, condition: str) -> Heard:
        """What the base station holds."""
        if kind == "black_box":
            return black_box(stage.sent, condition, stage.seed)
        how: dict[str, Any] = {"scaled": self.scaled, "aware": self.aware, "times": self.times}
        if self.times == 1:
            return link(stage.protocol, stage.sent, condition, stage.seed, **how)
        kept = set(embedding_keys(stage.world.base))
        matrices = [name for name, tensor in stage.sent[0].items() if tensor.ndim == 2 and name not in kept]
        codes = [low_rank_code(vector, ratio=1 / self.times, only=matrices) for vector in stage.sent]
        assert all(repetitions(code, vector) >= self.times for code, vector in zip(codes, stage.sent, strict=True))
        heard = link(stage.protocol, [code.sent for code in codes], condition, stage.seed, **how)
        better = joint_shrink(heard.vectors, heard.reception, scale=heard.scale)
        decoded = [code.decode(numbers) for code, numbers in zip(codes, better, strict=True)]
        return replace(heard, vectors=decoded)


def unprotected(stage: Stage, heard: Heard) -> nn.Module:
    """Task arithmetic with what was received."""
    return stage.model(task_arithmetic(heard.vectors))


def papers(stage: Stage, heard: Heard) -> nn.Module:
    """R-MTLLMF: embeddings restored and frozen, the rest realigned."""
    model = stage.model()
    with drawing(torch.device("cpu"), stage.seed, "realignment"):
        resilient_fusion(
            model,
            stage.world.base,
            heard.vectors,
            stage.shots(),
            frozen=sorted(embedding_keys(model)),
            steps=stage.protocol.realignment_steps,
            lr=stage.protocol.realignment_lr,
        )
    return model


def estimated(stage: Stage, heard: Heard, *, by: Callable[..., list[Any]], measured: bool = False) -> nn.Module:
    """Task arithmetic with estimates of what was sent; no data (`measured`: on random pictures)."""
    known = {}
    if measured:
        found = measured_sensitivity(
            stage.world.base, heard.vectors, heard.reception, stage.noise, seed=stage.seed, scale=heard.scale
        )
        known = {"sensitivity": found.lower}
    return stage.model(task_arithmetic(by(heard.vectors, heard.reception, scale=heard.scale, **known)))


def weighted(stage: Stage, heard: Heard) -> nn.Module:
    """Task arithmetic with the weights that make the squared error of the sum least; no data."""
    weights = mse_optimal_weights(heard.vectors, heard.reception, scale=heard.scale)
    scale = heuristic_scale(len(heard.vectors))
    return stage.model(task_arithmetic(heard.vectors, scale, weights=[float(weight) for weight in weights]))


def restored(stage: Stage, heard: Heard) -> nn.Module:
    """Task arithmetic, and the base model's embeddings; no data."""
    model = unprotected(stage, heard)
    model.load_state_dict(restore(model, stage.world.base, sorted(embedding_keys(model))))
    return model


def harmless(stage: Stage, heard: Heard) -> nn.Module:
    """Task arithmetic, and what noise harms from the base model, as measured on random pictures; no data."""
    model = unprotected(stage, heard)
    found = measured_sensitivity(
        stage.world.base, heard.vectors, heard.reception, stage.noise, seed=stage.seed, scale=heard.scale
    )
    keys = harmful_keys(heard.vectors, heard.reception, scale=heard.scale, sensitivity=found.lower)
    if keys:
        model.load_state_dict(restore(model, stage.world.base, keys))
    return model


def realigned(stage: Stage, heard: Heard, *, make: Callable[[Stage, Heard], nn.Module]) -> nn.Module:
    """Another method's model after realignment."""
    return stage.realigned(make(stage, heard))


def protected(stage: Stage, heard: Heard, *, data: bool) -> nn.Module:
    """`protect`, with the few labelled pictures or with random ones."""
    model = stage.model()
    with drawing(torch.device("cpu"), stage.seed, "realignment"):
        protect(
            model,
            stage.world.base,
            heard.vectors,
            heard.reception,
            stage.shots(seen=False) if data else None,
            seed=stage.seed,
            scale=heard.scale,
            inputs=None if data else stage.noise,
            steps=stage.protocol.realignment_steps,
            lr=stage.protocol.realignment_lr,
        )
    return model


BOUNDS: dict[str, Callable[[Stage], nn.Module]] = {
    "base": lambda stage: stage.model(),
    "base realigned": lambda stage: stage.realigned(stage.model()),
    "clean": lambda stage: stage.model(task_arithmetic(stage.sent)),
    "clean realigned": lambda stage: stage.realigned(stage.model(task_arithmetic(stage.sent))),
}
"""Methods that need no uplink."""

_better: dict[str, Any] = {"kinds": ("link",), "scaled": "rms"}
METHODS: dict[str, Method] = {
    "unprotected": Method(unprotected),
    "R-MTLLMF": Method(papers, data=True),
    "shrink": Method(partial(estimated, by=shrink)),
    "shrink, measured": Method(partial(estimated, by=shrink, measured=True)),
    "joint_shrink": Method(partial(estimated, by=joint_shrink), kinds=("link",)),
    "spectral_shrink": Method(partial(estimated, by=spectral_shrink)),
    "weights": Method(weighted),
    "protect": Method(partial(protected, data=False)),
    "shrink, realigned": Method(partial(realigned, make=partial(estimated, by=shrink)), data=True),
    "protect, 10 shots": Method(partial(protected, data=True), data=True),
    "aware": Method(unprotected, kinds=("link",), aware=True),
    "restored": Method(restored),
    "realigned": Method(partial(realigned, make=unprotected), data=True),
    "harmful restored": Method(harmless),
    "low rank": Method(unprotected, kinds=("link",), times=8),
    "rms": Method(unprotected, **_better),
    "rms, aware": Method(unprotected, aware=True, **_better),
    "rms, aware, protect": Method(partial(protected, data=False), aware=True, **_better),
    "rms, aware, protect, 10 shots": Method(partial(protected, data=True), data=True, aware=True, **_better),
}
"""Methods in the order of the table; from "aware" on receiver and sender do better too, where it is said."""
