"""What a base station knows about the noise in the vectors that it received: gains and covariances, part by part.

A receiver computes its error covariance anyway. How far a coefficient is off also depends on what a symbol stands for,
the reference scale, which the senders tell (one number each) or which is read off the received power.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._coefficients import SCALES
from .._state import Tensors, finite_number
from ..channel import Reception
from ..channel._link import checked_estimator, link_of
from ..channel._stream import Stream, check_blocks, fading_parts
from ..errors import InputError, NonFiniteError, ShapeError

Scale: TypeAlias = str | float | Sequence[float] | np.ndarray | Tensor


@dataclass(frozen=True)
class Part:
    """Entries [start, stop) of a flattened tensor, all of which were sent in one block."""

    start: int
    stop: int
    block: int


@dataclass(frozen=True)
class KnownNoise:
    r"""Received vectors and the law of the noise in them: :math:`\hat\tau_q = g_q \tau_q + n_q`, independent of it.

    Attributes:
        stream: the received vectors, checked: names, ties, their order on the air, and how results are put together.
        gain: (blocks, Q) float64, :math:`g`; 1 for the estimators "additive" and "unbiased".
        covariance: (blocks, Q, Q) float64, of the noise in equal coefficients of the users, in units of their scales.
        imaginary: (blocks, Q, Q) float64: that of an imaginary part of a symbol of the first user with the real part of
            the second, likewise; all zero where errors are not correlated.
        scale: for each user name -> what a coefficient was divided by.
        parts: name -> its parts, in order.
    """

    stream: Stream
    gain: Tensor
    covariance: Tensor
    imaginary: Tensor
    scale: list[dict[str, float]]
    parts: dict[str, list[Part]]

    @classmethod
    def of(
        cls,
        received: Iterable[Tensors],
        reception: Reception | ArrayLike,
        *,
        estimator: str = "additive",
        scale: Scale = "rms",
    ) -> KnownNoise:
        """From the arguments with which `transmit` was called; `scale` may also be one number for each user."""
        stream = Stream.of(received)
        users = len(stream.vectors)
        link = link_of(reception, users, checked_estimator(estimator))
        symbols = (stream.length + 1) // 2
        check_blocks(link.blocks, symbols, "reception")
        root = link.root.to(torch.complex128)
        symbols_noise = root @ root.mH
        covariance = symbols_noise.real
        gain = torch.ones(link.blocks, users, dtype=torch.float64)
        for b, row in enumerate(link.gain):
            for q, g in enumerate(row):
                if g is not None:
                    gain[b, q] = float(g)
        parts: dict[str, list[Part]] = {key: [] for key in stream.keys}
        for block, first, end in fading_parts(0, symbols, symbols, link.blocks):
            for key, where, _ in stream.pieces(2 * first, min(2 * end, stream.length)):
                parts[key].append(Part(where.start, where.stop, block))
        return cls(stream, gain, covariance, symbols_noise.imag, _scales(stream, scale, gain, covariance, parts), parts)

    @property
    def users(self) -> int:
        """Number of vectors."""
        return len(self.stream.vectors)

    def covariance_of(self, key: str, block: int) -> Tensor:
        """(Q, Q) of the noise in the entries of a tensor that were sent in this block."""
        scale = torch.tensor([row[key] for row in self.scale], dtype=torch.float64)
        return self.covariance[block] * scale[:, None] * scale[None, :]

    def complex_covariance_of(self, key: str, block: int) -> Tensor:
        """The same (complex, Hermitian) for ``x + jy``, where x, y are the coefficients of one symbol; half of it."""
        scale = torch.tensor([row[key] for row in self.scale], dtype=torch.float64)
        return torch.complex(self.covariance[block], self.imaginary[block]) * scale[:, None] * scale[None, :]

    def variance(self, key: str) -> Tensor:
        """(Q,) the mean variance over the entries of a tensor, after division by the gains (which must not be 0)."""
        total, entries = torch.zeros(self.users, dtype=torch.float64), 0
        for part in self.parts[key]:
            length = part.stop - part.start
            total += length * self.covariance_of(key, part.block).diagonal() / self.gain[part.block] ** 2
            entries += length
        return total / max(1, entries)


def _scales(
    stream: Stream, scale: Scale, gain: Tensor, covariance: Tensor, parts: dict[str, list[Part]]
) -> list[dict[str, float]]:
    users = len(stream.vectors)
    if isinstance(scale, str):
        if scale not in SCALES:
            raise InputError(f"scale: expected one of {', '.join(map(repr, SCALES))} or numbers, got {scale!r}")
        if scale.endswith("peak"):
            raise InputError(
                f"scale: the peak of what was sent cannot be read off the received vectors, got {scale!r}; give the "
                "number that every sender divided by (one for each user)"
            )
        return [_measured(q, stream, gain, covariance, parts, whole=scale == "rms") for q in range(users)]
    numbers = _numbers(scale, users)
    return [dict.fromkeys(stream.keys, number) for number in numbers]


def _numbers(scale: Any, users: int) -> list[float]:
    if isinstance(scale, np.ndarray | Tensor):
        scale = scale.tolist()
    if not isinstance(scale, Sequence):
        return [finite_number(scale, "scale", positive=True)] * users
    if len(scale) != users:
        raise ShapeError(f"scale: expected one number for each of {users} users, got {len(scale)}")
    return [finite_number(number, f"scale[{q}]", positive=True) for q, number in enumerate(scale)]


def _measured(
    q: int, stream: Stream, gain: Tensor, covariance: Tensor, parts: dict[str, list[Part]], *, whole: bool
) -> dict[str, float]:
    """The rms of what was sent, from the received power: that is ``scale^2 (g^2 + noise)`` a coefficient."""
    power = (gain[:, q] ** 2 + covariance[:, q, q]).tolist()  # of a coefficient in units of the scale
    received, expected = {}, {}
    for key in stream.keys:
        flat = stream.vectors[q][key].detach().reshape(-1)
        received[key] = float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
        if not math.isfinite(received[key]):
            raise NonFiniteError(f"received[{q}][{key!r}] holds NaN or infinity; expected finite numbers")
        expected[key] = math.fsum((part.stop - part.start) * power[part.block] for part in parts[key])
    if whole:
        ratio = _root(math.fsum(received.values()), math.fsum(expected.values()))
        return dict.fromkeys(stream.keys, ratio)
    return {key: _root(received[key], expected[key]) for key in stream.keys}


def _root(received: float, expected: float) -> float:
    return math.sqrt(received / expected) if expected > 0 else 0.0
