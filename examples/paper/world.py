"""What the experiment runs on: a base model, tasks with heads and pictures, and fine-tuned models."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rmtllmf.errors import InputError
from rmtllmf.resilience import few_shot
from rmtllmf.taskvec import TaskVector
from testbed import TASKS, Task, base_encoder, load_task, prototype_head
from testbed import finetune as finetune_testbed
from testbed.common import eight_bit
from testbed.model import BASE_FILE
from testbed.pool import make_pool
from testbed.tasks import normalise

from .protocol import Protocol


@dataclass(frozen=True)
class Arena:
    """One task: its frozen head, and its pictures with labels."""

    head: nn.Module
    train: Dataset[Any]
    test: Dataset[Any]


class World:
    """Base model, tasks and task vectors of a protocol; loaded when they are first asked for.

    A subclass says how they are loaded; `base` is never written to.
    """

    test_batch = 250
    progress = True  # bars while fine-tuning

    def __init__(self, protocol: Protocol, folder: Path) -> None:
        self.protocol, self.folder = protocol, folder
        self._arenas: dict[str, Arena] = {}

    @cached_property
    def base(self) -> nn.Module:
        """The encoder that all tasks start from."""
        raise NotImplementedError

    def load(self, name: str) -> Arena:
        """A task, from where it is kept."""
        raise NotImplementedError

    def tuned(self, name: str, seed: int) -> nn.Module:
        """The encoder fine-tuned on a task."""
        raise NotImplementedError

    def public(self) -> Arena:
        """Pictures of other classes than the tasks', for a realignment without the tasks' own."""
        raise NotImplementedError

    def identity(self) -> str:
        """What the numbers depend on beside the protocol: a digest of the base model, and of folders that it names."""
        raise NotImplementedError

    def origin(self) -> str:
        """The part of it that fine-tuning depends on."""
        return self.identity()

    def arena(self, name: str) -> Arena:
        """A task."""
        if name not in self._arenas:
            self._arenas[name] = self.load(name)
        return self._arenas[name]

    def test(self, name: str) -> DataLoader[Any]:
        return DataLoader(self.arena(name).test, batch_size=self.test_batch)

    def shots(self, names: Sequence[str], count: int, seed: int) -> dict[str, tuple[nn.Module, DataLoader[Any]]]:
        """Name -> head and a few training images a class: the same ones for the same seed, whatever the other names."""
        if self.protocol.shots_from == "tasks":
            arenas = {name: self.arena(name) for name in names}
        else:
            if "public" not in self._arenas:
                self._arenas["public"] = self.public()
            arenas = {"public": self._arenas["public"]}
        return {
            name: (
                arena.head,
                DataLoader(
                    _few(name, arena, count, seed),
                    batch_size=self.protocol.realignment_batch,
                    shuffle=True,
                    generator=torch.Generator().manual_seed(seed),
                ),
            )
            for name, arena in arenas.items()
        }

    def prepare(self, seeds: Sequence[int]) -> None:
        """Make the vectors of these seeds together with all other processes, where a world can do that."""
        raise NotImplementedError

    def given(self, name: str) -> Mapping[str, torch.Tensor] | None:
        """A fine-tuned model that need not be made, if there is one."""
        return None

    def vectors(self, seed: int) -> list[TaskVector]:
        """The task vectors, in the order of the tasks; those that were made here are kept in the folder.

        Several processes share the making: each takes a task that no other is at, and waits for the rest at the end.
        """
        missing = [name for name in self.protocol.tasks if not self.kept(name, seed).exists()]
        while missing and self.protocol.finetuned == "own":
            for name in missing:
                path = self.kept(name, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                with alone(path.with_suffix(".lock")) as ours:
                    if ours and not path.exists():
                        TaskVector.between(self.base, self.tuned(name, seed)).save(path)
            missing = [name for name in missing if not self.kept(name, seed).exists()]
            if missing:
                time.sleep(1.0)
        return [self._vector(name, seed) for name in self.protocol.tasks]

    def _vector(self, name: str, seed: int) -> TaskVector:
        """On the CPU, whatever the models are on: so the noise of the uplink does not depend on the device."""
        found = self.given(name)
        if found is None:
            return TaskVector.load(self.kept(name, seed))
        base = {key: tensor.cpu() for key, tensor in self.base.state_dict().items()}
        return TaskVector.between(base, {key: tensor.cpu() for key, tensor in found.items()})

    def kept(self, name: str, seed: int) -> Path:
        """Where the task vector of a task is, or will be."""
        return self.folder / f"{self.origin()}-{self._finetuning()}" / f"seed-{seed}-{name}.safetensors"

    def _finetuning(self) -> str:
        said = {
            k: v for k, v in self.protocol.identity().items() if k.startswith("finetun") or k in ("model", "images")
        }
        return digest(repr(sorted(said.items())).encode())


class Testbed(World):
    """The eight small tasks and the small vision transformer of `testbed`."""

    def __init__(self, protocol: Protocol, folder: Path) -> None:
        unknown = [name for name in protocol.tasks if name not in TASKS]
        if unknown:
            raise ValueError(f"tasks: unknown task {unknown[0]!r}; the eight are {', '.join(TASKS)}")
        if protocol.finetuned != "own":
            raise ValueError(f"finetuned: nobody has published models of the testbed, got {protocol.finetuned!r}")
        for option in ("model", "pretrained"):
            if getattr(protocol, option):
                raise ValueError(f"{option}: the testbed has one model of its own, got {getattr(protocol, option)!r}")
        if protocol.shots_from not in ("tasks", "public"):
            raise ValueError(f"shots_from: the testbed has 'tasks' and 'public', got {protocol.shots_from!r}")
        most = self._each_public(protocol)
        if protocol.shots_from == "public" and max(protocol.ablation_shots, default=0) > most:
            raise ValueError(f"ablation_shots: expected at most {most} public ones, got {max(protocol.ablation_shots)}")
        super().__init__(protocol, folder)
        self._task = cache(partial(load_task, fewer=protocol.images or None))  # takes seconds, and is asked for twice

    @cached_property
    def base(self) -> nn.Module:
        return base_encoder()

    def load(self, name: str) -> Arena:
        task = self._task(name)
        return Arena(prototype_head(self.base, task), task.train, task.test)

    def tuned(self, name: str, seed: int) -> nn.Module:
        protocol = self.protocol
        return finetune_testbed(
            self.base,
            self.arena(name).head,
            self._task(name),
            steps=protocol.finetuning_steps,
            lr=protocol.finetuning_lr,
            batch_size=protocol.finetuning_batch,
            seed=seed,
            progress=self.progress,
        )

    def public(self) -> Arena:
        """Every twelfth class of the pre-training's pictures, noisy as the tasks' are, with a head made likewise."""
        pictures, kinds = make_pool(np.random.default_rng(13), each=self._each_public(self.protocol))
        chosen = np.flatnonzero(kinds % 12 == 0)
        rng = np.random.default_rng(17)
        noisy = eight_bit(pictures[chosen] + 45 * rng.standard_normal(pictures[chosen].shape))
        names, labels = np.unique(kinds[chosen], return_inverse=True)
        data = TensorDataset(normalise(noisy), torch.from_numpy(labels))
        task = Task("public", tuple(map(str, names)), data, data)
        return Arena(prototype_head(self.base, task), data, data)

    @staticmethod
    def _each_public(protocol: Protocol) -> int:
        """Pictures of a class; not by `ablation_shots`, which may be added to a file, and would change all pictures."""
        return max(protocol.shots, 50)

    def identity(self) -> str:
        code = [path.read_bytes() for path in sorted(BASE_FILE.parent.glob("*.py"))]
        return digest(BASE_FILE.read_bytes(), *code)


def _few(name: str, arena: Arena, count: int, seed: int) -> Dataset[Any]:
    try:
        return few_shot(arena.train, count, seed=seed)
    except InputError as error:
        raise InputError(f"{error} of {name!r}") from None


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether no other process is inside with the same path; the system forgets those that died."""
    with open(path, "a", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except ImportError:  # not on this system: one process is all that is possible
            pass
        yield True


def digest(*parts: bytes) -> str:
    """A short one."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def applied(vector: TaskVector, base: nn.Module) -> nn.Module:
    """A fine-tuned model again."""
    return vector.apply_to(copy.deepcopy(base))


def world_of(protocol: Protocol, folder: Path, data: Path, **options: Any) -> World:
    """The world that a protocol names; task vectors are kept in `folder`, data sets looked for in `data`.

    The options (device, parallel, workers) are those of the real thing.
    """
    if protocol.setting == "testbed":
        return Testbed(protocol, folder)
    from .clip_world import ClipWorld  # needs torchvision

    return ClipWorld(protocol, folder, data, **options)
