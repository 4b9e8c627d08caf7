"""Where the engine reads task vectors from: piece by piece, from memory or made on demand."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._sharded import full, is_sharded, local, same_layout
from .._state import ALIGNED, Tensors, all_finite, check_keys, identity, is_bendable
from ..errors import InputError, StateMismatchError


class Spec(NamedTuple):
    """What a tensor is, without its entries."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def calculated_in(self) -> torch.dtype:
        """float64 for float64, else float32: half precision is for storage."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def spec_of(tensor: Tensor) -> Spec:
    """Of a tensor in memory."""
    return Spec(tuple(tensor.shape), tensor.dtype, tensor.device)


class Source(Mapping[str, Tensor]):
    """One task vector, read in pieces. As a mapping, every access makes the whole tensor.

    A subclass sets `label` (what errors call it) and `specs`, and reads. Several threads read at the same time.
    """

    label: str
    specs: Mapping[str, Spec]
    wants_gradient: bool = False

    @abstractmethod
    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        """Entries [start, stop) of the flattened tensor, in the dtype and on the device of `buffer`.

        `buffer`, of that length, may be used for them; what is returned is never written to.
        """

    def view(self, key: str, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The same without a buffer, if it lies in memory as it is wanted."""
        return None

    def sliceable(self, key: str) -> bool:
        """Whether a piece of it costs a piece of the work; else the tensor is read as a whole."""
        return True

    def identity(self, key: str) -> Hashable:
        """Equal for two names of one tensor."""
        return (id(self), key)

    def template(self, key: str) -> Tensor | None:
        """The DTensor that says how the tensor is spread over processes; None if it is not."""
        return None

    def local(self) -> Source | None:
        """What this process holds of it, with the shapes of that; None if every process must make it as a whole."""
        return None

    def in_memory(self) -> Iterator[Stored]:
        """What lies in memory of all that this is made from: nothing may be written there while it is read."""
        return iter(())

    def whole(self, key: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """The tensor in its shape, by default in the dtype it is calculated in; not to be written to."""
        spec = self.specs[key]
        buffer = torch.empty(spec.size, dtype=dtype or spec.calculated_in, device=device or spec.device)
        return self.read(key, 0, spec.size, buffer).view(spec.shape)

    def __getitem__(self, key: str) -> Tensor:
        return self.whole(key).to(self.specs[key].dtype)

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Stored(Source):
    """A mapping of tensors in memory; nothing is copied that is contiguous and of the right dtype."""

    def __init__(self, tensors: Tensors, label: str) -> None:
        for key, tensor in tensors.items():
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
                kind = "on the meta device, without entries" if tensor.is_meta else "sparse or quantised"
                raise InputError(f"{label}[{key!r}] is {kind}; expected a dense tensor")
        self.label, self.given = label, tensors
        self.wants_gradient = any(tensor.requires_grad for tensor in tensors.values())
        self.tensors = {key: tensor.detach() for key, tensor in tensors.items()}
        self.specs = {key: spec_of(tensor) for key, tensor in self.tensors.items()}
        self._flat = {k: t.view(-1) for k, t in self.tensors.items() if not is_sharded(t) and t.is_contiguous()}
        self._gathered: tuple[str, Tensor] | None = None

    def in_memory(self) -> Iterator[Stored]:
        yield self

    def view(self, key: str, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        flat = self._flat.get(key)
        return None if flat is None or flat.dtype != dtype or flat.device != device else flat[start:stop]

    def sliceable(self, key: str) -> bool:
        return key in self._flat

    def identity(self, key: str) -> Hashable:
        return identity(self.given[key])

    def template(self, key: str) -> Tensor | None:
        return self.tensors[key] if is_sharded(self.tensors[key]) else None

    def local(self) -> Source | None:
        return Stored({key: local(tensor) for key, tensor in self.tensors.items()}, self.label)

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        flat = self._flat.get(key)
        part = self._whole(key).reshape(-1)[start:stop] if flat is None else flat[start:stop]
        return part if part.dtype == buffer.dtype and part.device == buffer.device else buffer.copy_(part)

    def whole(self, key: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        return self._whole(key).to(device=device, dtype=dtype or self.specs[key].calculated_in)

    def _whole(self, key: str) -> Tensor:
        """The tensor, put together from all processes if it is spread; the last one is kept for the next piece."""
        tensor = self.tensors[key]
        if not is_sharded(tensor):
            return tensor
        if self._gathered is None or self._gathered[0] != key:
            self._gathered = None
            self._gathered = key, full(tensor)
        return self._gathered[1]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


class Base:
    """The base model that several `Difference`s share: a piece of it is converted and checked once for all of them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._last = threading.local()
        self._local: Base | None = None

    def local(self) -> Base | None:
        """The same for what this process holds of the base."""
        if self._local is None:
            source = self.source.local()
            self._local = None if source is None else Base(source)
        return self._local

    def read(self, key: str, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The piece, valid until the same thread asks for the next."""
        last, wanted = self._last, (key, start, stop, dtype, device)
        if getattr(last, "piece", None) != wanted:
            last.piece = None
            buffer = getattr(last, "buffer", None)
            if buffer is None or len(buffer) < stop - start or buffer.dtype != dtype or buffer.device != device:
                buffer = last.buffer = torch.empty(stop - start, dtype=dtype, device=device)
            last.values = self.source.read(key, start, stop, buffer[: stop - start])
            last.finite = None
            last.piece = wanted
        values: Tensor = last.values
        return values

    def finite(self) -> bool:
        """Whether all of the piece that this thread read last is finite."""
        last = self._last
        if last.finite is None:
            last.finite = all_finite(last.values)
        return bool(last.finite)


class Difference(Source):
    """``model - base``, never held as a whole, but for the names `apart`.

    Where both are the same infinity or NaN nothing changed: 0.
    """

    def __init__(self, base: Base, model: Source, label: str, apart: Container[str] = ()) -> None:
        self.label, self.base, self.model, self.apart = label, base, model, apart
        self.specs = {
            key: spec._replace(dtype=max(spec, model.specs[key], key=_precision).calculated_in)
            for key, spec in base.source.specs.items()
            if key not in apart and is_bendable(key, spec.dtype)
        }

    def in_memory(self) -> Iterator[Stored]:
        yield from self.model.in_memory()
        yield from self.base.source.in_memory()

    def sliceable(self, key: str) -> bool:
        return self.model.sliceable(key) and self.base.source.sliceable(key)

    def identity(self, key: str) -> Hashable:
        return (self.model.identity(key), self.base.source.identity(key))

    def template(self, key: str) -> Tensor | None:
        template, other = self.model.template(key), self.base.source.template(key)
        if not same_layout(template, other):
            raise StateMismatchError(
                f"{self.label}[{key!r}] is not spread over the processes as base is; redistribute one of them"
            )
        return template

    def local(self) -> Source | None:
        base, model = self.base.local(), self.model.local()
        return None if base is None or model is None else Difference(base, model, self.label, self.apart)

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        after = self.model.read(key, start, stop, buffer)
        before = self.base.read(key, start, stop, buffer.dtype, buffer.device)
        if self.base.finite():
            return torch.sub(after, before, out=buffer)
        same = (before == after) | (before.isnan() & after.isnan())
        return torch.where(same, 0.0, after - before)


def _precision(spec: Spec) -> int:
    return spec.calculated_in.itemsize


def sources_of(vectors: Iterable[Tensors], argument: str) -> list[Source]:
    """A source for each vector, with the same names, shapes and kinds of entries; an error unless there is one."""
    if isinstance(vectors, Mapping | str | bytes | Tensor | nn.Module) or not isinstance(vectors, Iterable):
        raise TypeError(
            f"{argument}: expected a sequence of mappings of name -> tensor, got a single {type(vectors).__name__}"
        )
    sources = [source_of(vector, f"{argument}[{index}]") for index, vector in enumerate(vectors)]
    if not sources:
        raise InputError(f"{argument}: expected at least one mapping of name -> tensor, got an empty sequence")
    for source in sources[1:]:
        check_same(source, sources[0])
    return sources


def source_of(vector: object, label: str) -> Source:
    """`vector` itself if it is a source, else the tensors of a mapping."""
    if isinstance(vector, Source):
        return vector
    if not isinstance(vector, Mapping):
        raise TypeError(f"{label}: expected a mapping of name -> tensor, got {type(vector).__name__}")
    tensors = dict(vector.items())  # read once: it may make its tensors on access
    for key, tensor in tensors.items():
        if not isinstance(key, str):
            raise TypeError(f"{label}: expected names as keys, got {key!r} of type {type(key).__name__}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label}[{key!r}]: expected a tensor, got {type(tensor).__name__}")
    return Stored(tensors, label)


def check_same(source: Source, reference: Source) -> None:
    """Raise unless both vectors have the same names, shapes and kinds of entries."""
    check_keys(source.specs, reference.specs, source.label, reference.label, ALIGNED)
    for key, spec in source.specs.items():
        other = reference.specs[key]
        if spec == other:
            continue
        if spec.shape != other.shape:
            raise StateMismatchError(
                f"{source.label}[{key!r}] has shape {spec.shape}; {reference.label} has {other.shape}"
            )
        if is_bendable(key, spec.dtype) != is_bendable(key, other.dtype):
            raise StateMismatchError(f"{source.label}[{key!r}] is {spec.dtype}; {reference.label} has {other.dtype}")
