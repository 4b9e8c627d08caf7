"""Safetensors checkpoints on disk, read piece by piece: one file, or the shards that a Hugging Face index names.

The header is read here and not by the safetensors package, because pieces are read with ``preadv`` straight into small
buffers that are used again: nothing is mapped, so that what has been read does not count as this process's memory.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._state import quoted
from ..errors import InputError
from ._sources import Source, Spec

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors package


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
        self.specs: dict[str, Spec] = {}
        self.places: dict[str, Place] = {}
        self.descriptors: list[int] = []
        self._local = threading.local()
        try:
            for number, file in enumerate(self.files):
                self.descriptors.append(os.open(file, os.O_RDONLY))
                entries = read_header(self.descriptors[-1], f"{label}: {file}")
                for key, (spec, start, stop) in entries.items():
                    if key in self.specs:
                        other = self.files[self.places[key].file]
                        raise InputError(f"{label}: {key!r} is in {other.name!r} and in {file.name!r}")
                    self.specs[key], self.places[key] = spec, Place(number, start, stop)
            if index is not None:
                self._check(index)
            self._stamps = self._stamped()
        except BaseException:
            self.close()
            raise

    def _check(self, index: Mapping[str, str]) -> None:
        held = {key: self.files[place.file].name for key, place in self.places.items()}
        for key in sorted({*index, *held}):
            if index.get(key) != held.get(key):
                raise InputError(
                    f"{self.label}: the index says that {key!r} is in {index.get(key)!r}; it is in {held.get(key)!r}"
                )

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
        memory: Any = memoryview(into.numpy())  # type: ignore[arg-type]
        while len(memory):
            count = os.preadv(self.descriptors[file], [memory], offset)
            if count == 0:
                raise InputError(f"{self.label}: {self.files[file].name!r} was cut short while it was read")
            memory, offset = memory[count:], offset + count

    def fingerprint(self) -> list[Any]:
        """What changes when a file does."""
        stats = [os.fstat(descriptor) for descriptor in self.descriptors]
        return [
            [str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            for file, stat in zip(self.files, stats, strict=True)
        ]

    def check_unchanged(self) -> None:
        """Raise if something was written to a file since it was opened."""
        if self._stamped() != self._stamps:
            raise InputError(f"{self.label}: its file was changed while it was read")

    def _stamped(self) -> list[tuple[int, int]]:
        stats = [os.fstat(descriptor) for descriptor in self.descriptors]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def close(self) -> None:
        """Close the files; it cannot be read from any more."""
        while self.descriptors:
            os.close(self.descriptors.pop())


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
        elif where / "model.safetensors" in singles or len(singles) == 1:
            where = where / "model.safetensors" if where / "model.safetensors" in singles else singles[0]
        else:
            raise InputError(
                f"{label}: expected one .safetensors file or one .safetensors.index.json in {str(where)!r}, found "
                f"{quoted(file.name for file in [*indices, *singles]) or 'none'}"
            )
    if not where.is_file():
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        index = dict(content["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{label}: {str(path)!r} is no index of safetensors shards") from None
    for key, name in index.items():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise InputError(
                f"{label}: the index names the shard {name!r}; expected the plain name of a file beside it"
            )
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{label}: the shard {name!r} that the index names for {key!r} is missing")
    if not index:
        raise InputError(f"{label}: {str(path)!r} names no tensors")
    return index


def read_header(descriptor: int, label: str) -> dict[str, tuple[Spec, int, int]]:
    """Name -> (spec, first byte, byte after the last) of a safetensors file; nothing is believed."""
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, 8, 0)
    if len(start) < 8:
        raise InputError(f"{label} is no safetensors file: it is {size} bytes long")
    (length,) = struct.unpack("<Q", start)
    if length > min(LONGEST_HEADER, size - 8):
        raise InputError(f"{label} is no safetensors file: its header would be {length} bytes long")
    try:
        header = json.loads(os.pread(descriptor, length, 8).decode("utf-8"), object_pairs_hook=_without_duplicates)
        "".join(header).encode("utf-8")  # JSON may hold halves of characters, which nothing could write again
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{label} is no safetensors file: its header cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise InputError(f"{label} is no safetensors file: its header is no mapping")
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise InputError(f"{label}: its metadata is no mapping")
    first, data = 8 + length, size - 8 - length
    entries = {key: _entry(key, value, first, data, label) for key, value in header.items()}
    end = first
    for key, (_, begin, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin != end:
            raise InputError(f"{label}: the bytes of {key!r} overlap those of another tensor, or leave a gap")
        end = stop
    if end != size:
        raise InputError(f"{label}: {size - end} bytes at its end belong to no tensor")
    return entries


def _entry(key: str, value: Any, first: int, data: int, label: str) -> tuple[Spec, int, int]:
    try:
        name, shape, (begin, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, stop]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{label}: the entry {key!r} of its header makes no sense") from None
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers) or not begin <= stop <= data:
        raise InputError(f"{label}: the entry {key!r} has the shape {shape!r} and the offsets {begin!r} to {stop!r}")
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"{label}: {key!r} is of dtype {name!r}; known are {', '.join(DTYPES)}")
    if prod(shape) * DTYPES[name].itemsize != stop - begin:
        raise InputError(f"{label}: {key!r} of shape {shape} and dtype {name} cannot take {stop - begin} bytes")
    return Spec(tuple(shape), DTYPES[name], torch.device("cpu")), first + begin, first + stop


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name comes twice")
    return result
