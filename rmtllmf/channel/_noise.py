"""White noise in chunks, each with a generator of its own, and its mixture across users: in memory of one thread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._coefficients import CHUNK
from .._random import reseed
from ._link import Weight


class Noise:
    """A thread's generator and its buffers, used again for every chunk."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.seed, self.dtype, self.device = seed, dtype, device
        self.source = torch.Generator(device=device)
        self.space: dict[str, Tensor] = {}

    def buffer(self, name: str, length: int) -> Tensor:
        """Scratch memory, the same for the same name."""
        if name not in self.space:
            self.space[name] = torch.empty(CHUNK, dtype=self.dtype, device=self.device)
        return self.space[name][:length]

    def white(self, stream: int | str, start: int, stop: int) -> Tensor:
        """Unit noise of the chunk [start, stop) of a stream; whole symbols, so one more than an odd length."""
        white = self.buffer(f"white {stream}", stop - start + (stop - start) % 2)
        reseed(self.source, self.seed, stream, start // CHUNK)
        return white.normal_(generator=self.source)

    def mixed(self, weights: Sequence[Weight], streams: Sequence[Tensor], low: int, high: int) -> Tensor | None:
        """What `weights` make of the streams in [low, high), in a buffer (of one: in place); None where all are zero.

        With complex weights (a + jb) the real part takes ``a*re - b*im``, the imaginary part ``a*im + b*re``.
        """
        result = None
        for stream, weight in zip(streams, weights, strict=True):
            if weight is None:
                continue
            (re, im), length = weight, high - low + (high - low) % 2
            part = stream[low : low + length]
            alone = len(streams) == 1  # nobody else needs it
            term = part if alone and im is None else self.buffer("mixed" if result is None else "term", length)
            torch.mul(part, re.to(part.dtype), out=term)
            if im is not None:
                turned = self.buffer("turned", length)
                torch.mul(part[1::2], -im.to(part.dtype), out=turned[0::2])
                torch.mul(part[0::2], im.to(part.dtype), out=turned[1::2])
                term.add_(turned)
            result = term if result is None else result.add_(term)
        return result
