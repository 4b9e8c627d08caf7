"""What models must agree about to be fused: names, shapes and dtypes, but for what is skipped."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from .._state import check_keys, is_bendable, quoted, select_names
from ..errors import InputError, StateMismatchError
from ._sources import Source, Spec

SKIPPED = ". Named in skip, it stays as in the base"
MIXED = "Convert one of them first, or pass mixed_dtypes=True: nothing is cast in silence"


def left_alone(
    base: Source, models: Sequence[Source], vectors: Sequence[Source], skip: str | Iterable[str], *, mixed: bool
) -> tuple[set[str], list[str]]:
    """Of the names that `skip` stands for: those about which not all agree, and the others that could be fused.

    The first are no part of any task vector; the second can be sent, and a rule is told to leave them alone.
    """
    everybody = [base, *models, *vectors]
    chosen = select_names(dict.fromkeys(key for source in everybody for key in source.specs), skip, "skip")
    apart = {key for key in chosen if not _agree(key, base, models, vectors, mixed)}
    names = [key for key, spec in base.specs.items() if is_bendable(key, spec.dtype)]
    if names and apart.issuperset(names):
        raise InputError("skip: leaves nothing to fuse")
    return apart, [key for key in names if key in chosen and key not in apart]


def _agree(key: str, base: Source, models: Sequence[Source], vectors: Sequence[Source], mixed: bool) -> bool:
    expected = base.specs.get(key)
    if expected is None:
        return False
    for model in models:
        spec = model.specs.get(key)
        if spec is None or spec.shape != expected.shape or _dtypes_differ(spec, expected, mixed):
            return False
    sent = is_bendable(key, expected.dtype)
    return all(vector.specs[key].shape == expected.shape if key in vector.specs else not sent for vector in vectors)


def check_specs(
    specs: Mapping[str, Spec],
    expected: Mapping[str, Spec],
    label: str,
    reference: str,
    apart: Container[str],
    *,
    mixed: bool,
) -> None:
    """Raise unless a model has the names, shapes and dtypes of the base, but for those `apart`."""
    names = [key for key in specs if key not in apart]
    check_keys(names, [key for key in expected if key not in apart], label, reference, ", or named in skip")
    for key in names:
        spec, other = specs[key], expected[key]
        if spec.shape != other.shape:
            raise StateMismatchError(f"{label}[{key!r}] has shape {spec.shape}; {reference} has {other.shape}{SKIPPED}")
        if _dtypes_differ(spec, other, mixed):
            raise StateMismatchError(f"{label}[{key!r}] is {spec.dtype}; {reference} has {other.dtype}. {MIXED}")


def check_model(model: Source, base: Source, apart: Container[str], *, mixed: bool) -> None:
    """As `check_specs`."""
    check_specs(model.specs, base.specs, model.label, base.label, apart, mixed=mixed)


def _dtypes_differ(spec: Spec, expected: Spec, mixed: bool) -> bool:
    """Whether the dtypes do; if that is allowed, whether one is floating-point and the other is not."""
    if mixed:
        return spec.dtype.is_floating_point != expected.dtype.is_floating_point
    return spec.dtype != expected.dtype


def check_vector(vector: Source, base: Source, apart: Container[str]) -> None:
    """Raise unless a task vector changes floating-point entries of the base, in their shapes."""
    names = [key for key in vector.specs if key not in apart]
    unknown = [key for key in names if key not in base.specs]
    if unknown:
        raise StateMismatchError(f"{vector.label} names {quoted(unknown)}, which {base.label} lacks")
    for key in names:
        spec, expected = vector.specs[key], base.specs[key]
        if spec.shape != expected.shape:
            raise StateMismatchError(
                f"{vector.label}[{key!r}] has shape {spec.shape}; {base.label} has {expected.shape}"
            )
        if is_bendable(key, spec.dtype) and not is_bendable(key, expected.dtype):
            raise StateMismatchError(
                f"{vector.label}[{key!r}] is {spec.dtype}; {base.label} has {expected.dtype}, which is never changed"
            )
