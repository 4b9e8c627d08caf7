"""Results written into tensors that the caller has already: what these must be like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._state import Tensors, check_keys, identity, memory_of
from ..errors import InputError, StateMismatchError
from ._stream import Stream

Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype, torch.device]]  # of every entry of a result


def spec_of(vector: Tensors) -> Spec:
    """What a result like `vector` is."""
    return {key: (tuple(tensor.shape), tensor.dtype, tensor.device) for key, tensor in vector.items()}


def checked_out(out: object, stream: Stream) -> list[dict[str, Tensor]]:
    """One mapping for each vector, whose entries are like the vector's, in memory of their own; without gradients."""
    if isinstance(out, Mapping) or not isinstance(out, Sequence):
        raise TypeError(f"out: expected a list of mappings of name -> tensor, got a single {type(out).__name__}")
    if len(out) != len(stream.vectors):
        raise InputError(f"out: expected {len(stream.vectors)} mappings, one for each vector, got {len(out)}")
    places = [
        _checked(place, spec_of(vector), f"out[{q}]", f"vectors[{q}]")
        for q, (place, vector) in enumerate(zip(out, stream.vectors, strict=True))
    ]
    check_memory({f"out[{q}]": place for q, place in enumerate(places)}, stream)
    return places


def checked_single_out(out: object, spec: Spec, stream: Stream) -> dict[str, Tensor]:
    """The same for one mapping."""
    place = _checked(out, spec, "out", "the sum")
    check_memory({"out": place}, stream)
    return place


def _checked(out: object, spec: Spec, argument: str, reference: str) -> dict[str, Tensor]:
    if not isinstance(out, Mapping):
        raise TypeError(f"{argument}: expected a mapping of name -> tensor, got {type(out).__name__}")
    place = dict(out.items())
    check_keys(place, spec, argument, reference)
    for key, (shape, dtype, device) in spec.items():
        name, tensor = f"{argument}[{key!r}]", place[key]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise StateMismatchError(f"{name} has shape {tuple(tensor.shape)}; {reference} has {shape}")
        if (tensor.dtype, tensor.device) != (dtype, device):
            raise StateMismatchError(
                f"{name} is {tensor.dtype} on {tensor.device}; {reference} has {dtype} on {device}. Nothing is cast"
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise InputError(f"{name}: requires a gradient, which memory that is written to has not; pass its detach()")
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise InputError(
                f"{name}: is an expanded view, whose entries share memory; expected memory for every entry"
            )
    return {key: place[key].detach() for key in spec}


def check_memory(places: Mapping[str, Tensors], stream: Stream) -> None:
    """Raise where a place overlaps what is read, or another place; tied entries may be one place."""
    read = [
        (*memory_of(tensor), f"vectors[{q}][{key!r}]")
        for q, vector in enumerate(stream.vectors)
        for key, tensor in vector.items()
    ]
    written = []
    for name, place in places.items():
        for key, tensor in place.items():
            original = stream.alias.get(key)
            if original is None or identity(tensor) != identity(place[original]):
                written.append((*memory_of(tensor), f"{name}[{key!r}]"))
    spans = sorted([(*span, False) for span in read] + [(*span, True) for span in written])
    last = {True: ("", 0, ""), False: ("", 0, "")}  # the furthest end so far, of what is written and read
    for device, start, end, label, target in spans:
        if start == end:
            continue
        for other, (where, furthest, theirs) in last.items():
            if (target or other) and where == device and start < furthest:
                mine, yours = (label, theirs) if target else (theirs, label)
                raise InputError(f"{mine} shares memory with {yours}; expected memory that nothing else uses")
        if last[target][0] != device or end > last[target][1]:
            last[target] = (device, end, label)
