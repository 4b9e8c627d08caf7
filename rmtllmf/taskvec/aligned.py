"""Vectors that name different tensors, brought to the same names: what a vector does not name, it does not change."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .._display import counted
from .._state import Tensors
from ..errors import InputError
from ._adapter_parts import Lazy
from ._sources import Source, Spec, Stored, check_same, source_of

__all__ = ["aligned"]


def aligned(vectors: Iterable[Tensors]) -> list[Source]:
    r"""The vectors with the names of all of them: zero for every name that a vector lacks.

    .. math:: \tau_q[k] = 0 \quad \text{for } k \notin \tau_q,\; k \in \textstyle\bigcup_p \tau_p

    Fusion rules want the same names in all vectors, and raise where they differ, because that is most often a mistake.
    For adapters, which change the layers they were made for and nothing else, it is not: this says so. A zero counts as
    a value for rules that count (a mean divides by all N), as it does for models fine-tuned in full.

    Args:
        vectors: mappings of name -> tensor, such as `adapter_vector` gives; what two of them name has one shape.

    Returns:
        N mappings with the same names in the same order, those of the first vector first. Nothing is copied; a zero
        takes no memory until it is read. Where another vector ties a missing name to one that this vector has (two
        names, one tensor), it has the tied one's value instead of zero, so that ties outlive the fusion.

    Raises:
        InputError: no vectors. StateMismatchError: two vectors disagree about the shape of a name.
        TypeError: something that is no mapping of name -> tensor.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import task_arithmetic
        >>> a, b = aligned([{"q": torch.ones(2)}, {"v": torch.ones(1)}])
        >>> dict(b)
        {'q': tensor([0., 0.]), 'v': tensor([1.])}
        >>> dict(task_arithmetic([a, b], 0.5))
        {'q': tensor([0.5000, 0.5000]), 'v': tensor([0.5000])}
    """
    if isinstance(vectors, Mapping | str | bytes | Tensor | nn.Module) or not isinstance(vectors, Iterable):
        raise TypeError(
            f"vectors: expected a sequence of mappings of name -> tensor, got a single {type(vectors).__name__}"
        )
    sources = [source_of(vector, f"vectors[{index}]") for index, vector in enumerate(vectors)]
    if not sources:
        raise InputError("vectors: expected at least one mapping of name -> tensor, got an empty sequence")
    first: dict[str, Source] = {}  # the first that has a name
    for source in sources:
        for key in source.specs:
            first.setdefault(key, source)
    tied: dict[str, set[str]] = {}  # the names that share a tensor with a name in some vector, or with such a name
    for source in sources:
        groups: dict[Hashable, list[str]] = {}
        for key in source.specs:
            groups.setdefault(source.identity(key), []).append(key)
        for group in groups.values():
            if len(group) > 1:
                united = set(group).union(*(tied.get(key, ()) for key in group))
                tied |= dict.fromkeys(united, united)
    result: list[Source] = [_Aligned(source, first, tied, f"vectors[{i}]") for i, source in enumerate(sources)]
    for vector in result[1:]:
        check_same(vector, result[0])
    return result


def without(source: Source, apart: Container[str]) -> Source:
    """`source` without the names `apart`."""
    if not any(key in apart for key in source.specs):
        return source
    if isinstance(source, Stored):
        return Stored({key: tensor for key, tensor in source.given.items() if key not in apart}, source.label)
    return _Aligned(source, {key: source for key in source.specs if key not in apart}, {}, source.label)


class _Aligned(Lazy):
    """A source with more names: zeros, or the values of a tied name."""

    def __init__(self, source: Source, first: dict[str, Source], tied: dict[str, set[str]], label: str) -> None:
        self.source, self.label, self.first = source, label, first
        self.wants_gradient = source.wants_gradient
        self.stands_for: dict[str, str | None] = {}
        for key in first:
            if key in source.specs:
                self.stands_for[key] = key
            else:
                twins = sorted(name for name in tied.get(key, ()) if name in source.specs)
                self.stands_for[key] = twins[0] if twins else None
        self.specs: dict[str, Spec] = {}
        for key, origin in first.items():
            own = self.stands_for[key]
            self.specs[key] = origin.specs[key] if own is None else source.specs[own]
        self.zero = {key: min(tied.get(key, (key,))) for key in first}  # one name for all that are tied

    def __repr__(self) -> str:
        zeros = sum(own is None for own in self.stands_for.values())
        of = repr(self.source) if type(self.source).__repr__ is not object.__repr__ else self.label
        rest = f", of which {zeros} {'is' if zeros == 1 else 'are'} zero" if zeros else ""
        return f"<{of}, aligned: {counted(len(self), 'tensor')}{rest}>"

    def in_memory(self) -> Iterator[Stored]:
        return self.source.in_memory()

    def template(self, key: str) -> Tensor | None:
        own = self.stands_for[key]
        return self.first[key].template(key) if own is None else self.source.template(own)

    def sliceable(self, key: str) -> bool:
        own = self.stands_for[key]
        return own is None or self.source.sliceable(own)

    def identity(self, key: str) -> Hashable:
        own = self.stands_for[key]
        return ("zero", self.zero[key]) if own is None else self.source.identity(own)

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        own = self.stands_for[key]
        return buffer.zero_() if own is None else self.source.read(own, start, stop, buffer)

    def whole(self, key: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        own = self.stands_for[key]
        if own is None:
            return super().whole(key, dtype, device)
        if self.wants_gradient and torch.is_grad_enabled() and isinstance(self.source, Stored):
            return self.source.given[own].to(device=device, dtype=dtype or self.specs[key].calculated_in)
        return self.source.whole(own, dtype, device)

    def __getitem__(self, key: str) -> Tensor:
        own = self.stands_for[key]
        return super().__getitem__(key) if own is None else self.source[own]
