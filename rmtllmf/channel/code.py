"""Error-correcting codes for the digital link: bits to code bits, and log-likelihood ratios back to bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._state import whole_number
from ..errors import InputError
from .sionna import ldpc_decode, ldpc_encode

__all__ = ["LdpcCode"]


@dataclass(frozen=True)
class LdpcCode:
    """A 5G LDPC code for `transmit_symbols`: `k` information bits become `n` code bits. Needs the extra `sionna`.

    Attributes:
        k: information bits of a code word.
        n: code bits, so that ``k / n`` is the rate.
        iterations: of the belief propagation decoder.

    Raises:
        InputError: not ``1 <= k <= n``, or no iterations; TypeError: no whole numbers. Pairs that the standard does not
            have are found when the code is used.

    Source: 3GPP TS 38.212, section 5.3.2; Sionna's ``LDPC5GEncoder`` and ``LDPC5GDecoder``.

    Example:
        >>> LdpcCode(k=500, n=1000).rate
        0.5
    """

    k: int
    n: int
    iterations: int = 20

    def __post_init__(self) -> None:
        for name in ("k", "n", "iterations"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, at_least=1))
        if self.k > self.n:
            raise InputError(f"n: expected at least the {self.k} information bits, got {self.n} code bits")

    @property
    def rate(self) -> float:
        """Information bits per code bit."""
        return self.k / self.n

    def encode(self, bits: Tensor) -> Tensor:
        """(Q, length) bits -> (Q, words * n) code bits; the last word is filled up with zeros."""
        users, length = bits.shape
        words = -(-length // self.k)
        padded = torch.nn.functional.pad(bits, (0, words * self.k - length))
        coded: Tensor = ldpc_encode(padded.view(users * words, self.k), self.n)
        return coded.reshape(users, words * self.n)

    def decode(self, ones: Tensor, length: int) -> Tensor:
        """(Q, words * n) probabilities that a code bit is 1 -> (Q, length) decided bits."""
        users = ones.shape[0]
        sure = torch.finfo(torch.float32).eps
        p = ones.to(torch.float64).clamp(sure, 1 - sure)
        llr = (torch.log1p(-p) - p.log()).view(-1, self.n)
        decided: Tensor = ldpc_decode(llr, self.k, iterations=self.iterations)
        return decided.view(users, -1)[:, :length]
