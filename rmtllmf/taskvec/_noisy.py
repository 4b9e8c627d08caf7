"""A task vector as it comes over the channel, bent while it is read: with the noise that `transmit` would give it."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .._coefficients import CHUNK, SCALES, sums_of_rows
from .._random import Seed, reseed, seed_number
from .._state import extrema, finite_number, is_bendable
from ..errors import InputError, ShapeError, warn
from ._engine import PIECE, Fusion, Piece
from ._sources import Source

_LOUD = 100  # times the rms; the peaks of fine-tuned models are up to 60 times


class Noisy(Source):
    """``vector + sqrt(mse) * scale * white``; coefficients are counted through the sorted names."""

    def __init__(self, inner: Source, user: int, mse: float, scale: dict[str, float], seed: int) -> None:
        self.inner, self.user, self.scale, self.seed = inner, user, scale, seed
        self.label, self.specs = inner.label, inner.specs
        self.amplitude = torch.tensor(mse, dtype=torch.float64, device="cpu").sqrt()
        self.keys_sent = sorted(key for key, spec in self.specs.items() if is_bendable(key, spec.dtype))
        ends = list(accumulate(self.specs[key].size for key in self.keys_sent))
        self.starts = dict(zip(self.keys_sent, [0, *ends], strict=False))
        self.length = ends[-1] if ends else 0
        double = any(self.specs[key].dtype == torch.float64 for key in self.keys_sent)
        self.dtype = torch.float64 if double else torch.float32
        self._local = threading.local()

    def sliceable(self, key: str) -> bool:
        return self.inner.sliceable(key)

    def identity(self, key: str) -> Hashable:
        return (id(self), key)

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        sent = self.inner.read(key, start, stop, buffer)
        if not self.amplitude or not is_bendable(key, self.specs[key].dtype):
            return sent
        at, end = self.starts[key] + start, self.starts[key] + stop
        while at < end:
            chunk = at // CHUNK
            until = min(end, (chunk + 1) * CHUNK)
            white = self._white(chunk)[at - chunk * CHUNK : until - chunk * CHUNK]
            error = (white * self.amplitude.to(self.dtype)).mul_(self.scale[key])
            where = slice(at - self.starts[key] - start, until - self.starts[key] - start)
            if buffer.dtype == self.dtype and buffer.device == error.device:
                torch.add(sent[where], error, out=buffer[where])
            else:
                buffer[where] = error.add_(sent[where])
            at = until
        return buffer

    def _white(self, chunk: int) -> Tensor:
        """Unit noise of a chunk; the last one that this thread made is kept."""
        last = self._local
        if getattr(last, "chunk", None) != chunk:
            if not hasattr(last, "source"):
                last.source, last.space = torch.Generator("cpu"), torch.empty(CHUNK, dtype=self.dtype, device="cpu")
            length = min(CHUNK, self.length - chunk * CHUNK)
            reseed(last.source, self.seed, self.user, chunk)
            last.white = last.space[: length + length % 2].normal_(generator=last.source)
            last.chunk = chunk
        white: Tensor = last.white
        return white


def noisy(vectors: Sequence[Source], errors: Sequence[float], scale: str | float, seed: Seed | None) -> list[Source]:
    """`vectors` as received with these MSEs, as of `mse_of`, by a receiver whose errors are independent."""
    if seed is None:
        raise InputError("seed: with mse the channel draws noise; expected an int or a torch.Generator, got None")
    number = seed_number(seed)
    scale_of = _scales(vectors, scale)
    if not isinstance(scale, str):
        _warn_if_loud(vectors, errors, float(scale))
    return [Noisy(v, q, error, scale_of[q], number) for q, (v, error) in enumerate(zip(vectors, errors, strict=True))]


def mse_of(mse: Any, count: int) -> list[float]:
    """One MSE for each of `count` vectors, at least 0."""
    if getattr(mse, "ndim", None) == 0 or not isinstance(mse, Iterable):
        numbers = [finite_number(mse, "mse")] * count
    else:
        numbers = [finite_number(value, f"mse[{q}]") for q, value in enumerate(mse)]
    if len(numbers) != count:
        raise ShapeError(f"mse: expected a number, or one for each of the {count} models, got {len(numbers)}")
    for q, value in enumerate(numbers):
        if value < 0:
            raise InputError(f"mse[{q}]: expected at least 0, got {value}")
    return numbers


def _scales(vectors: Sequence[Source], scale: str | float) -> list[dict[str, float]]:
    """What the coefficients of each tensor of each vector are divided by before they are sent."""
    keys = sorted(key for key, spec in vectors[0].specs.items() if is_bendable(key, spec.dtype))
    if not isinstance(scale, str):
        number = finite_number(scale, "scale", positive=True)
        return [dict.fromkeys(keys, number) for _ in vectors]
    if scale not in SCALES:
        raise InputError(f"scale: expected one of {', '.join(map(repr, SCALES))} or a positive number, got {scale!r}")
    fusion = Fusion(vectors, {}, argument="finetuned")
    look = _rows if scale.endswith("rms") else _peaks
    found: list[dict[str, list[float]]] = [{key: [] for key in keys} for _ in vectors]
    for key, piece in fusion.survey(lambda piece: (piece.key, look(piece))):
        for q, numbers in enumerate(piece):
            found[q][key] += numbers
    result = []
    for q, vector in enumerate(vectors):
        size = {key: vector.specs[key].size for key in keys}
        measured = {key: math.fsum(n) if scale.endswith("rms") else max(n, default=0.0) for key, n in found[q].items()}
        for key, value in measured.items():
            if not math.isfinite(value):
                raise fusion.blame(key)
        if scale.startswith("tensor"):
            each = {k: math.sqrt(v / max(1, size[k])) if scale.endswith("rms") else v for k, v in measured.items()}
            result.append({key: value if size[key] else 1.0 for key, value in each.items()})
        elif scale == "rms":
            entries = sum(size.values())
            result.append(dict.fromkeys(keys, math.sqrt(math.fsum(measured.values()) / entries) if entries else 1.0))
        else:
            result.append(dict.fromkeys(keys, max(measured.values()) if any(size.values()) else 1.0))
        for key, value in result[-1].items():
            if value == 0:
                raise InputError(f"{vector.label}[{key!r}] cannot be normalised: it does not differ from base")
    return result


def _warn_if_loud(vectors: Sequence[Source], errors: Sequence[float], scale: float) -> None:
    """Warn of a scale that no coefficient comes near to: a rule's, most likely."""
    for vector, error in zip(vectors, errors, strict=True):
        sizes = {key: spec.size for key, spec in vector.specs.items() if is_bendable(key, spec.dtype)}
        enough = (scale / _LOUD) ** 2 * sum(sizes.values())
        energy = 0.0
        for part in _parts(vector, sizes) if error else ():
            energy += float(part.to(torch.float64).square().sum())
            if not energy < enough:  # most often after a small share of the vector
                break
        if 0 < energy < enough:
            rms = math.sqrt(energy / sum(sizes.values()))
            warn(
                f"scale: {scale:g} is {scale / rms:.3g} times the rms of {vector.label} - base, and so is the noise "
                "that it gets: with mse, scale is what the channel divides coefficients by before they are sent. "
                "If the rule's was meant, bind it: functools.partial(rule, scale=...)"
            )
            return


def _parts(vector: Source, sizes: Mapping[str, int]) -> Iterator[Tensor]:
    for key, size in sizes.items():
        spec = vector.specs[key]
        for start in range(0, size, PIECE):
            stop = min(start + PIECE, size)
            yield vector.read(key, start, stop, torch.empty(stop - start, dtype=spec.calculated_in, device=spec.device))


def _rows(piece: Piece) -> list[list[float]]:
    """Sums of squares, in float64, of rows of each vector."""
    return [sums_of_rows(part.to(torch.float64).square()) for part in piece.parts]


def _peaks(piece: Piece) -> list[list[float]]:
    return [[max(abs(value) for value in extrema(part))] for part in piece.parts]
