"""From coefficients to symbols and back: the analog and the digital way, for one chunk of the stream at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .._state import Tensors, extrema, inner_product
from ..errors import InputError, NonFiniteError
from ._front_end import Decide, FrontEnd
from ._stream import Stream
from .code import LdpcCode
from .constellation import Constellation
from .quantiser import Quantiser

DECISIONS = ("hard", "soft")
_WORDS = 1 << 12  # what a chunk holds of each of a symbol's bits, about

Out: TypeAlias = Sequence[dict[str, Tensor]]


class Modem(Protocol):
    """What `transmit_symbols` needs of either way."""

    @property
    def chunk(self) -> int:
        """Coefficients that fill whole symbols."""

    def symbols(self, coefficients: int) -> int:
        """How many symbols so many coefficients need."""

    def modulate(self, start: int, stop: int) -> Tensor:
        """(Q, n) symbols of coefficients [start, stop) of all users."""

    def decider(self, end: FrontEnd) -> Decide:
        """What a receiver subtracts that does not know the truth."""

    def demodulate(self, start: int, stop: int, estimates: Tensor, noise: Tensor, out: Out) -> None:
        """Write coefficients [start, stop) from unbiased estimates (Q, n) with believed error powers (Q, n)."""


@dataclass(frozen=True)
class AnalogModem:
    """Two coefficients a symbol, divided by their scale."""

    stream: Stream
    flat: Sequence[Mapping[str, Tensor]]
    scale_of: Sequence[Mapping[str, float]]
    chunk: int = 1 << 16

    def symbols(self, coefficients: int) -> int:
        """Half as many, rounded up."""
        return -(-coefficients // 2)

    def modulate(self, start: int, stop: int) -> Tensor:
        """As the class says."""
        count = self.symbols(stop - start)
        real = torch.zeros(len(self.flat), 2 * count, dtype=self.stream.dtype, device=self.stream.device)
        for key, where, cut in self.stream.pieces(start, stop):
            for q, parts in enumerate(self.flat):
                real[q, cut] = parts[key][where].to(real.dtype) / (math.sqrt(2) * self.scale_of[q][key])
        return torch.view_as_complex(real.view(len(self.flat), count, 2))

    def decider(self, end: FrontEnd) -> Decide:
        """The linear estimate itself, shrunk as the receiver would: nothing is decided."""
        return lambda q, estimate: estimate * end.gain[q].to(estimate.real.dtype)

    def demodulate(self, start: int, stop: int, estimates: Tensor, noise: Tensor, out: Out) -> None:
        """As the class says."""
        real = torch.view_as_real(estimates).flatten(-2)
        for key, where, cut in self.stream.pieces(start, stop):
            for q, parts in enumerate(out):
                parts[key][where] = (real[q, cut] * (math.sqrt(2) * self.scale_of[q][key])).to(parts[key].dtype)


@dataclass(frozen=True)
class DigitalModem:
    """Quantised coefficients, their bits in order, coded or not, Gray-labelled QAM."""

    stream: Stream
    flat: Sequence[Mapping[str, Tensor]]
    quantiser_of: Sequence[Mapping[str, Quantiser]]
    constellation: Constellation
    bits: int
    soft: bool
    code: LdpcCode | None

    @property
    def chunk(self) -> int:
        """A multiple of what a symbol and a code word hold, so that every chunk begins with new ones."""
        word = 1 if self.code is None else self.code.k
        return self.constellation.bits * word * max(1, _WORDS // word)

    def symbols(self, coefficients: int) -> int:
        """The bits of all coefficients, coded, over those of a symbol; rounded up in the last chunk."""
        chunks, rest = divmod(coefficients, self.chunk)
        return chunks * self._symbols_of(self.chunk * self.bits) + self._symbols_of(rest * self.bits)

    def modulate(self, start: int, stop: int) -> Tensor:
        """As the class says; the last code word and the last symbol are filled up with zeros."""
        words = torch.empty(len(self.flat), stop - start, dtype=torch.int64, device=self.stream.device)
        for key, where, cut in self.stream.pieces(start, stop):
            for q, parts in enumerate(self.flat):
                words[q, cut] = self.quantiser_of[q][key].encode(parts[key][where].to(self.stream.dtype))
        shifts = torch.arange(self.bits - 1, -1, -1, device=words.device)
        return self._to_symbols(((words[..., None] >> shifts) & 1).to(torch.uint8).flatten(1))

    def decider(self, end: FrontEnd) -> Decide:
        """What was decoded, sent again; without a code the nearest point, or the posterior mean of the symbol."""
        if self.code is not None:
            return lambda q, estimate: self._to_symbols(self._decoded(estimate[None], end.noise[q]))[0]
        if not self.soft:
            return lambda q, estimate: self.constellation.nearest(estimate)
        return lambda q, estimate: self.constellation.posterior_mean(estimate, end.noise[q])

    def demodulate(self, start: int, stop: int, estimates: Tensor, noise: Tensor, out: Out) -> None:
        """Levels of the decided words, or the posterior mean level."""
        length = (stop - start) * self.bits
        if self.soft:
            ones = self.constellation.bit_probabilities(estimates, noise).flatten(1)
            ones = ones[:, :length].view(len(out), -1, self.bits)
        else:
            hard = self.code is None
            bits = self.constellation.decide(estimates).flatten(1) if hard else self._decoded(estimates, noise)
            weights = 1 << torch.arange(self.bits - 1, -1, -1, device=bits.device)
            words = (bits[:, :length].reshape(len(out), -1, self.bits).to(torch.int64) * weights).sum(-1)
        for key, where, cut in self.stream.pieces(start, stop):
            for q, parts in enumerate(out):
                quantiser = self.quantiser_of[q][key]
                numbers = quantiser.expectation(ones[q, cut]) if self.soft else quantiser.decode(words[q, cut])
                parts[key][where] = numbers.to(parts[key].dtype)

    def _symbols_of(self, bits: int) -> int:
        if self.code is not None:
            bits = -(-bits // self.code.k) * self.code.n
        return -(-bits // self.constellation.bits)

    def _to_symbols(self, bits: Tensor) -> Tensor:
        """(Q, length) bits -> (Q, n) symbols."""
        coded = bits if self.code is None else self.code.encode(bits)
        spare = -coded.shape[1] % self.constellation.bits
        coded = torch.nn.functional.pad(coded, (0, spare))
        return self.constellation.modulate(coded.view(len(coded), -1, self.constellation.bits)).to(self._complex)

    def _decoded(self, estimates: Tensor, noise: Tensor) -> Tensor:
        """(Q, n) unbiased estimates -> all information bits of the code words they hold."""
        assert self.code is not None  # the caller has looked
        ones = self.constellation.bit_probabilities(estimates, noise).flatten(1)
        words = ones.shape[1] // self.code.n
        return self.code.decode(ones[:, : words * self.code.n], words * self.code.k)

    @property
    def _complex(self) -> torch.dtype:
        return torch.complex128 if self.stream.dtype == torch.float64 else torch.complex64


def quantisers(
    vector: Tensors, keys: Sequence[str], kind: str, bits: int, per_tensor: bool, argument: str
) -> dict[str, Quantiser]:
    """The quantiser of every tensor; one for all, between the extremes of the whole vector, unless `per_tensor`."""
    extremes, squares = {}, {}
    for key in keys:
        tensor = vector[key].detach()
        if tensor.numel() == 0:
            continue
        low, high = extrema(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError(f"{argument}[{key!r}] holds NaN or infinity; expected finite numbers")
        extremes[key], squares[key] = (low, high), inner_product(tensor, tensor)
    if per_tensor:
        sizes = {key: vector[key].numel() for key in extremes}
        groups = {key: [key] for key in extremes}
    else:
        sizes = dict.fromkeys(extremes, sum(vector[key].numel() for key in extremes))
        groups = {key: list(extremes) for key in extremes}
    result: dict[str, Quantiser] = {}
    made: dict[tuple[str, ...], Quantiser] = {}
    for key, group in groups.items():
        name = tuple(group)
        if name not in made:
            low, high = min(extremes[k][0] for k in group), max(extremes[k][1] for k in group)
            if low == high == 0:
                where = f"{argument}[{key!r}]" if per_tensor else argument
                raise InputError(f"{where} is all zero and cannot be normalised; leave it out")
            rms = math.sqrt(math.fsum(squares[k] for k in group) / sizes[key])
            made[name] = Quantiser.fit(kind, bits, low=low, high=high, rms=rms)
        result[key] = made[name]
    return result
