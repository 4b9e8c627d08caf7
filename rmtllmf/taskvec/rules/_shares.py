"""How many entries a share of them is."""

from __future__ import annotations

import math
from fractions import Fraction


def floor_of(share: float, size: int) -> int:
    """``floor(share * size)``, where a share such as 0.29 means 29/100 and not the float below it."""
    return math.floor(Fraction(share) * size * (1 + Fraction(1, 1 << 50)))


def ceil_of(share: float, size: int) -> int:
    """``ceil(share * size)``, likewise."""
    return math.ceil(Fraction(share) * size * (1 - Fraction(1, 1 << 50)))


def how_many(density: float, size: int) -> int:
    """``max(1, floor(density * size))``."""
    return min(size, max(1, floor_of(density, size)))
