"""Robust fusion rules as their sources define them: on stacked (N, ...) tensors, with loops, NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor


def whole(function: Callable[[Tensor], Tensor]) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """The naive form of a rule that works on whole vectors, from a function of (N, n) rows."""

    def naive(vectors):
        rows = torch.stack([torch.cat([tensor.reshape(-1) for tensor in vector.values()]) for vector in vectors])
        parts = function(rows).split([tensor.numel() for tensor in vectors[0].values()])
        return {key: part.reshape(vectors[0][key].shape) for key, part in zip(vectors[0], parts, strict=True)}

    return naive


def median(x: Tensor) -> Tensor:
    return torch.as_tensor(np.median(x.numpy(), axis=0)) if x.numel() else x[0]


def trimmed(x: Tensor, trim: float) -> Tensor:
    share = trim if isinstance(trim, float) else (trim + 0.5) / len(x)
    return torch.as_tensor(scipy.stats.trim_mean(x.numpy(), share, axis=0)) if x.numel() else x[0]


def clipped(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1)
    limit = float(np.median(norms.numpy()))
    return torch.stack([row / max(1.0, norm / limit) for row, norm in zip(rows, norms, strict=True)]).mean(0)


def krum(hostile: int, keep: int, rows: Tensor) -> Tensor:
    scores = []
    for row in rows:
        distances = sorted(float((row - other).square().sum()) for other in rows)[1:]  # without itself
        scores.append(sum(distances[: len(rows) - hostile - 2]))
    return rows[np.argsort(scores, kind="stable")[:keep].tolist()].mean(0)


def geometric_median(rows: Tensor) -> Tensor:
    """By a general optimiser, from the mean, on weights of the rows; one of the rows if that is better."""
    if len(rows) < 3:
        return rows.mean(0)
    x = rows.numpy()

    def objective(weights):
        z = weights @ x
        distances = np.linalg.norm(z - x, axis=1)
        return distances.sum(), x @ ((z - x) / distances[:, None]).sum(0)

    def condition(weights):  # of Weiszfeld's fixed point
        reciprocal = 1 / np.linalg.norm(weights @ x - x, axis=1)
        return weights - reciprocal / reciprocal.sum()

    start = np.full(len(x), 1 / len(x))
    found = scipy.optimize.minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-7})
    rough = found.x / found.x.sum()
    weights = scipy.optimize.root(condition, rough, tol=1e-15).x
    at_rows = [np.linalg.norm(row - x, axis=1).sum() for row in x]
    best = weights @ x if objective(weights)[0] < min(at_rows) else x[int(np.argmin(at_rows))]
    return torch.as_tensor(best)


def consensus(x: Tensor, threshold: float = 0.4, agreement: int = 2, scale: float = 1.0) -> Tensor:
    total = x.sum(0)
    votes = sum((row.abs() >= threshold * (total - row).abs()).int() for row in x)
    return scale * total * (votes >= agreement)
