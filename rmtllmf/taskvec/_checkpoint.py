"""Safetensors checkpoints on disk, read piece by piece."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import Tensor

from .._model_files import ModelFiles
from ._sources import Source, Spec


class Checkpoint(Source):
    """A model on disk as a source. Files stay open until `close`.

    Attributes:
        model: its files.
    """

    def __init__(self, path: str | os.PathLike[str], label: str) -> None:
        self.label = label
        self.model = ModelFiles(path, label)
        cpu = torch.device("cpu")
        self.specs = {key: Spec(entry.shape, entry.dtype, cpu) for key, entry in self.model.entries.items()}
        self._local = threading.local()

    def __getitem__(self, key: str) -> Tensor:
        return self.model[key]

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        spec, place = self.specs[key], self.model.places[key]
        width = spec.dtype.itemsize
        offset, length = place.start + start * width, (stop - start) * width
        if buffer.dtype == spec.dtype and buffer.device.type == "cpu":
            self.read_bytes(place.file, offset, buffer.view(torch.uint8))
            return buffer
        stage = getattr(self._local, "stage", None)
        if stage is None or len(stage) < length:
            stage = self._local.stage = torch.empty(length, dtype=torch.uint8, device="cpu")
        self.read_bytes(place.file, offset, stage[:length])
        return buffer.copy_(stage[:length].view(spec.dtype))

    def read_bytes(self, file: int, offset: int, into: Tensor) -> None:
        """Fill a uint8 tensor from a file."""
        self.model.stored[file].read_bytes(offset, into)

    def fingerprint(self) -> list[Any]:
        """What changes when a file does."""
        stats = [os.fstat(file.descriptor) for file in self.model.stored]
        return [
            [str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            for file, stat in zip(self.model.files, stats, strict=True)
        ]

    def check_unchanged(self) -> None:
        """Raise if something was written to a file since it was opened."""
        self.model.check_unchanged()

    def close(self) -> None:
        """Close the files; it cannot be read from any more."""
        self.model.close()
