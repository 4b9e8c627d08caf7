"""Where the engine writes the fused update: fresh memory, the caller's memory, or on top of a base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._sharded import is_sharded, local, same_layout
from .._state import Tensors, all_finite, check_keys, identity, memory_of, overflows
from ..errors import InputError, NonFiniteError, StateMismatchError
from ._sources import Base, Source, Spec, spec_of


class Sink(ABC):
    """Told once what comes, then given it piece by piece, by several threads, in any order."""

    @abstractmethod
    def open(self, specs: Mapping[str, Spec], alias: Mapping[str, str], sources: list[Source]) -> None:
        """`specs` of what is written, with the dtype that the update should have; `alias`: names tied to these."""

    @property
    def finished(self) -> Container[str]:
        """Names that need not be calculated: an earlier run has written them."""
        return frozenset()

    def identity(self, key: str) -> Hashable:
        """Equal for two names that must be tied for their updates to make one result."""
        return None

    def target(self, key: str, start: int, stop: int) -> Tensor | None:
        """Memory in which the update may be calculated, and which is its place: or None."""
        return None

    @abstractmethod
    def write(self, key: str, start: int, update: Tensor) -> bool:
        """Take entries from `start` on, in the dtype of the calculation; False if they are not finite.

        `update` may be written to.
        """

    @abstractmethod
    def done(self) -> Any:
        """The result, after the last piece."""

    @abstractmethod
    def local(self) -> Sink:
        """A sink for what this process holds of tensors that are spread over several."""

    def check_layout(  # noqa: B027 (fresh memory and files have nothing to check)
        self, keys: Sequence[str], templates: Mapping[str, Tensor]
    ) -> None:
        """Raise unless what is written to (or added to) is spread over the processes like `templates`."""


class Storage(Sink):
    """A sink that keeps what it is given."""

    @abstractmethod
    def put(self, key: str, start: int, values: Tensor) -> None:
        """Keep entries from `start` on, finite or not; an error if they overflow the dtype that they are kept in."""

    def write(self, key: str, start: int, update: Tensor) -> bool:
        if not all_finite(update):
            return False
        self.put(key, start, update)
        return True

    def local(self) -> Storage:
        """The same for what this process holds of tensors that are spread over several."""
        raise InputError(f"tensors that are spread over several processes cannot be written by {type(self).__name__}")


class Memory(Storage):
    """Tensors of the update: fresh ones, or the caller's, in which there is `rest` beside the update."""

    def __init__(self, out: Mapping[str, Tensor] | None = None, rest: Tensors | None = None) -> None:
        self.out, self.rest = out, rest

    def open(self, specs: Mapping[str, Spec], alias: Mapping[str, str], sources: list[Source]) -> None:
        if self.out is None:
            self.tensors = {k: torch.empty(s.shape, dtype=s.dtype, device=s.device) for k, s in specs.items()}
        else:
            rest, same = self._carried(specs, alias)
            check_out(self.out, {**specs, **rest}, {**alias, **same}, sources)
            self.tensors = {key: self.out[key].detach() for key in specs}
        self.specs, self.alias = specs, alias
        self.flat = {key: tensor.view(-1) for key, tensor in self.tensors.items() if tensor.is_contiguous()}

    def _carried(self, specs: Mapping[str, Spec], alias: Mapping[str, str]) -> tuple[dict[str, Spec], dict[str, str]]:
        """What is carried over beside the update, and what of it is tied to something."""
        rest = self.rest or {}
        known = {identity(rest[key]): key for key in specs if key in rest}
        carried: dict[str, Spec] = {}
        same: dict[str, str] = {}
        for key in rest:
            if key not in specs and key not in alias:
                original = known.setdefault(identity(rest[key]), key)
                if original == key:
                    carried[key] = spec_of(rest[key])
                else:
                    same[key] = original
        return carried, same

    def local(self) -> Memory:
        out = self.out
        rest = None if self.rest is None else local_parts(self.rest)
        return Memory(local_parts(out) if isinstance(out, Mapping) else out, rest)

    def check_layout(self, keys: Sequence[str], templates: Mapping[str, Tensor]) -> None:
        like = {**(self.rest or {}), **templates}
        for key, tensor in self.out.items() if isinstance(self.out, Mapping) else ():
            if isinstance(tensor, Tensor):
                check_layout(f"out[{key!r}]", tensor, like.get(key))

    def target(self, key: str, start: int, stop: int) -> Tensor | None:
        flat = self.flat.get(key)
        return None if flat is None else flat[start:stop]

    def put(self, key: str, start: int, values: Tensor) -> None:
        place = self.target(key, start, start + len(values))
        if place is None:
            tensor = self.tensors[key]
            index = torch.arange(start, start + len(values), device=tensor.device)
            tensor[torch.unravel_index(index, tensor.shape)] = values.to(tensor.device, tensor.dtype)
            place = values.to(tensor.dtype)
        elif place.data_ptr() != values.data_ptr():
            place.copy_(values)
        if place.dtype != values.dtype and overflows(values, place):
            raise NonFiniteError(f"the fused {key!r} overflows {place.dtype}")

    def done(self) -> dict[str, Tensor]:
        result = dict(self.tensors)
        for key, original in self.alias.items():
            if self.out is None or identity(self.out[key]) == identity(self.out[original]):
                result[key] = result[original]
            else:
                result[key] = self.out[key].detach().copy_(result[original])
        return result


