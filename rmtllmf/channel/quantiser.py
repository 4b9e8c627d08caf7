"""Numbers to code words and back: uniform between the extremes, companded, or Lloyd-Max for Gaussian numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["QUANTISERS", "Quantiser", "lloyd_max"]

QUANTISERS = ("uniform", "companded", "lloyd_max")
_MU = 255.0


@dataclass(frozen=True)
class Quantiser:
    r"""A scalar quantiser with :math:`2^b` levels, code words in ascending order of the levels.

    "uniform": equal steps from the smallest to the largest number, both of which are levels. "companded": equal steps
    in :math:`\mathrm{sign}(x) \ln(1 + \mu |x|/x_{max})/\ln(1 + \mu)` with :math:`\mu = 255`. "lloyd_max": the levels
    that are optimal for Gaussian numbers of the given rms and mean 0. Levels are known to the receiver, exactly.

    Args:
        levels: (2^b,) ascending.

    Source: N. Jayant and P. Noll, "Digital Coding of Waveforms", 1984, chapter 4; S. Lloyd, 1982.

    Example:
        >>> import torch
        >>> quantiser = Quantiser.fit("uniform", bits=2, low=-3.0, high=3.0, rms=1.0)
        >>> quantiser.levels.tolist(), quantiser.encode(torch.tensor([-9.0, 0.9])).tolist()
        ([-3.0, -1.0, 1.0, 3.0], [0, 2])
    """

    levels: Tensor

    @classmethod
    def fit(cls, kind: str, bits: int, *, low: float, high: float, rms: float) -> Quantiser:
        """The quantiser of one of the three kinds for numbers with these extremes and this rms."""
        if kind not in QUANTISERS:
            raise InputError(f"quantiser: expected one of {', '.join(map(repr, QUANTISERS))}, got {kind!r}")
        count = 1 << bits
        if kind == "uniform":
            return cls(torch.linspace(low, high, count, dtype=torch.float64))
        if kind == "lloyd_max":
            return cls(rms * lloyd_max(bits))
        peak = max(abs(low), abs(high))
        equal = torch.linspace(-1, 1, count, dtype=torch.float64)
        return cls(peak * equal.sign() * torch.expm1(equal.abs() * math.log1p(_MU)) / _MU)

    def encode(self, numbers: Tensor) -> Tensor:
        """(...) -> (...) int64 code words of the nearest levels; numbers beyond the last level get the last."""
        levels = self.levels.to(numbers)
        return torch.bucketize(numbers.contiguous(), (levels[1:] + levels[:-1]) / 2)

    def decode(self, words: Tensor) -> Tensor:
        """(...) code words -> (...) float64 levels."""
        return self.levels.to(words.device)[words]

    def expectation(self, ones: Tensor) -> Tensor:
        """(..., b) probabilities that each bit is 1, most significant first -> (...) the mean level."""
        values = self.levels.to(ones).expand(*ones.shape[:-1], -1)
        for bit in range(ones.shape[-1]):
            half = values.shape[-1] // 2
            p = ones[..., bit, None]
            values = (1 - p) * values[..., :half] + p * values[..., half:]
        return values[..., 0]


@lru_cache
def lloyd_max(bits: int) -> Tensor:
    r"""(2^bits,) levels that minimise the mean squared error for standard Gaussian numbers.

    Fixed point of two conditions: thresholds half-way between levels, levels at the means of their cells. Started from
    the optimal point density :math:`p^{1/3}`, a Gaussian of variance 3.

    Example:
        >>> lloyd_max(1).tolist() == [-(2 / math.pi) ** 0.5, (2 / math.pi) ** 0.5]
        True
    """
    count = 1 << bits
    if count == 2:
        return torch.tensor([-1.0, 1.0], dtype=torch.float64) * math.sqrt(2 / math.pi)
    levels = math.sqrt(3) * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(20_000):
        edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
        density = torch.exp(-0.5 * edges.square()) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        # the upper tail's masses from the lower one: no cancellation
        mass = torch.where(levels > 0, mass.flip(0), mass)
        better = -density.diff() / mass
        if float((better - levels).abs().max()) < 1e-12:
            break
        levels = better
    return better
