"""A random number for every entry of every task vector, whichever part of it is read, and by whom."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ..._random import reseed

CHUNK = 1 << 16  # entries for which a generator is started anew: what makes access to any piece cheap


class Draws:
    """Uniform numbers in [0, 1) for (vector, name, entry). A thread keeps its last chunk, for those who read in parts.

    Args:
        seed: what they depend on, beside vector, name and entry.
        purpose: of which others with the same seed are independent.
        least: the smallest probability that they are compared with. 24 bits are too few for a few in a million to be
            unbiased.
    """

    def __init__(self, seed: int, purpose: str, least: float) -> None:
        self.seed, self.purpose = seed, purpose
        self.dtype = torch.float32 if least > 1 / 64 else torch.float64
        self._of_thread = threading.local()

    def over(self, vector: int, name: str, start: int, stop: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """For entries [start, stop): where they are in that range, and their numbers, chunk by chunk."""
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            first = chunk * CHUNK
            left, right = max(start, first), min(stop, first + CHUNK)
            numbers = self.chunk(vector, name, chunk, like)
            yield slice(left - start, right - start), numbers[left - first : right - first]

    def chunk(self, vector: int, name: str, chunk: int, like: Tensor) -> Tensor:
        """Valid until the same thread asks for another."""
        mine, device, wanted = self._of_thread, like.device, (vector, name, chunk, like.dtype, like.device)
        if getattr(mine, "wanted", None) == wanted:
            return mine.made
        if getattr(mine, "device", None) != device:
            mine.uniform, mine.device = torch.empty(CHUNK, dtype=self.dtype, device=device), device
            mine.generator = torch.Generator(device=device)
        mine.wanted = None
        reseed(mine.generator, self.seed, self.purpose, vector, name, chunk)
        mine.made = self.made(mine.uniform.uniform_(generator=mine.generator), like)
        mine.wanted = wanted
        return mine.made

    def made(self, uniform: Tensor, like: Tensor) -> Tensor:
        """What becomes of a fresh chunk; may be written to it."""
        return uniform
