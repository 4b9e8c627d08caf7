"""Square QAM with Gray labels: bits to symbols, and symbols back to bits or to probabilities of bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._arrays import ArrayLike, Inputs
from ..errors import InputError

__all__ = ["Constellation", "symbol_error_rate"]

_ORDERS = (4, 16, 64, 256)


@dataclass(frozen=True)
class Constellation:
    r"""Square M-QAM of unit mean power, Gray-labelled in each real dimension.

    .. math:: s = \frac{a + jb}{\sqrt{2 (M - 1)/3}}, \qquad a, b \in \{\pm 1, \pm 3, \dots, \pm(\sqrt M - 1)\}

    The first half of a symbol's bits labels its real part, the second half its imaginary part, the most significant
    first; neighbours differ in one bit.

    Args:
        order: M, one of 4, 16, 64, 256.

    Raises:
        InputError: another order.

    Source: J. Proakis and M. Salehi, "Digital Communications", 5th ed., 2008, section 3.2.

    Example:
        >>> import torch
        >>> qpsk = Constellation(4)
        >>> qpsk.modulate(torch.tensor([[0, 0], [1, 0]]))
        tensor([-0.7071-0.7071j,  0.7071-0.7071j])
    """

    order: int

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise InputError(f"modulation: expected {', '.join(map(str, _ORDERS))} or 'analog', got {self.order!r}")

    @property
    def bits(self) -> int:
        """Bits per symbol."""
        return int(math.log2(self.order))

    @property
    def unit(self) -> float:
        """Half the distance between neighbours."""
        return 1 / math.sqrt(2 * (self.order - 1) / 3)

    @cached_property
    def _label_of_level(self) -> Tensor:
        levels = torch.arange(1 << self.bits // 2)
        return levels ^ (levels >> 1)

    @cached_property
    def _level_of_label(self) -> Tensor:
        return self._label_of_level.argsort()

    def modulate(self, bits: Tensor) -> Tensor:
        """(..., bits) of 0 and 1 -> (...) complex64 symbols."""
        half = self.bits // 2
        weights = 1 << torch.arange(half - 1, -1, -1, device=bits.device)
        labels = (bits.view(*bits.shape[:-1], 2, half).to(torch.int64) * weights).sum(-1)
        levels = self._level_of_label.to(bits.device)[labels]
        parts = (2 * levels + 1 - (1 << half)).to(torch.float32) * self.unit
        return torch.view_as_complex(parts)

    def decide(self, symbols: Tensor) -> Tensor:
        """(...) noisy symbols -> (..., bits) of the nearest point."""
        half = self.bits // 2
        labels = self._label_of_level.to(symbols.device)[self._nearest(symbols)]
        shifts = torch.arange(half - 1, -1, -1, device=symbols.device)
        return ((labels[..., None] >> shifts) & 1).flatten(-2).to(torch.uint8)

    def nearest(self, symbols: Tensor) -> Tensor:
        """(...) noisy symbols -> (...) the nearest points."""
        levels = self._nearest(symbols)
        return torch.view_as_complex((2 * levels + 1 - (1 << self.bits // 2)).to(symbols.real.dtype) * self.unit)

    def bit_probabilities(self, symbols: Tensor, noise: Tensor | float) -> Tensor:
        """(...) unbiased noisy symbols -> (..., bits), the posterior probability that each bit is 1.

        `noise` (...) is the power of the complex Gaussian error; all symbols are equally likely.
        """
        weights = self._posterior(symbols, noise)
        half = self.bits // 2
        shifts = torch.arange(half - 1, -1, -1, device=symbols.device)
        ones = ((self._label_of_level.to(symbols.device)[:, None] >> shifts) & 1).to(weights.dtype)
        return (weights @ ones).flatten(-2)

    def posterior_mean(self, symbols: Tensor, noise: Tensor | float) -> Tensor:
        """(...) unbiased noisy symbols -> (...) the mean of the symbol given them; `noise` as above."""
        weights = self._posterior(symbols, noise)
        return torch.view_as_complex((weights @ self._levels(weights)).contiguous())

    def _levels(self, like: Tensor) -> Tensor:
        count = 1 << self.bits // 2
        return (2 * torch.arange(count, device=like.device) + 1 - count).to(like.dtype) * self.unit

    def _posterior(self, symbols: Tensor, noise: Tensor | float) -> Tensor:
        """(..., 2, levels) probabilities of the levels of real and imaginary part."""
        parts = torch.view_as_real(symbols)[..., None]
        power = torch.as_tensor(noise, device=parts.device).to(parts.dtype)
        power = power.clamp_min(torch.finfo(parts.dtype).tiny)[..., None, None]
        distance = (parts - self._levels(parts)).square()
        return torch.softmax((distance.amin(-1, keepdim=True) - distance) / power, dim=-1)

    def _nearest(self, symbols: Tensor) -> Tensor:
        """(..., 2) level numbers of real and imaginary part."""
        count = 1 << self.bits // 2
        levels = (torch.view_as_real(symbols) / self.unit + (count - 1)) / 2
        return levels.round().clamp(0, count - 1).to(torch.int64)


def symbol_error_rate(order: int, snr: ArrayLike) -> Any:
    r"""The probability that square M-QAM is decided wrongly in white Gaussian noise.

    .. math:: P = 1 - (1 - p)^2, \qquad p = 2 \Bigl(1 - \frac{1}{\sqrt M}\Bigr)\,
              Q\Bigl(\sqrt{\frac{3\,\mathrm{SNR}}{M - 1}}\Bigr)

    Args:
        order: M, one of 4, 16, 64, 256.
        snr: (...) :math:`E|s|^2 / E|n|^2`, linear, at least 0.

    Returns:
        (...) real.

    Raises:
        InputError: another order, or a negative `snr`.

    Source: J. Proakis and M. Salehi, "Digital Communications", 5th ed., 2008, section 4.3.

    Example:
        >>> round(float(symbol_error_rate(4, 10.0)), 6)
        0.001565
    """
    Constellation(order)
    inputs = Inputs.of(snr, "snr")
    ratio = inputs.nonnegative(snr, "snr")
    tail = 0.5 * torch.special.erfc((3 * ratio / (order - 1)).sqrt() / math.sqrt(2))
    p = 2 * (1 - 1 / math.sqrt(order)) * tail
    return inputs.back(p * (2 - p))
