"""One generator per (seed, key): noise that does not depend on order, threads or sharding.

A `seed` is an int or a ``torch.Generator``. A generator is asked for one 63-bit number, and from then on is
treated like that number, so that two calls with the same generator give different noise.

torch's CPU generator (Mersenne Twister) keeps 32 bits of what it is seeded with, too few for one stream per user and
chunk: among 100,000 streams one pair would coincide. Its whole state of 624 words is therefore set, to the output of
SHAKE-256 for seed and key.
"""

from __future__ import annotations

import hashlib
from operator import index
from typing import TypeAlias

import numpy as np
import torch

Seed: TypeAlias = int | torch.Generator

_WORDS = 624  # of the Mersenne Twister, as 64-bit integers behind a header of 24 bytes in torch's state
_HEADER = 24


def seed_number(seed: Seed) -> int:
    """The int behind `seed`; a ``torch.Generator`` advances by one draw."""
    if isinstance(seed, torch.Generator):
        drawn = torch.randint(0, 2**63 - 1, (), generator=seed, device=seed.device, dtype=torch.int64)
        return int(drawn)
    if isinstance(seed, bool | np.bool_ | torch.Tensor | np.ndarray) or not hasattr(seed, "__index__"):
        kind = type(seed).__name__
        if isinstance(seed, np.random.Generator):
            kind = "NumPy's Generator; pass a number that it draws, int(rng.integers(2**63))"
        raise TypeError(f"seed: expected an int or a torch.Generator, got {kind}")
    return index(seed)


def generator(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on nothing but `seed`, `key` and the type of `device`."""
    fresh = torch.Generator(device=device)
    reseed(fresh, seed, *key)
    return fresh


def reseed(target: torch.Generator, seed: int, *key: int | str) -> None:
    """Put `target` where `generator(seed, *key)` starts: cheaper than a new one."""
    digest = hashlib.shake_256(repr((seed, *key)).encode())
    target.manual_seed(int.from_bytes(digest.digest(8), "little") >> 1)  # enough for CUDA's counter-based generator
    if target.device.type == "cpu":
        state = target.get_state()
        words = np.frombuffer(digest.digest(4 * _WORDS), "<u4")
        state.numpy()[_HEADER : _HEADER + 8 * _WORDS].view(np.uint64)[:] = words
        target.set_state(state)
