"""The task vector of an adapter as a source: a sum of parts for every name, made when it is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._safetensors import TensorFile
from .._state import StateLike, as_state, identity, is_bendable, quoted
from ..errors import InputError, StateMismatchError
from ._checkpoint import Checkpoint
from ._sources import Source, Spec

Read = Callable[[torch.dtype], Tensor]


class Part(NamedTuple):
    """What is added to one tensor of the base model: `make` it in float32 or float64."""

    spec: Spec
    make: Callable[[torch.dtype], Tensor]


class Lazy(Source):
    """A source whose tied names give one tensor when all are read at once: whoever copies it keeps the ties."""

    def items(self) -> ItemsView[str, Tensor]:
        return _Items(self)


class _Items(ItemsView[str, Tensor]):
    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.source = source

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        uses = Counter(self.source.identity(key) for key in self.source)
        made: dict[Hashable, Tensor] = {}  # of the tied ones only: the others are not kept here
        for key in self.source:
            name = self.source.identity(key)
            tensor = made[name] if name in made else self.source[key]
            if uses[name] > 1:
                made[name] = tensor
            yield key, tensor


class AdapterVector(Lazy):
    """The task vector of an adapter: nothing is held but the factors, and one matrix is made when it is read."""

    def __init__(self, parts: Mapping[str, Sequence[Part]], label: str, ties: Mapping[str, str]) -> None:
        self.label, self.parts, self.ties = label, dict(parts), dict(ties)
        self.specs = {
            key: some[0].spec._replace(dtype=max((part.spec.calculated_in for part in some), key=lambda d: d.itemsize))
            for key, some in self.parts.items()
        }

    def sliceable(self, key: str) -> bool:
        return False

    def identity(self, key: str) -> Hashable:
        return (id(self), self.ties.get(key, key))

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        dtype = torch.promote_types(buffer.dtype, self.specs[key].dtype)
        with torch.no_grad():
            first, *more = (part.make(dtype) for part in self.parts[key])
            whole = sum((other.to(first.device) for other in more), first).reshape(-1)[start:stop]
        return whole if whole.dtype == buffer.dtype and whole.device == buffer.device else buffer.copy_(whole)

    def __repr__(self) -> str:
        return f"<task vector of {self.label}: {len(self)} tensors, made when they are read>"


class StoredFile(TensorFile):
    """The tensors of a safetensors file, each read when it is asked for; shapes and dtypes without reading."""

    def __init__(self, path: str, label: str, *, inside: str | None = None) -> None:
        super().__init__(path, label, inside=inside)
        self.specs = {key: Spec(entry.shape, entry.dtype, torch.device("cpu")) for key, entry in self.entries.items()}


class BaseModel:
    """The base model where one is given: what replaced tensors are compared with, and how layers store theirs."""

    def __init__(self, base: StateLike) -> None:
        self.modules = dict(base.named_modules()) if isinstance(base, nn.Module) else {}
        self.state: Mapping[str, Tensor]
        if isinstance(base, str | os.PathLike):
            self.state = Checkpoint(base, "base")
        elif isinstance(base, Source):
            self.state = base
        else:
            self.state = as_state(base, "base")

    def __contains__(self, key: str) -> bool:
        return key in self.state

    def spec(self, key: str) -> Spec:
        if isinstance(self.state, Source):
            return self.state.specs[key]
        tensor = self.state[key]
        return Spec(tuple(tensor.shape), tensor.dtype, tensor.device)

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        return self.state[key].detach().to(dtype)

    def twins(self, keys: Iterable[str]) -> dict[str, str]:
        """A name -> the first of `keys` that is the same memory, where there is another."""
        first: dict[Hashable, str] = {}
        ties = {}
        for key in keys:
            if key in self.state:
                name = self.state.identity(key) if isinstance(self.state, Source) else identity(self.state[key])
                ties[key] = first.setdefault(name, key)
        return {key: twin for key, twin in ties.items() if key != twin}


def reader(weights: Mapping[str, Tensor], key: str) -> Read:
    """What reads one tensor in the dtype asked for."""
    return lambda dtype: weights[key].to(dtype)


def combined(
    added: Mapping[str, list[Part]], replaced: Mapping[str, tuple[Spec, Read]], base: BaseModel | None, label: str
) -> AdapterVector:
    """The vector of what is added to tensors and what is given in their place; ties of the base are kept."""
    replaced = {key: (spec, read) for key, (spec, read) in replaced.items() if is_bendable(key, spec.dtype)}
    if base is None:
        if replaced:
            raise InputError(
                f"{label}: gives {quoted(replaced)} as a whole (modules_to_save, bias or saved embeddings), whose "
                "difference needs the base model; pass base="
            )
        return AdapterVector(added, label, {})
    ties = base.twins([*added, *replaced])
    sums: dict[str, list[Part]] = {}
    owner: dict[str, str] = {}
    for key, some in added.items():
        root = ties.get(key, key)
        if owner.setdefault(root, key) != key:
            raise InputError(
                f"{label}: adapts both {owner[root]!r} and {key!r}, which are one tensor in base; untie them first"
            )
        sums.setdefault(root, []).extend(some)
    for key, (spec, read) in replaced.items():
        root = ties.get(key, key)
        if (first := owner.setdefault(f"whole {root}", key)) == key:
            sums.setdefault(root, []).append(_replacement(spec, read, base, key))
        elif not torch.equal(replaced[first][1](torch.float64), read(torch.float64)):
            raise InputError(
                f"{label}: {first!r} and {key!r} are one tensor in base, but two here; untie them there first"
            )
    return AdapterVector({key: sums[ties.get(key, key)] for key in dict.fromkeys([*added, *replaced])}, label, ties)


def _replacement(spec: Spec, read: Read, base: BaseModel, key: str) -> Part:
    """The part of a tensor that is given as a whole: what it is minus the base's."""
    if key not in base:
        raise StateMismatchError(f"base lacks {key!r}, which the adapter replaces")
    if base.spec(key).shape != spec.shape:
        raise StateMismatchError(f"base[{key!r}] has shape {base.spec(key).shape}; the adapter has {spec.shape}")

    def make(dtype: torch.dtype) -> Tensor:
        after = read(dtype)
        return after - base.read(key, dtype).to(after.device)

    return Part(spec, make)
