"""What every rule is given: clean vectors, received ones, or estimates of what was sent; drawn once for all rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from protection.conditions import link
from protection.stage import Stage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from paper.protocol import Protocol
from paper.world import World
from rmtllmf.metrics import accuracy
from rmtllmf.resilience import joint_shrink, measured_sensitivity
from rmtllmf.taskvec import TaskVector, fisher_information, input_grams

Tensors: TypeAlias = Mapping[str, Tensor]

UPLINKS = ("clean", "ideal", "strongest_user", "sum_rate")
PICTURES = 300  # of every task's test pictures, the same ones for every rule
SEEN = 3  # pictures a class that scales are searched on


class Held:
    """A world and a seed, and what came over the uplinks."""

    def __init__(self, world: World, protocol: Protocol, seed: int) -> None:
        self.stage = Stage(world, protocol, seed)
        self.world, self.protocol, self.seed = world, protocol, seed
        self.vectors = lru_cache(maxsize=None)(self._vectors)
        self._test = {task: _some(world.arena(task).test, PICTURES, seed) for task in protocol.tasks}

    def _vectors(self, uplink: str, shrunk: bool) -> list[TaskVector]:
        """The clean vectors, those received, or (`shrunk`) their posterior means, as `protect` finds them."""
        sent = self.stage.sent
        if uplink == "clean":
            return sent
        heard = link(self.protocol, sent, uplink, self.seed, scaled="peak", aware=False)
        if not shrunk:
            return heard.vectors
        found = measured_sensitivity(
            self.world.base, heard.vectors, heard.reception, self.stage.noise, seed=self.seed, scale=heard.scale
        )
        return joint_shrink(heard.vectors, heard.reception, scale=heard.scale, sensitivity=found.lower)

    def model(self, update: Tensors | None = None) -> nn.Module:
        """The base model, plus an update."""
        return self.stage.model(update)

    def states(self, vectors: Sequence[TaskVector]) -> list[dict[str, Tensor]]:
        """The fine-tuned models as the base station has them."""
        return [vector.apply_to(self.world.base.state_dict()) for vector in vectors]

    def information(self, vectors: Sequence[TaskVector]) -> list[dict[str, Tensor]]:
        """The empirical Fisher information of each of these models on its task's few pictures."""
        return self._statistics(vectors, partial(fisher_information, labels="given"))

    def grams(self, vectors: Sequence[TaskVector]) -> list[dict[str, Tensor]]:
        """The Gram matrices of each of these models' layers on its task's few pictures."""
        return self._statistics(vectors, input_grams)

    def _statistics(self, vectors: Sequence[TaskVector], of: Callable[..., Any]) -> list[Any]:
        pairs = zip(self.by_task(), self.states(vectors), strict=True)
        return [of(self.world.base, task, state=state) for task, state in pairs]

    def by_task(self) -> list[dict[str, Any]]:
        """The few labelled pictures, each task's by themselves."""
        return [{name: task} for name, task in self.shots().items()]

    def few(self) -> dict[str, tuple[nn.Module, list[Any]]]:
        """A few labelled pictures of every task, in one batch a task, to search scales on."""
        shots = self.world.shots(self.protocol.tasks, SEEN, self.seed)
        return {task: (head, [_joined(list(batches))]) for task, (head, batches) in shots.items()}

    def shots(self) -> dict[str, Any]:
        """The paper's number of labelled pictures of every class, for rules that need data."""
        return self.stage.shots()

    def accuracy(self, model: nn.Module, task: str) -> float:
        """On some of a task's test pictures."""
        return accuracy(model, DataLoader(self._test[task], batch_size=PICTURES), head=self.world.arena(task).head)


def _some(dataset: Dataset[Any], count: int, seed: int) -> Dataset[Any]:
    size = len(dataset)  # type: ignore[arg-type]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:count].tolist())


def _joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)
