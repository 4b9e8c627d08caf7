"""Task vectors with some entries removed, made where they are read: what goes before another rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from ...errors import InputError
from .._sources import Source, Stored


class Pruned(Source):
    """A task vector with entries removed or rescaled, never held as a whole."""

    def __init__(self, inner: Source) -> None:
        self.label, self.specs, self.wants_gradient = inner.label, inner.specs, inner.wants_gradient
        self.inner = inner

    def template(self, key: str) -> Tensor | None:
        return self.inner.template(key)

    def in_memory(self) -> Iterator[Stored]:
        return self.inner.in_memory()

    def sliceable(self, key: str) -> bool:
        return self.inner.sliceable(key)

    def identity(self, key: str) -> Hashable:
        return (id(self), self.inner.identity(key))

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        return self.pruned(key, start, self.inner.read(key, start, stop, buffer), buffer)

    @abstractmethod
    def pruned(self, key: str, start: int, part: Tensor, buffer: Tensor) -> Tensor:
        """What is left of `part`, the entries from `start` on, in `buffer`, which may be the memory of `part`.

        An entry that is not finite must not become one: it could not be blamed any more.
        """


def refuse_gradients(sources: Sequence[Source]) -> None:
    """Raise if gradients should flow: what is left depends on the entries themselves."""
    if torch.is_grad_enabled() and any(source.wants_gradient for source in sources):
        raise InputError(
            "vectors: gradients do not flow through a choice by magnitude; detach the vectors, or call the rule under "
            "torch.no_grad()"
        )


def first_names(source: Source) -> dict[str, str]:
    """Name -> the first name of the same memory, so that what is tied is pruned alike."""
    first: dict[Hashable, str] = {}
    return {key: first.setdefault(source.identity(key), key) for key in sorted(source.specs)}
