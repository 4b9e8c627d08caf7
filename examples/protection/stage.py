"""What all methods of one seed have in common: base model, clean vectors, samples, and how accuracies are measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from paper.finetune import drawing
from paper.protocol import Protocol
from paper.world import World
from rmtllmf.metrics import accuracy
from rmtllmf.taskvec import TaskVector

PROBES = 64  # random pictures that sensitivities are measured on


class Stage:
    """A world and a seed."""

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

    @contextmanager
    def realignment(self, *, faster: float = 1.0) -> Iterator[dict[str, Any]]:
        """The paper's number of steps, and a learning rate so many times the paper's; random draws are the same."""
        with drawing(torch.device("cpu"), self.seed, "realignment"):
            yield {"steps": self.protocol.realignment_steps, "lr": faster * self.protocol.realignment_lr}

    def accuracies(self, model: nn.Module, heads: Mapping[str, nn.Module] | None = None) -> dict[str, float]:
        """On every task's test pictures, with its own head or with the one given."""
        return {task: self.accuracy(model, task, (heads or {}).get(task)) for task in self.protocol.tasks}

    def accuracy(self, model: nn.Module, task: str, head: nn.Module | None = None) -> float:
        """On one task's test pictures."""
        return accuracy(model, self.world.test(task), head=self.world.arena(task).head if head is None else head)
