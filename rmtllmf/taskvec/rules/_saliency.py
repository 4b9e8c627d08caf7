"""What leaving an entry of a task vector out costs, to second order: ``h tau^2 / 2``. Its root is a source to cut."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from .._engine import Fusion
from .._sources import Source


class Saliency(Source):
    r""":math:`\sqrt{h_j} \, w \tau_j`, made where it is read: the larger, the more the loss needs the entry.

    Args:
        fusion: whose vectors :math:`\tau` and weights w these are.
        task: which of them.
        curvature: name -> h, at least 0: in the entry's shape, or (n,) for all rows of a matrix (m, n); 1 for names
            that are missing.
        taken: name -> flat tensor that is not 0 where entries are another task's: 0 is read there (NaN stays NaN).
    """

    def __init__(
        self, fusion: Fusion, task: int, curvature: Mapping[str, Tensor], taken: Mapping[str, Tensor] | None = None
    ) -> None:
        self.vector, self.weights, self.task = fusion.sources[task], fusion.weights, task
        self.label, self.specs = self.vector.label, self.vector.specs
        self.curvature, self.taken = curvature, taken

    def sliceable(self, key: str) -> bool:
        return self.vector.sliceable(key)

    def identity(self, key: str) -> Hashable:
        return (id(self), self.vector.identity(key))

    def read(self, key: str, start: int, stop: int, buffer: Tensor) -> Tensor:
        part = self.vector.view(key, start, stop, buffer.dtype, buffer.device)
        if part is None:
            part = self.vector.read(key, start, stop, torch.empty_like(buffer))
        weight = self.weights(key)[self.task]
        score = self.root(key, start, stop, buffer).mul_(part)
        if weight != 1:
            score.mul_(weight)
        return score if self.taken is None else score.mul_(self.taken[key][start:stop] == 0)

    def root(self, key: str, start: int, stop: int, out: Tensor) -> Tensor:
        """The root of h for entries [start, stop), in `out`."""
        given = self.curvature.get(key)
        if given is None:
            return out.fill_(1.0)
        if given.shape == self.specs[key].shape:
            part = given.view(-1)[start:stop]
            same = part.dtype == out.dtype and part.device == out.device
            return torch.sqrt(part, out=out) if same else out.copy_(part).sqrt_()
        row = given.to(out.device, out.dtype).sqrt()
        n = len(row)
        first = min(-start % n, stop - start)  # entries before a row begins
        last = (stop - start - first) % n
        out[:first] = row[start % n :][:first]
        out[first : len(out) - last].view(-1, n)[:] = row
        out[len(out) - last :] = row[:last]
        return out


def in_place_of(fusion: Fusion, sources: Sequence[Source]) -> Fusion:
    """The same fusion with other sources of the same names and shapes, to be surveyed without weights."""
    inner = copy.copy(fusion)
    inner.sources, inner.count = sources, len(sources)
    return inner
