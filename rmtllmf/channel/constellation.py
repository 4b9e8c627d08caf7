"""Square QAM with Gray labels: bits to symbols, and symbols back to bits or to probabilities of bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs, refuse_masked
from ..errors import InputError, ShapeError

__all__ = ["Constellation", "symbol_error_rate"]

_ORDERS = (4, 16, 64, 256)
ORDERS = ", ".join(map(str, _ORDERS))


def checked_order(order: Any, argument: str, other: str = "") -> int:
    """Raise unless there is a QAM of that order; `other` is what else the argument may be."""
    if order not in _ORDERS:
        raise InputError(f"{argument}: expected {' '.join(filter(None, [ORDERS, other]))}, got {order!r}")
    return int(order)


@dataclass(frozen=True)
class Constellation:
    r"""Square M-QAM of unit mean power, Gray-labelled in each real dimension.

    .. math:: s = \frac{a + jb}{\sqrt{2 (M - 1)/3}}, \qquad a, b \in \{\pm 1, \pm 3, \dots, \pm(\sqrt M - 1)\}

    The first half of a symbol's bits labels its real part, the second half its imaginary part, the most significant
    first; neighbours differ in one bit. The methods take tensors or NumPy arrays and return what they were given.

    Args:
        order: M, one of 4, 16, 64, 256.

    Raises:
        InputError: another order. Methods: TypeError, where bits are no numbers or symbols not complex; ShapeError,
        where a last dimension does not hold the bits of a symbol.

    Source: J. Proakis and M. Salehi, "Digital Communications", 5th ed., 2008, section 3.2.

    Example:
        >>> import torch
        >>> qpsk = Constellation(4)
        >>> qpsk.modulate(torch.tensor([[0, 0], [1, 0]]))
        tensor([-0.7071-0.7071j,  0.7071-0.7071j])
    """

    order: int

    def __post_init__(self) -> None:
        checked_order(self.order, "order")

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

    def modulate(self, bits: Array) -> Any:
        """(..., bits) of 0 and 1 -> (...) complex64 symbols."""
        given, numpy = _given(bits, "bits")
        if given.is_complex():
            raise TypeError(f"bits: expected 0 and 1, got {given.dtype}")
        if given.ndim == 0 or given.shape[-1] != self.bits:
            raise ShapeError(f"bits: expected shape (..., {self.bits}), got {tuple(given.shape)}")
        half = self.bits // 2
        weights = 1 << torch.arange(half - 1, -1, -1, device=given.device)
        labels = (given.reshape(*given.shape[:-1], 2, half).to(torch.int64) * weights).sum(-1)
        levels = self._level_of_label.to(given.device)[labels]
        parts = (2 * levels + 1 - (1 << half)).to(torch.float32) * self.unit
        return _back(torch.view_as_complex(parts), numpy)

    def decide(self, symbols: Array) -> Any:
        """(...) noisy symbols -> (..., bits) of the nearest point."""
        given, numpy = _symbols(symbols)
        half = self.bits // 2
        labels = self._label_of_level.to(given.device)[self._nearest(given)]
        shifts = torch.arange(half - 1, -1, -1, device=given.device)
        return _back(((labels[..., None] >> shifts) & 1).flatten(-2).to(torch.uint8), numpy)

    def nearest(self, symbols: Array) -> Any:
        """(...) noisy symbols -> (...) the nearest points."""
        given, numpy = _symbols(symbols)
        levels = self._nearest(given)
        points = (2 * levels + 1 - (1 << self.bits // 2)).to(given.real.dtype) * self.unit
        return _back(torch.view_as_complex(points), numpy)

    def bit_probabilities(self, symbols: Array, noise: Array | float) -> Any:
        """(...) unbiased noisy symbols -> (..., bits), the posterior probability that each bit is 1.

        `noise` (...) is the power of the complex Gaussian error; all symbols are equally likely.
        """
        given, numpy = _symbols(symbols)
        weights = self._posterior(given, noise)
        half = self.bits // 2
        shifts = torch.arange(half - 1, -1, -1, device=given.device)
        ones = ((self._label_of_level.to(given.device)[:, None] >> shifts) & 1).to(weights.dtype)
        return _back((weights @ ones).flatten(-2), numpy)

    def posterior_mean(self, symbols: Array, noise: Array | float) -> Any:
        """(...) unbiased noisy symbols -> (...) the mean of the symbol given them; `noise` as above."""
        given, numpy = _symbols(symbols)
        weights = self._posterior(given, noise)
        return _back(torch.view_as_complex((weights @ self._levels(weights)).contiguous()), numpy)

    def _levels(self, like: Tensor) -> Tensor:
        count = 1 << self.bits // 2
        return (2 * torch.arange(count, device=like.device) + 1 - count).to(like.dtype) * self.unit

    def _posterior(self, symbols: Tensor, noise: Array | float) -> Tensor:
        """(..., 2, levels) probabilities of the levels of real and imaginary part."""
        parts = torch.view_as_real(symbols)[..., None]
        power = torch.as_tensor(
            _given(noise, "noise")[0] if isinstance(noise, np.ndarray) else noise, device=parts.device
        ).to(parts.dtype)
        power = power.clamp_min(torch.finfo(parts.dtype).tiny)[..., None, None]
        distance = (parts - self._levels(parts)).square()
        return torch.softmax((distance.amin(-1, keepdim=True) - distance) / power, dim=-1)

    def _nearest(self, symbols: Tensor) -> Tensor:
        """(..., 2) level numbers of real and imaginary part."""
        count = 1 << self.bits // 2
        levels = (torch.view_as_real(symbols) / self.unit + (count - 1)) / 2
        return levels.round().clamp(0, count - 1).to(torch.int64)


def _given(value: object, argument: str) -> tuple[Tensor, bool]:
    """The value as a tensor, and whether it was an array; a copy, as torch warns of memory that is read-only."""
    refuse_masked(value, argument)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        array = np.asarray(value)
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="))), True
    if not isinstance(value, Tensor):
        kind = f"an array of dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{argument}: expected a tensor or a NumPy array of numbers, got {kind}")
    return value, False


def _symbols(value: object) -> tuple[Tensor, bool]:
    given, numpy = _given(value, "symbols")
    if not given.is_complex():
        raise TypeError(f"symbols: expected complex symbols, got {given.dtype}")
    return given.resolve_conj(), numpy


def _back(result: Tensor, numpy: bool) -> Any:
    return result.numpy() if numpy else result


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
    checked_order(order, "order")
    inputs = Inputs.of(snr, "snr")
    ratio = inputs.nonnegative(snr, "snr")
    tail = 0.5 * torch.special.erfc((3 * ratio / (order - 1)).sqrt() / math.sqrt(2))
    p = 2 * (1 - 1 / math.sqrt(order)) * tail
    return inputs.back(p * (2 - p))
