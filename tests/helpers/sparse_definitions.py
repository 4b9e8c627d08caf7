"""Rules that remove or weigh entries, as their sources define them: on whole float64 tensors, with sorting."""

from __future__ import annotations

import itertools

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
