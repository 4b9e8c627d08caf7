"""Safetensors files: read without believing what they say of themselves, and written.

The header is read here and not by the safetensors package, and tensors are read with ``preadv`` and not mapped into
memory: what was checked cannot change any more, a file that is cut short is an error and not the end of the process,
and what was read piece by piece does not count as this process's memory.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._untrusted import StrPath, brief, naming, opened, parsed
from .errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
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
LONGEST_NAME = 4096  # characters: errors repeat it
MOST_DIMENSIONS = 64  # as in NumPy
_LFS = b"version https://git-lfs.github.com/spec/"
_AGAIN = "Copy or download it again"


class Entry(NamedTuple):
    """What a tensor in a file is, and where its bytes lie."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for, by any thread, into memory of its own.

    With `inside` the file must lie in that folder, links followed. It stays open until `close`, or as long as this.

    Attributes:
        entries: name -> `Entry`.
        metadata: name -> string.
    """

    def __init__(self, path: StrPath, label: str, *, inside: StrPath | None = None) -> None:
        self.path, self.label = os.fspath(path), f"{label}: {os.fspath(path)!r}"
        self.descriptor = opened(path, label, inside=inside)
        self._open = weakref.finalize(self, os.close, self.descriptor)
        self._one_at_a_time = threading.Lock()  # where the system has no preadv
        try:
            self._stamp = self._now()
            self.entries, self.metadata = read_header(self.descriptor, self.label)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, key: str) -> Tensor:
        entry = self.entries[key]
        try:
            flat = torch.empty(entry.stop - entry.start, dtype=torch.uint8, device="cpu")
        except RuntimeError:  # a file with holes is larger than a disk
            raise InputError(f"{self.label}: {key!r} has {entry.stop - entry.start} bytes, too many to read") from None
        self.read_bytes(entry.start, flat)
        if entry.dtype == torch.bool and flat.numel() and int(flat.max()) > 1:
            raise InputError(f"{self.label}: {key!r} is of dtype BOOL, but holds {int(flat.max())}; expected 0 and 1")
        return flat.view(entry.dtype).view(entry.shape)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read_bytes(self, offset: int, into: Tensor) -> None:
        """Fill a uint8 tensor from the file."""
        if not self._open.alive:
            raise InputError(f"{self.label} is closed; expected it to be read before")
        memory = memoryview(into.numpy())  # type: ignore[arg-type]
        while len(memory):
            count = self._read(memory, offset)
            if count == 0:
                raise InputError(f"{self.label} was cut short while it was read")
            memory, offset = memory[count:], offset + count

    def _read(self, memory: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [memory], offset)
        with self._one_at_a_time:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            part = os.read(self.descriptor, min(len(memory), 1 << 24))
        memory[: len(part)] = part
        return len(part)

    def check_unchanged(self) -> None:
        """Raise if something was written to the file since it was opened."""
        if self._now() != self._stamp:
            raise InputError(f"{self.label} was changed while it was read")

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        """Close the file; it cannot be read from any more."""
        self._open()

    __eq__ = object.__eq__  # comparing tensors has no single answer
    __hash__ = object.__hash__


def read_header(descriptor: int, label: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Name -> entry, and the metadata, of a safetensors file; nothing is believed."""
    size = os.fstat(descriptor).st_size
    start = _first_bytes(descriptor, 0, 8 + len(_LFS))
    if start.startswith(_LFS):
        raise InputError(
            f"{label} is a Git LFS pointer, which stands for the file that it names; fetch that with `git lfs pull`"
        )
    if len(start) < 8:
        raise InputError(f"{label} is no safetensors file: it is {size} bytes long")
    (length,) = struct.unpack("<Q", start[:8])
    if length > min(LONGEST_HEADER, size - 8):
        problem = f"its header would be {length} bytes long"
        if length <= LONGEST_HEADER and start[8:9] == b"{":
            raise InputError(f"{label} is truncated: it ends after {size} bytes, but {problem}. {_AGAIN}")
        raise InputError(f"{label} is no safetensors file: {problem}")
    header = parsed(_first_bytes(descriptor, 8, length), f"{label} is no safetensors file: its header cannot be read")
    if not isinstance(header, dict):
        raise InputError(f"{label} is no safetensors file: its header is no mapping")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise InputError(f"{label}: its metadata is no mapping of name -> string")
    first, data = 8 + length, size - 8 - length
    entries = {key: _entry(key, value, first, data, label) for key, value in header.items()}
    end = first
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise InputError(f"{label}: the bytes of {key!r} overlap those of another tensor, or leave a gap")
        end = entry.stop
    if end != size:
        raise InputError(f"{label}: {size - end} bytes at its end belong to no tensor")
    return entries, metadata


def _first_bytes(descriptor: int, start: int, length: int) -> bytes:
    os.lseek(descriptor, start, os.SEEK_SET)
    parts = []
    while length and (part := os.read(descriptor, length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _entry(key: str, value: Any, first: int, data: int, label: str) -> Entry:
    if len(key) > LONGEST_NAME:
        raise InputError(f"{label}: {brief(key)} is a name of {len(key)} characters; expected {LONGEST_NAME} at most")
    try:
        name, shape, (begin, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, stop]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{label}: the entry {key!r} of its header makes no sense") from None
    sane = type(shape) is list and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    if sane and begin <= stop and stop > data:
        raise InputError(
            f"{label} is truncated: it ends before the data of {key!r}, of the offsets {begin} to {stop}: only {data} "
            f"bytes of data are there. {_AGAIN}"
        )
    if not sane or not begin <= stop:
        raise InputError(
            f"{label}: the entry {key!r} has the shape {brief(shape)} and the offsets {brief(begin)} to {brief(stop)}"
        )
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"{label}: {key!r} is of dtype {brief(name)}; known are {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    if len(shape) > MOST_DIMENSIONS:
        raise InputError(f"{label}: {key!r} has {len(shape)} dimensions; expected {MOST_DIMENSIONS} at most")
    size = dtype.itemsize
    for width in shape:
        size *= max(width, 1)  # beside a dimension of 0, too, the others must be numbers that torch can multiply
    if size >= 1 << 63 or (0 if 0 in shape else size) != stop - begin:
        raise InputError(f"{label}: {key!r} of shape {shape} and dtype {name} cannot take {stop - begin} bytes")
    return Entry(tuple(shape), dtype, first + begin, first + stop)


def header_of(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file of tensors of these dtypes and shapes, and where in it each of them goes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets = {}
    at = 0
    # the format wants wide entries first, so that all are aligned
    for key in sorted(tensors, key=lambda key: (-tensors[key][0].itemsize, key)):
        dtype, shape = tensors[key]
        if dtype not in NAMES or key == "__metadata__" or len(key) > LONGEST_NAME:
            raise InputError(f"a safetensors file cannot hold {brief(key)} of {dtype}; known are {', '.join(DTYPES)}")
        stop = at + dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        offsets[key], at = (at, stop), stop
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a safetensors file cannot hold a name with half a character ({error})") from None
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise InputError(f"the names and shapes take {len(text)} bytes; a safetensors file holds {LONGEST_HEADER}")
    first = 8 + len(text)
    places = {
        key: Entry(tuple(tensors[key][1]), tensors[key][0], first + begin, first + stop)
        for key, (begin, stop) in offsets.items()
    }
    return struct.pack("<Q", len(text)) + text, places


def write(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, which is on disk when this returns; an ``OSError`` names it."""
    header, places = header_of({key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}, metadata)
    with naming(path), open(path, "wb") as file:
        file.write(header)
        for key in places:
            flat = tensors[key].detach().to("cpu").contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
