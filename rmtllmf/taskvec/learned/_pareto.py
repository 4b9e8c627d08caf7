"""The points of a box at which none of several functions can be made larger without another becoming smaller."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GENERATIONS = 100
POPULATION = 128  # at least
STEPS = 1 << 14  # of which the range of each value is made: who is better by less is not better
SPREAD = 20.0  # how near children stay to their parents: the index of the crossover's and the mutation's polynomial


def efficient(values: Tensor) -> Tensor:
    """(P,) which of (P, T) values no other value beats: as large in all, and larger in one."""
    return ~_beats(values).any(0)


def front_of(
    function: Callable[[Tensor], Tensor], low: float, high: float, dimension: int, size: int, source: torch.Generator
) -> Tensor:
    """(F, N) points, at most `size`, on the front of `function`, (P, N) points -> (P, T) values, by NSGA-II."""
    count = max(POPULATION, size)
    points = low + (high - low) * torch.rand(8 * count, dimension, generator=source, dtype=torch.float64)
    values = function(points)
    unit = (values.amax(0) - values.amin(0)).clamp_min(torch.finfo(values.dtype).tiny) / STEPS

    def steps(points: Tensor) -> Tensor:
        return (function(points) / unit).round()

    points = points[_best(steps(points), count)]
    for _ in range(GENERATIONS):
        points = torch.cat([points, _children(points, low, high, source)])
        points = points[_best(steps(points), count)]
    values = steps(points)
    first: dict[tuple[float, ...], int] = {}
    for index in efficient(values).nonzero()[:, 0].tolist():
        first.setdefault(tuple(values[index].tolist()), index)  # one point for each trade-off
    points = points[list(first.values())]
    return points[_best(steps(points), size)]


def _beats(values: Tensor) -> Tensor:
    """(P, P) whether the first beats the second."""
    better = values[:, None, :] - values[None, :, :]
    return (better >= 0).all(-1) & (better > 0).any(-1)


def _best(values: Tensor, size: int) -> Tensor:
    """The indices of `size` points: whole fronts one after the other, of the last one those with most room."""
    beats = _beats(values)
    above = beats.sum(0)
    left, chosen = torch.ones(len(values), dtype=torch.bool), torch.empty(0, dtype=torch.int64)
    while len(chosen) < min(size, len(values)):
        front, room = (left & (above == 0)).nonzero()[:, 0], size - len(chosen)
        left[front] = False
        above = above - beats[front].sum(0)
        if len(front) > room:
            front = front[_crowding(values[front]).argsort(descending=True, stable=True)[:room]]
        chosen = torch.cat([chosen, front])
    return chosen


def _crowding(values: Tensor) -> Tensor:
    """(P,) how far apart the neighbours are, added up over the values; infinite for the ends."""
    distance = torch.zeros(len(values), dtype=values.dtype)
    for column in values.T:
        order = column.argsort(stable=True)
        extent = (column[order[-1]] - column[order[0]]).clamp_min(torch.finfo(values.dtype).tiny)
        distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / extent
        distance[order[[0, -1]]] = torch.inf
    return distance


def _children(points: Tensor, low: float, high: float, source: torch.Generator) -> Tensor:
    """As many, by simulated binary crossover and polynomial mutation."""
    shape = points.shape

    def uniform() -> Tensor:
        return torch.rand(shape, generator=source, dtype=points.dtype)

    left = points[torch.randint(len(points), shape[:1], generator=source)]
    right = points[torch.randint(len(points), shape[:1], generator=source)]
    u = uniform()
    factor = torch.where(u < 0.5, 2 * u, 0.5 / (1 - u)) ** (1 / (SPREAD + 1))
    children = (left + right + factor * (left - right)) / 2
    v = uniform()
    step = torch.where(v < 0.5, (2 * v) ** (1 / (SPREAD + 1)) - 1, 1 - (2 - 2 * v) ** (1 / (SPREAD + 1)))
    mutated = uniform() < 1 / shape[1]
    return (children + torch.where(mutated, step * (high - low), 0.0)).clamp(low, high)
