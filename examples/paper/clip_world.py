"""The real thing: an open_clip model, the paper's eight data sets, and models fine-tuned here or by others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, Subset

from rmtllmf.clip import (
    DATASETS,
    PUBLISHED,
    OpenClip,
    load,
    load_dataset,
    load_finetuned,
    zero_shot_head,
)
from rmtllmf.taskvec import TaskVector

from .finetune import finetune
from .protocol import Protocol
from .world import Arena, World, digest

TEMPLATES = ("a photo of a {}.",)  # for public pictures, of which nothing but their classes is known


class ClipWorld(World):
    """An open_clip image encoder with zero-shot heads."""

    test_batch = 128

    def __init__(
        self,
        protocol: Protocol,
        folder: Path,
        data: Path,
        *,
        device: torch.device | str = "cpu",
        parallel: str | None = None,
        workers: int = 0,
    ) -> None:
        unknown = [name for name in protocol.tasks if name not in DATASETS]
        if unknown:
            raise ValueError(f"tasks: unknown data set {unknown[0]!r}; known are {', '.join(DATASETS)}")
        _check_sources(protocol)
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise ValueError(f"device: torch knows no {str(device)!r}; expected one such as cpu or cuda") from None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: torch sees no GPU here, got {str(device)!r}")
        super().__init__(protocol, folder)
        self.data, self.parallel, self.workers = data, parallel, workers

    @cached_property
    def clip(self) -> OpenClip:
        """The whole model: its text tower makes the heads."""
        return load(self.protocol.model, self.protocol.pretrained or None, device=self.device)

    @cached_property
    def base(self) -> nn.Module:
        """The image encoder."""
        return self.clip.model.visual.eval()

    def load(self, name: str) -> Arena:
        """A data set with its zero-shot head."""
        clip = self.clip
        found = load_dataset(name, self.data, train_transform=clip.train_transform, transform=clip.transform)
        head = zero_shot_head(clip.model, found.classes, found.templates, tokenizer=clip.tokenizer)
        return Arena(head, self._capped(found.train), self._capped(found.test))

    def tuned(self, name: str, seed: int) -> nn.Module:
        """The encoder fine-tuned on a data set; a run that was interrupted goes on where it was."""
        arena, protocol = self.arena(name), self.protocol
        return finetune(
            self.base,
            arena.head,
            arena.train,
            steps=protocol.finetuning_steps,
            batch_size=protocol.finetuning_batch,
            lr=protocol.finetuning_lr,
            warmup=protocol.finetuning_steps // 4,  # 500 of 2,000
            seed=seed,
            checkpoint=self.kept(name, seed).with_suffix(".run"),
            parallel=self.parallel,
            workers=self.workers,
            progress=self.progress,
        )

    def prepare(self, seeds: Sequence[int]) -> None:
        """All processes of a torchrun fine-tune together what is missing; without this, each takes its own tasks."""
        for seed in seeds:
            for name in self.protocol.tasks if self.protocol.finetuned == "own" else ():
                path = self.kept(name, seed)
                if path.exists():
                    continue
                tuned = self.tuned(name, seed)
                if dist.get_rank() == 0:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    TaskVector.between(self.base, tuned).save(path)
                dist.barrier()  # the others look for it from here on

    def given(self, name: str) -> dict[str, torch.Tensor] | None:
        """A model that others have fine-tuned, if the protocol says so."""
        where = self.protocol.finetuned
        if where == "own":
            return None
        return load_finetuned(PUBLISHED[name].name if where == "published" else Path(where) / name, self.base)

    def public(self) -> Arena:
        """Pictures in a folder of one folder a class, such as ImageNet's."""
        from torchvision.datasets import ImageFolder

        data = ImageFolder(self.protocol.shots_from, self.clip.train_transform)
        names = [name.replace("_", " ") for name in data.classes]
        return Arena(zero_shot_head(self.clip.model, names, TEMPLATES, tokenizer=self.clip.tokenizer), data, data)

    @cached_property
    def _digest(self) -> str:
        state = self.clip.model.state_dict()
        return digest(*(part for name in sorted(state) for part in (name.encode(), _bytes(state[name]))))

    def identity(self) -> str:
        """Also of the kind of device, which decides last bits, and of what is in folders that the protocol names."""
        return self._identity

    def origin(self) -> str:
        """A digest of the weights of both towers: one is the base, the other makes the heads."""
        return self._digest

    @cached_property
    def _identity(self) -> str:
        protocol, parts = self.protocol, [self._digest.encode(), self.device.type.encode()]
        if protocol.finetuned not in ("own", "published"):
            for name in protocol.tasks:
                parts += [part for path in _files(Path(protocol.finetuned) / name) for part in _named(path)]
        if protocol.shots_from != "tasks":
            root = Path(protocol.shots_from)
            parts += [f"{path.relative_to(root).as_posix()} {path.stat().st_size}".encode() for path in _files(root)]
        return digest(*parts)

    def _capped(self, data: Dataset[Any]) -> Dataset[Any]:
        """At most so many images, evenly spread: where files are sorted by class, over the classes."""
        most, size = self.protocol.images, len(data)  # type: ignore[arg-type]
        if not most or size <= most:
            return data
        return Subset(data, [index * size // most for index in range(most)])


def _check_sources(protocol: Protocol) -> None:
    """Whether all that the protocol takes from others is there, before hours are spent."""
    where = protocol.finetuned
    for name in () if where == "own" else protocol.tasks:
        if where == "published" and name not in PUBLISHED:
            raise ValueError(f"finetuned: no published model of {name!r}; there are {', '.join(PUBLISHED)}")
        if where != "published" and not (Path(where) / name).is_dir():
            raise FileNotFoundError(f"finetuned: there is no folder {name!r} in {where!r}; expected one for each task")
    if protocol.shots_from != "tasks" and not Path(protocol.shots_from).is_dir():
        raise FileNotFoundError(
            f"shots_from: expected 'tasks' or a folder of one folder a class, got {protocol.shots_from!r}"
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _named(path: Path) -> tuple[bytes, bytes]:
    """Name and content of a file, the latter as a digest, so that one model at a time is in memory."""
    with open(path, "rb") as file:
        return path.name.encode(), hashlib.file_digest(file, "sha256").digest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
