"""Booleans as bits: eight entries a byte, the first in the lowest bit, as in ``numpy.packbits(bitorder="little")``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from .._display import counted

_SPREAD = 0x0101010101010101  # times a byte: that byte eight times
_DIAGONAL = 0x8040201008040201 - (1 << 64)  # bit k of byte k, as a signed number
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: byte k's is bit 56 + k


def packed(mask: Tensor) -> Tensor:
    """The bits of a flat boolean tensor of n entries, ``(ceil(n / 8),)`` uint8; those left over are 0."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    return packed_by_torch(mask)


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The boolean tensor of `shape` whose entries were packed."""
    if bits.device.type == "cpu":
        entries = np.unpackbits(bits.numpy(), bitorder="little")
        return torch.from_numpy(entries).view(torch.bool)[: prod(shape)].view(shape)
    return unpacked_by_torch(bits, shape)


def packed_by_torch(mask: Tensor) -> Tensor:
    """`packed` on any device."""
    octets = mask.new_zeros(-(-len(mask) // 8), dtype=torch.int64)
    octets.view(torch.bool)[: len(mask)] = mask
    return (octets.mul_(_GATHER) >> 56).to(torch.uint8)


def unpacked_by_torch(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`unpacked` on any device."""
    octets = bits.new_zeros(len(bits), dtype=torch.int64).add_(bits).mul_(_SPREAD).bitwise_and_(_DIAGONAL)
    return octets.view(torch.uint8)[: prod(shape)].ne(0).view(shape)


class Masks(Mapping[str, Tensor]):
    """Name -> boolean tensor, stored as bits and made when it is read.

    Args:
        bits: name -> packed entries.
        shapes: name -> shape.
    """

    def __init__(self, bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.bits = MappingProxyType(dict(bits))
        self.shapes = MappingProxyType({key: tuple(shapes[key]) for key in bits})

    def __getitem__(self, key: str) -> Tensor:
        return unpacked(self.bits[key], self.shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)

    def __contains__(self, key: object) -> bool:
        return key in self.bits

    __eq__ = object.__eq__  # comparing tensors has no single answer
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Masks({counted(len(self), 'tensor')}, {sum(map(prod, self.shapes.values())):,} entries)"
