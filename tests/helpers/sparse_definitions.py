"""Rules that remove or weigh entries, as their sources define them: on whole float64 tensors, with sorting."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def breadcrumbs(x: Tensor, smallest: float, largest: float, scale: float) -> Tensor:
    """The sum over the tasks without the ends of each task's sorted magnitudes; of equal ones the first are larger."""
    rows = x.reshape(len(x), -1).clone()
    size = rows.shape[1]
    below, above = int(smallest * size + 1e-9), int(largest * size + 1e-9)
    for row in rows:
        order = row.abs().argsort(descending=True, stable=True)
        row[order[:above]] = 0
        row[order[size - below :]] = 0
    return scale * rows.sum(0).view(x.shape[1:])


def model_stock(x: Tensor) -> Tensor:
    """The mean over the tasks, times a ratio from the mean cosine of all pairs."""
    rows = x.reshape(len(x), -1)
    pairs = list(itertools.combinations(rows, 2))
    cosine = sum(float(torch.dot(a, b) / (a.norm() * b.norm())) if a.any() and b.any() else 0.0 for a, b in pairs)
    cosine = max(0.0, cosine / len(pairs))
    return len(x) * cosine / (1 + (len(x) - 1) * cosine) * x.mean(0)


def pcb_merging(rows: Tensor, density: float, clip: float = 1e-4) -> Tensor:
    """The authors' ``PCB_merge`` on (N, n) rows; of scores that are all equal, all have a place."""
    count, size = rows.shape

    def norm(row, highest=0.0):
        lowest, top = row.min(), row.max()
        return (row - lowest) / (top - lowest) if top > lowest else torch.full_like(row, highest)

    clipped, weights = [], []
    for row in rows:
        ordered = row.abs().sort().values
        bounds = ordered[int(size * clip + 1e-9)], ordered[max(0, size - 1 - math.ceil(size * clip - 1e-9))]
        magnitude = row.abs().clamp(*bounds)
        clipped.append(magnitude * row.sign())
        score = torch.exp(count * norm(magnitude) ** 2) * torch.tanh(row * rows.sum(0))
        threshold = score.sort().values[size - max(1, math.ceil(density * size - 1e-9))]
        weights.append(norm(score.clamp(min=threshold), highest=1.0))
        if score.max() == threshold:
            weights[-1] = (score == threshold).to(rows.dtype)
    total = torch.stack(weights).sum(0)
    return (torch.stack(weights) * torch.stack(clipped)).sum(0) / total.where(total > 0, torch.ones_like(total))