class Applied(Sink):
    """The base model plus the update, in the base's dtype unless another is asked for, written to another sink."""

    def __init__(self, base: Base, inner: Storage, dtype: torch.dtype | None = None) -> None:
        self.base, self.inner, self.dtype = base, inner, dtype

    def open(self, specs: Mapping[str, Spec], alias: Mapping[str, str], sources: list[Source]) -> None:
        """The fused entries only: what the update does not name is the caller's to carry over."""
        origin = self.base.source.specs
        models = {key: spec._replace(dtype=self.dtype or origin[key].dtype) for key, spec in specs.items()}
        self.inner.open(models, alias, [*sources, self.base.source])

    @property
    def finished(self) -> Container[str]:
        return self.inner.finished

    def identity(self, key: str) -> Hashable:
        return self.base.source.identity(key)

    def write(self, key: str, start: int, update: Tensor) -> bool:
        before = self.base.read(key, start, start + len(update), update.dtype, update.device)
        place = self.inner.target(key, start, start + len(update))
        if place is None or place.dtype != update.dtype or place.device != update.device:
            place = torch.empty_like(update)
        model = torch.add(update, before, out=place)
        # a finite model is made from what is finite; what is not finite in the base stays so
        if not all_finite(model) and (self.base.finite() or not all_finite(update)):
            return False
        self.inner.put(key, start, model)
        return True

    def done(self) -> Any:
        return self.inner.done()

    def check_layout(self, keys: Sequence[str], templates: Mapping[str, Tensor]) -> None:
        for key in keys:
            check_layout(f"base[{key!r}]", self.base.source.template(key), templates.get(key))
        self.inner.check_layout(keys, templates)

    def local(self) -> Applied:
        base = self.base.local()
        assert base is not None  # a base is stored, not made on demand
        return Applied(base, self.inner.local(), self.dtype)


def local_parts(out: Mapping[str, Any]) -> dict[str, Any]:
    """What this process holds of each tensor; anything else is left for `check_out` to refuse."""
    return {key: local(value) if isinstance(value, Tensor) else value for key, value in out.items()}


def check_out(
    out: object, specs: Mapping[str, Spec], alias: Mapping[str, str], sources: list[Source], argument: str = "out"
) -> None:
    """Raise unless `out` can take tensors of `specs` and shares no memory with the sources or within itself."""
    if not isinstance(out, Mapping):
        raise TypeError(f"{argument}: expected a mapping of name -> tensor, got {type(out).__name__}")
    check_keys(out, [*specs, *alias], argument, "the result")
    for key in [*specs, *alias]:
        tensor, spec = out[key], specs[alias.get(key, key)]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}[{key!r}]: expected a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != spec.shape:
            raise StateMismatchError(
                f"{argument}[{key!r}] has shape {tuple(tensor.shape)}; the result has {spec.shape}"
            )
        if tensor.dtype != spec.dtype or tensor.device != spec.device:
            raise StateMismatchError(
                f"{argument}[{key!r}] is {tensor.dtype} on {tensor.device}; the result is {spec.dtype} on "
                f"{spec.device}. Choose it with dtype=..."
            )
        if tensor.layout is not torch.strided or not _apart(tensor):
            raise InputError(f"{argument}[{key!r}]: several entries of it share memory, or it is sparse")
    _check_memory(out, specs, alias, sources, argument)


def _check_memory(
    out: Tensors, specs: Mapping[str, Spec], alias: Mapping[str, str], sources: list[Source], argument: str
) -> None:
    """Raise where something that is written to overlaps with what is read, or with another result."""
    places: list[tuple[str, int, int, bool, str, str]] = []
    for source in (part for whole in sources for part in whole.in_memory()):
        places += [(*memory_of(t), False, key, source.label) for key, t in source.tensors.items() if t.numel()]
    for key in [*specs, *alias]:
        if key in alias and identity(out[key]) == identity(out[alias[key]]):
            continue
        if out[key].numel():
            places.append((*memory_of(out[key]), True, key, argument))
    places.sort()
    nothing = (0, "", "")
    ends: dict[tuple[str, bool], tuple[int, str, str]] = {}  # how far what was seen reaches, and what it is
    for device, start, stop, written, key, label in places:
        for other in (True, False) if written else (True,):
            end, twin, its = ends.get((device, other), nothing)
            if end > start and written and other:
                raise InputError(f"{argument}: {twin!r} and {key!r} are one memory, at least in part, but two results")
            if end > start:
                place, reader = (key, f"{its}[{twin!r}]") if written else (twin, f"{label}[{key!r}]")
                raise InputError(f"{argument}[{place!r}] shares memory with {reader}, which must not be written to")
        if stop > ends.get((device, written), nothing)[0]:
            ends[device, written] = (stop, key, label)


def _apart(tensor: Tensor) -> bool:
    """Whether all entries have a place of their own: each dimension steps over all that is inside."""
    inside = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride < inside:
            return tensor.numel() == 0
        inside += (size - 1) * stride
    return True


def check_layout(label: str, tensor: Tensor | None, template: Tensor | None) -> None:
    """Raise unless `tensor` is spread over processes as `template` is (None: not)."""
    both = tensor is not None and template is not None and is_sharded(template)
    if not same_layout(tensor, template) or (both and tensor.shape != template.shape):  # type: ignore[union-attr]
        raise StateMismatchError(
            f"{label} is not spread over the processes as the vectors are; redistribute one of them"
        )
