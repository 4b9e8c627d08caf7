"""Norms of the task vectors and distances between them, over all entries, in one pass and in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .. import _engine
from .._engine import Fusion, Piece

CHUNK = 1 << 15  # entries: eight vectors and their differences take 4 MB in float64; shorter ones cost more calls
CHUNK_ON_DEVICE = 1 << 20


def squared_distances(fusion: Fusion) -> Tensor:
    r"""``(N, N)`` float64 on the CPU: :math:`\lVert \tau_p - \tau_q \rVert^2` of the weighted vectors.

    From differences, not from inner products: 0 for equal vectors, and as exact for two that are close to each other
    and far from the origin, or beside a third one that is a million times as long.
    """

    def look(rows: Tensor, space: Tensor) -> Tensor:
        count = len(rows)
        found = rows.new_zeros(count, count)
        for index in range(count - 1):
            apart = torch.sub(rows[index + 1 :], rows[index], out=space[index + 1 :])
            found[index, index + 1 :] = _squares(apart)
        return found

    upper = _summed(fusion, look)
    return upper + upper.T


def gram_around(fusion: Fusion, center: int) -> Tensor:
    r"""``(N, N)`` float64 on the CPU: inner products of the differences of the weighted vectors from one of them."""

    def look(rows: Tensor, space: Tensor) -> Tensor:
        apart = torch.sub(rows, rows[center], out=space)
        return apart @ apart.T

    return _summed(fusion, look)


def squared_norms(fusion: Fusion) -> Tensor:
    """``(N,)`` float64 on the CPU: the squared norms of the weighted vectors."""
    return _summed(fusion, lambda rows, space: _squares(rows))


def grams(fusion: Fusion) -> dict[str, Tensor]:
    """For every name ``(N, N)`` float64 on the CPU: inner products of the weighted vectors' tensors."""
    parts: dict[str, list[Tensor]] = {key: [torch.zeros(1, fusion.count, fusion.count).double()] for key in fusion.keys}
    for key, sums in _found(fusion, lambda rows, space: rows @ rows.T):
        parts[key].append(sums)
    return {key: _one_after_the_other(found) for key, found in parts.items()}


def _squares(rows: Tensor) -> Tensor:
    """The squared norm of each row."""
    return torch.linalg.vector_norm(rows, dim=-1).square_()


def _summed(fusion: Fusion, look: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The sum of what `look` finds in ``(N, n)`` chunks; it is given as much memory beside each."""
    nothing = look(*torch.zeros(2, fusion.count, 1, dtype=torch.float64))[None]
    return _one_after_the_other([nothing, *(sums for _, sums in _found(fusion, look))])


def _one_after_the_other(found: list[Tensor]) -> Tensor:
    return torch.from_numpy(np.add.reduce(torch.cat(found).numpy(), axis=0))


def _found(fusion: Fusion, look: Callable[[Tensor, Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names, and what `look` finds in the chunks of a piece of each, stacked.

    The chunks are the same ones in the same order, whatever the threads do and whether a tensor is read in pieces or as
    a whole: added up they have the same bits.
    """
    if fusion.differentiable:
        raise InputError(
            "vectors: gradients do not flow through distances between vectors; detach them, or call the rule under "
            "torch.no_grad()"
        )

    local = threading.local()  # memory that is asked for again and again by several threads adds up

    def survey(piece: Piece) -> tuple[str, Tensor]:
        device = piece.parts[0].device
        longest = min(CHUNK, _engine.PIECE) if device.type == "cpu" else min(CHUNK_ON_DEVICE, _engine.PIECE_ON_DEVICE)
        rooms = getattr(local, "rooms", None)
        if rooms is None or rooms.device != device:
            rooms = local.rooms = torch.empty(2, fusion.count * longest, dtype=torch.float64, device=device)
        found = []
        for start in range(0, len(piece), longest):
            shape = (fusion.count, min(longest, len(piece) - start))
            rows, space = rooms[:, : shape[0] * shape[1]].view(2, *shape)
            for row, part in zip(rows, piece.parts, strict=True):
                row.copy_(part[start : start + longest])
            found.append(look(rows, space))
        return piece.key, torch.stack(found).cpu()

    for key, sums in fusion.survey(survey):
        if not torch.isfinite(sums).all():
            raise fusion.blame(key)
        yield key, sums
