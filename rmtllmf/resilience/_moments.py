"""Second moments of what was received and of what was sent, estimated from the received vectors and their noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._threads import share_out
from ..errors import NonFiniteError
from ._noise import KnownNoise

CHUNK = 1 << 15  # entries of every vector held in float64 at once: 2 MB for eight users
CHUNK_ON_DEVICE = 1 << 20


@dataclass(frozen=True)
class Moments:
    r"""Sums over all coefficients of expected products, estimated.

    Attributes:
        received: (Q, Q) of two received vectors, :math:`D S D + V`.
        cross: (Q, Q) of a received vector (row) and one that was sent (column), :math:`D S`.
        basis: (Q, r) with ``basis.T @ received @ basis = diag(size)``, beside which there is nothing.
        size: (r,) all positive, and none much smaller than another.
    """

    received: Tensor
    cross: Tensor
    basis: Tensor
    size: Tensor

    @classmethod
    def of(cls, known: KnownNoise) -> Moments:
        """Of received vectors."""
        R, V = _grams(known), torch.zeros(len(known.gain), known.users, known.users, dtype=torch.float64)
        for key, parts in known.parts.items():
            for part in parts:
                V[part.block] += (part.stop - part.start) * known.covariance_of(key, part.block)
        both = R.sum(0) + V.sum(0)
        basis, noise = _pencil(both, V.sum(0))
        dual = both @ basis
        size = torch.maximum(1 - noise, noise)  # signal and noise: 1 - 2 noise, or 0 where that is negative, + noise
        signal = noise < 0.5
        projection = basis[:, signal] @ dual[:, signal].T
        clean = projection.T @ (R - V) @ projection
        gain = known.gain[:, None, :]
        cross = torch.where(gain == 0, 0.0, clean / torch.where(gain == 0, 1.0, gain)).sum(0)
        return cls(dual * size @ dual.T, cross, basis, size)

    def solve(self, right: Tensor) -> Tensor:
        """``received^-1 right``; the shortest solution where there are many."""
        return self.basis @ ((self.basis.T @ right) / self.size)

    def errors(self, weights: Tensor) -> Tensor:
        """(..., Q) -> the expected squared error, but for what does not depend on the weights."""
        return ((weights @ self.received - 2 * self.cross.sum(-1)) * weights).sum(-1)


def _pencil(both: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """`B` (Q, r) and `v` (r,) with ``B^T both B = I`` and ``B^T noise B = diag(v)``, `v` from 0 to 1."""
    unit = both.diagonal().sqrt()
    unit = torch.where(unit > 0, 1 / unit, 0.0)
    values, vectors = torch.linalg.eigh(both * unit[:, None] * unit)
    there = values > null_share(len(values)) * values[-1]
    white = unit[:, None] * vectors[:, there] / values[there].sqrt()
    shares, turned = torch.linalg.eigh(white.T @ noise @ white)
    return white @ turned, shares.clamp(0.0, 1.0)


def null_share(size: int) -> float:
    """What rounding leaves of an eigenvalue 0 beside one of 1."""
    return 64 * size * torch.finfo(torch.float64).eps


def _grams(known: KnownNoise) -> Tensor:
    """(blocks, Q, Q) inner products of the received vectors, over the entries that were sent in each block."""
    vectors, users = known.stream.flat(), known.users
    on_cpu = known.stream.device.type == "cpu"
    longest = CHUNK if on_cpu else CHUNK_ON_DEVICE
    pieces = [
        (key, part.block, start, min(start + longest, part.stop))
        for key in known.stream.keys
        for part in known.parts[key]
        for start in range(part.start, part.stop, longest)
    ]
    found = torch.zeros(len(pieces), users, users, dtype=torch.float64)

    def worker() -> Callable[[int], None]:
        room = torch.empty(users * longest, dtype=torch.float64, device=known.stream.device)

        def work(index: int) -> None:
            key, _, start, stop = pieces[index]
            rows = room[: users * (stop - start)].view(users, -1)
            for row, vector in zip(rows, vectors, strict=True):
                row.copy_(vector[key][start:stop])
            found[index] = rows @ rows.T

        return work

    share_out(worker, range(len(pieces)), alone=not on_cpu)
    total = torch.zeros(len(known.gain), users, users, dtype=torch.float64)
    for (key, block, _, _), gram in zip(pieces, found, strict=True):
        if not gram.isfinite().all():
            q = int(gram.diagonal().isfinite().logical_not().to(torch.uint8).argmax())
            raise NonFiniteError(
                f"received[{q}][{key!r}] holds NaN or infinity, or numbers whose squares overflow; expected finite ones"
            )
        total[block] += gram
    return total
