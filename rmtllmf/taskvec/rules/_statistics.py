"""What rules are given beside the vectors: for each of them a number for every entry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..._sharded import full
from ..._state import Tensors, extrema, quoted
from ...errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from .._engine import Fusion
from .._options import one_or_each


def listed(given: Iterable[Tensors], argument: str, count: int | None = None) -> list[Tensors]:
    """A list of mappings, as many as there are vectors."""
    if isinstance(given, Mapping | str | bytes | Tensor | nn.Module) or not isinstance(given, Iterable):
        raise TypeError(
            f"{argument}: expected a sequence of mappings of name -> tensor, one for each vector, got a single "
            f"{type(given).__name__}"
        )
    mappings = list(given)
    for index, mapping in enumerate(mappings):
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{argument}[{index}]: expected a mapping of name -> tensor, got {type(mapping).__name__}")
    if not mappings:
        raise InputError(f"{argument}: expected at least one mapping of name -> tensor, got an empty sequence")
    if count is not None and len(mappings) != count:
        raise ShapeError(f"{argument}: expected {count} mappings, one for each vector, got {len(mappings)}")
    return mappings


def beside(fusion: Fusion, given: Iterable[Tensors], argument: str) -> list[dict[str, Tensor]]:
    """For each vector the tensors of `given` for the names that are fused, contiguous, finite and not negative.

    A name may be found under another one that is tied to it. Names that are not fused do not matter.
    """
    twins: dict[str, list[str]] = {key: [key] for key in fusion.keys}
    for name, key in fusion.alias.items():
        twins[key].append(name)
    result = []
    for index, mapping in enumerate(listed(given, argument, fusion.count)):
        label = f"{argument}[{index}]"
        names = {key: next((name for name in twins[key] if name in mapping), None) for key in fusion.keys}
        missing = [key for key, name in names.items() if name is None]
        if missing:
            raise StateMismatchError(
                f"{label} lacks {quoted(missing)}, which the vectors have; give all, or skip these"
            )
        found = {key: mapping[name] for key, name in names.items() if name is not None}
        result.append(checked(found, {key: fusion.specs[key].shape for key in fusion.keys}, label))
    return result


def checked(found: Tensors, shapes: Mapping[str, tuple[int, ...]], label: str) -> dict[str, Tensor]:
    """`found` as detached and contiguous tensors; an error unless they have these shapes and are at least 0."""
    result = {}
    for key, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{label}[{key!r}]: expected a floating-point tensor, got {kind}")
        if tuple(tensor.shape) != tuple(shapes[key]):
            raise StateMismatchError(
                f"{label}[{key!r}] has shape {tuple(tensor.shape)}; expected {tuple(shapes[key])}, an entry for each "
                "of the vectors'"
            )
        whole = full(tensor.detach()).contiguous()
        low, high = extrema(whole)
        if not low - low == high - high == 0:
            raise NonFiniteError(f"{label}[{key!r}] holds non-finite entries; expected finite numbers")
        if low < 0:
            raise InputError(f"{label}[{key!r}]: expected entries of at least 0, got {low:g}")
        result[key] = whole
    return result


def shares(value: float | Sequence[float], argument: str, count: int) -> list[float]:
    """A number in (0, 1] for each vector, from one or N of them."""
    numbers = one_or_each(value, argument, count)
    for number in numbers:
        if not 0 < number <= 1:
            raise InputError(f"{argument}: expected shares in (0, 1], where 1 is all, got {number:g}")
    return numbers
