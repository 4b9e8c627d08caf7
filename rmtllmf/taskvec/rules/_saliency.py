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
        taken: name -> flat tensor that is not 0 where entries are another task's: 0 is read there.
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
        part = self.vector.read(key, start, stop, buffer)
        root = self.root(key, start, stop, buffer).mul_(self.weights(key)[self.task])
        score = torch.mul(part, root, out=buffer)
        return score if self.taken is None else score.masked_fill_(self.taken[key][start:stop] != 0, 0.0)

    def root(self, key: str, start: int, stop: int, like: Tensor) -> Tensor:
        """The root of h for entries [start, stop), in new memory."""
        given = self.curvature.get(key)
        if given is None:
            return torch.ones_like(like)
        if given.shape == self.specs[key].shape:
            part = given.reshape(-1)[start:stop]
        else:
            repeats = -(-(stop - start) // len(given))
            part = given.roll(-(start % len(given))).repeat(repeats)[: stop - start]
        return part.to(like.device, like.dtype).sqrt()


def in_place_of(fusion: Fusion, sources: Sequence[Source]) -> Fusion:
    """The same fusion with other sources of the same names and shapes, to be surveyed without weights."""
    inner = copy.copy(fusion)
    inner.sources, inner.count = sources, len(sources)
    return inner
