"""One generator per (seed, key): noise that does not depend on order, threads or sharding.

A `seed` is an int or a ``torch.Generator``. A generator is asked for one 63-bit number, and from then on is
treated like that number, so that two calls with the same generator give different noise.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import torch

Seed: TypeAlias = int | torch.Generator


def seed_number(seed: Seed) -> int:
    """The int behind `seed`; a ``torch.Generator`` advances by one draw."""
    if isinstance(seed, torch.Generator):
        drawn = torch.randint(0, 2**63 - 1, (), generator=seed, device=seed.device, dtype=torch.int64)
        return int(drawn)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or a torch.Generator, got {type(seed).__name__}")
    return seed


def generator(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on nothing but `seed`, `key` and the type of `device`."""
    fresh = torch.Generator(device=device)
    reseed(fresh, seed, *key)
    return fresh


def reseed(target: torch.Generator, seed: int, *key: int | str) -> None:
    """Put `target` where `generator(seed, *key)` starts: cheaper than a new one."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    target.manual_seed(int.from_bytes(digest, "little") >> 1)
