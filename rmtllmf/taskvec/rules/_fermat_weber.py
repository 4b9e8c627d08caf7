"""The point with the smallest sum of distances to N given ones (Fermat, Weber), as their convex combination."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...errors import ConvergenceError

Array: TypeAlias = NDArray[Any]

SAME = 1e-12  # squared distance, relative to that from the most central point, below which two points count as one
FAR = 1e8  # ratio of squared distances from the most central point above which inner products are needed
SLACK = 1e-9  # relative excess of the pull on a given point that still counts as held


def optimal_weights(squared: Array, gram: Array, tolerance: float, max_steps: int) -> Array:
    r"""Weights ``(N,)`` that add up to 1: the minimiser of :math:`\sum_q \lVert z - x_q \rVert` is their combination.

    Args:
        squared: ``(N, N)`` squared distances.
        gram: ``(N, N)`` inner products of the points' differences from the `most_central` one.
        tolerance: for the norm of the gradient, per point.
        max_steps: at most.

    Raises:
        ConvergenceError: the tolerance is not reached.
    """
    points, same = _coordinates(squared, gram)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    distances[same] = np.inf
    pulls = ((points[:, None] - points) / distances[..., None]).sum(1)
    held = np.linalg.norm(pulls, axis=-1) <= same.sum(1) * (1 + SLACK)
    if held.any():  # a given point is optimal where the others pull with no more than its own multiplicity
        weights = held / same.sum(1)
        return np.asarray(weights / weights.sum())

    start = int(np.argmin(np.where(same, 0.0, distances).sum(1)))
    points = points - points[start]  # the optimum may be close to it: as many digits for the difference as possible
    # Vardi and Zhang's step off a given point: below every given point, so the descent never meets one again
    weights = 1 / distances[start]
    multiplicity = same[start].sum() / np.linalg.norm(pulls[start])
    z = (1 - multiplicity) * (weights @ points) / weights.sum()
    for _ in range(max_steps):
        value, gradient, weights = _derivatives(z, points)
        if np.linalg.norm(gradient) <= tolerance * len(points):
            return np.asarray(weights / weights.sum())
        z = _step(z, points, value, gradient, weights)
    raise ConvergenceError(
        f"geometric_median: the pull of the vectors is {np.linalg.norm(gradient) / len(points):.1e} per vector after "
        f"{max_steps} steps, tolerance is {tolerance:.1e}; raise max_steps or tolerance"
    )


def most_central(squared: Array) -> int:
    """The given point with the smallest sum of distances."""
    return int(np.argmin(np.sqrt(squared).sum(1)))


def gram_from(squared: Array) -> Array | None:
    """Inner products around the most central point; None if the distances are too different for that."""
    around = squared[most_central(squared)]
    if around.max() > FAR * np.min(around, where=around > 0, initial=np.inf):
        return None
    return np.asarray((around[:, None] + around - squared) / 2)


def _coordinates(squared: Array, gram: Array) -> tuple[Array, Array]:
    """Points ``(N, N)`` with these distances, and which of them are one.

    Cholesky factor, near points first: what is far away (a hostile vector many times as long) costs the others no
    digits.
    """
    around = np.diag(gram)
    same = squared <= SAME * np.maximum(around[:, None], around)
    points = np.zeros_like(squared)
    order = np.argsort(around, kind="stable")
    for column, pivot in enumerate(order):
        later = order[column:]
        rest = gram[later, pivot] - points[later] @ points[pivot]
        if rest[0] > 0.01 * SAME * gram[pivot, pivot]:
            points[later, column] = rest / np.sqrt(rest[0])
    return points, same


def _derivatives(z: Array, points: Array) -> tuple[float, Array, Array]:
    """Sum of distances, its gradient, and the reciprocal distances."""
    distances = np.linalg.norm(z - points, axis=-1)
    weights = 1 / distances
    return float(distances.sum()), weights @ (z - points), weights


def _step(z: Array, points: Array, value: float, gradient: Array, weights: Array) -> Array:
    """Newton's step, shortened if need be; else Weiszfeld's, which always goes down."""
    directions = (z - points) * weights[:, None]
    hessian = np.diag(np.full(len(z), weights.sum())) - (directions * weights[:, None]).T @ directions
    newton = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
    for length in (1.0, 0.5, 0.25, 0.125):
        trial = z - length * newton
        if not (trial == points).all(-1).any():
            new, slope, _ = _derivatives(trial, points)
            if new <= value * (1 + 1e-15) and slope @ slope < gradient @ gradient:
                return np.asarray(trial)
    return np.asarray(weights @ points / weights.sum())
