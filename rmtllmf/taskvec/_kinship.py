"""Whether models descend from their base: told by a few pieces of their matrices, without a pass over the data."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from statistics import median

import torch
from torch import Tensor

from .._state import is_bendable
from ..errors import warn
from ._sources import Source

__all__ = ["warn_unless_related"]

# Two trainings from scratch share nothing: the cosine of two pieces has the standard deviation 1 / sqrt(entries), 0.03
# at most, and their median is nearer to 0. Fine-tuning leaves .9 and more, and hundreds of steps with a large step size
# from an untrained start .3 and more. (How far a model moved tells less: those moved by more than the base's norm.)
ALIKE = 0.1
LEAST, PIECE = 1024, 4096  # entries of a matrix that is looked at, and of the piece of it
FEWEST, MOST = 8, 16  # matrices


def warn_unless_related(base: Source, models: Iterable[Source], apart: Container[str] = ()) -> None:
    """Warn of models whose matrices have nothing in common with the base's; of small models nothing is said.

    Those `apart` are no business of a fusion: the models may have something else in their place.
    """
    matrices = [key for key, spec in base.specs.items() if len(spec.shape) > 1 and spec.size >= LEAST]
    keys = [key for key in matrices if key not in apart]
    keys = [k for k in keys if is_bendable(k, base.specs[k].dtype) and base.template(k) is None and base.sliceable(k)]
    if len(keys) < FEWEST:
        return
    chosen = keys[:: math.ceil(len(keys) / MOST)]
    pieces = [_piece(base, key) for key in chosen]
    strangers = [model.label for model in models if _is_stranger(model, chosen, pieces)]
    if strangers:
        warn(
            f"{', '.join(strangers)}: the matrices have nothing in common with the base's, of which fine-tuning keeps "
            "nearly all; another base model, or a task vector in the place of a model? (A model that was made "
            "unmergeable looks like this, too: see `mergeability`.)"
        )


def _is_stranger(model: Source, keys: Sequence[str], pieces: Sequence[Tensor]) -> bool:
    cosines = []
    for key, before in zip(keys, pieces, strict=True):
        if model.template(key) is None and model.sliceable(key):
            after = _piece(model, key)
            # no `@`: it wakes all threads, and waits for them where other processes have the cores
            cosine = float((before * after).sum() / (before.norm() * after.norm()))
            if math.isfinite(cosine):  # not of zeros, nor of what will be an error
                cosines.append(cosine)
    return len(cosines) >= FEWEST and median(cosines) < ALIKE


def _piece(source: Source, key: str) -> Tensor:
    """From the middle, in double precision."""
    spec = source.specs[key]
    length = min(spec.size, PIECE)
    start = (spec.size - length) // 2
    buffer = torch.empty(length, dtype=spec.calculated_in, device=spec.device)
    return source.read(key, start, start + length, buffer).to("cpu", torch.float64)
