"""What a rule is given beside the vectors, in their names and shapes: a merged vector, the base, curvature."""

from __future__ import annotations

import torch

from ..._state import Tensors, check_keys, is_bendable
from ...errors import StateMismatchError
from .._engine import Fusion
from .._sources import Source, source_of


def companion(tensors: Tensors, label: str, fusion: Fusion) -> Source:
    """`tensors` as a source; an error unless they fit the vectors. What is not fused may be missing."""
    source = source_of(tensors, label)
    specs = {**fusion.specs, **{key: fusion.specs[original] for key, original in fusion.alias.items()}}
    unused = set(fusion.sources[0].specs) - set(specs)
    check_keys([key for key in source.specs if key not in unused], specs, label, "the vectors")
    for key, spec in specs.items():
        if source.specs[key].shape != spec.shape:
            raise StateMismatchError(
                f"{label}[{key!r}] has shape {source.specs[key].shape}; the vectors have {spec.shape}"
            )
        if not is_bendable(key, source.specs[key].dtype):
            raise StateMismatchError(f"{label}[{key!r}] is {source.specs[key].dtype}; expected floating-point entries")
    for key, original in fusion.alias.items():
        tied = source.identity(key) == source.identity(original)
        if not tied and not torch.equal(source.whole(key), source.whole(original)):
            raise StateMismatchError(
                f"{label}: {original!r} and {key!r} are one tensor in the vectors, but differ here"
            )
    return source
