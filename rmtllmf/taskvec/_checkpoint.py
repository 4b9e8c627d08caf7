"""Safetensors checkpoints on disk, read piece by piece: one file, or the shards that a Hugging Face index names."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._safetensors import TensorFile
from .._state import quoted
from .._untrusted import brief, check_inside, read_json
from ..errors import InputError
from ._sources import Source, Spec


class Place(NamedTuple):
    """Where the bytes of a tensor lie: in which file, and from where to where."""

    file: int
    start: int
    stop: int


class Checkpoint(Source):
    """A model on disk. Files stay open until `close`."""

    def __init__(self, path: str | os.PathLike[str], label: str) -> None:
        self.label = label
        self.files, index = files_of(path, label)
        self.folder = Path(path) if Path(path).is_dir() else None  # what was asked for
        inside = None if index is None and self.folder is None else self.files[0].parent
        self.specs: dict[str, Spec] = {}
        self.places: dict[str, Place] = {}
        self.stored: list[TensorFile] = []
        self._local = threading.local()
        try:
            for number, file in enumerate(self.files):
                self.stored.append(TensorFile(file, label, inside=inside))
                for key, entry in self.stored[-1].entries.items():
                    if key in self.specs:
                        other = self.files[self.places[key].file]
                        raise InputError(f"{label}: {key!r} is in {other.name!r} and in {file.name!r}")
                    self.specs[key] = Spec(entry.shape, entry.dtype, torch.device("cpu"))
                    self.places[key] = Place(number, entry.start, entry.stop)
            if index is not None:
                self._check(index)
        except BaseException:
            self.close()
            raise

    def _check(self, index: Mapping[str, str]) -> None:
        held = {key: self.files[place.file].name for key, place in self.places.items()}
        for key in sorted({*index, *held}):
            if index.get(key) != held.get(key):
                raise InputError(
                    f"{self.label}: the index says that {brief(key)} is in {index.get(key)!r}; it is in "
                    f"{held.get(key)!r}"
                )

    def __getitem__(self, key: str) -> Tensor:
        return self.stored[self.places[key].file][key]

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        spec, place = self.specs[key], self.places[key]
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
        self.stored[file].read_bytes(offset, into)

    def fingerprint(self) -> list[Any]:
        """What changes when a file does."""
        stats = [os.fstat(file.descriptor) for file in self.stored]
        return [
            [str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            for file, stat in zip(self.files, stats, strict=True)
        ]

    def check_unchanged(self) -> None:
        """Raise if something was written to a file since it was opened."""
        for file in self.stored:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files; it cannot be read from any more."""
        for file in self.stored:
            file.close()


def checked_path(path: object, argument: str) -> Path:
    """A path, for sure."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(
            f"{argument}: expected a path, got {type(path).__name__}; `fuse` is for models that are in memory"
        )
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise InputError(f"{argument}: expected a path, got {os.fspath(path)!r}")
    return Path(path)


def files_of(path: str | os.PathLike[str], label: str) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a checkpoint, and name -> file name if an index says so."""
    where = checked_path(path, label)
    if where.is_dir():
        indices = sorted(where.glob("*.safetensors.index.json"))
        singles = sorted(where.glob("*.safetensors"))
        preferred = where / "model.safetensors.index.json"
        if preferred in indices or len(indices) == 1:
            where = preferred if preferred in indices else indices[0]
            check_inside(where, where.parent, label)
        elif where / "model.safetensors" in singles or len(singles) == 1:
            where = where / "model.safetensors" if where / "model.safetensors" in singles else singles[0]
        else:
            raise InputError(
                f"{label}: expected one .safetensors file or one .safetensors.index.json in {str(where)!r}, found "
                f"{quoted(file.name for file in [*indices, *singles]) or 'none'}"
            )
    if not where.exists():
        raise FileNotFoundError(f"{label}: there is no file {str(where)!r}")
    if where.name.endswith(".safetensors.index.json"):
        index = _index(where, label)
        return [where.parent / name for name in sorted(set(index.values()))], index
    if not where.name.endswith(".safetensors"):
        raise InputError(
            f"{label}: expected a .safetensors file, a .safetensors.index.json or a folder with one of them, got "
            f"{str(where)!r}; nothing else is read, because it could hold code"
        )
    return [where], None


def _index(path: Path, label: str) -> dict[str, str]:
    content = read_json(path, label)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict):
        raise InputError(f"{label}: {str(path)!r} is no index of safetensors shards: it has no weight_map")
    for name in index.values():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise InputError(
                f"{label}: the index names the shard {brief(name)}; expected the plain name of a file beside it"
            )
    for name, key in {name: key for key, name in index.items()}.items():
        if not os.path.exists(path.parent / name):
            raise FileNotFoundError(
                f"{label}: the shard {brief(name)} that the index names for {brief(key)} is missing"
            )
    if not index:
        raise InputError(f"{label}: {str(path)!r} names no tensors")
    return index
