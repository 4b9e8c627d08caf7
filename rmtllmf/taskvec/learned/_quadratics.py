"""Quadratic functions of a few coefficients, fitted to values that were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Link = Literal["identity", "sigmoid", "softplus"]

LEAST = 1e-3  # a share or a loss nearer to the end of its range is taken for this where the fit starts


@dataclass(frozen=True, eq=False)
class Quadratic:
    r""":math:`g(e + b^T c + \tfrac12 c^T A c)`, with g the identity, the sigmoid or the softplus.

    Attributes:
        constant: e.
        slope: (N,) b.
        curvature: (N, N) A, symmetric.
        link: g.

    Example:
        >>> import torch
        >>> f = Quadratic(1.0, torch.tensor([2.0]), torch.tensor([[6.0]]), "identity")
        >>> f(torch.tensor([[0.0], [1.0]]))
        tensor([1., 6.])
    """

    constant: float
    slope: Tensor
    curvature: Tensor
    link: Link

    def __call__(self, coefficients: Tensor) -> Tensor:
        """The values (...) at coefficients (..., N)."""
        return _linked(self.before_link(coefficients), self.link)

    def before_link(self, coefficients: Tensor) -> Tensor:
        """The same without g: in the same order, also where g is flat."""
        curved = ((coefficients @ self.curvature) * coefficients).sum(-1) / 2
        return self.constant + coefficients @ self.slope + curved


def unknowns(count: int) -> int:
    """Of a quadratic function of so many coefficients."""
    return (count + 1) * (count + 2) // 2


def fitted(points: Tensor, values: Tensor, link: Link) -> Quadratic:
    """The quadratic with the least squares of ``values - quadratic(points)``, of (S, N) points and (S,) values."""
    rows = _monomials(points)
    start = torch.linalg.lstsq(rows, _unlinked(values, link)[:, None], driver="gelsd").solution[:, 0]
    found = start if link == "identity" else _refined(rows, values, link, start)
    count = points.shape[1]
    first, second = torch.triu_indices(count, count)
    curvature = torch.zeros(count, count, dtype=points.dtype)
    curvature[first, second] += found[1 + count :]
    return Quadratic(float(found[0]), found[1 : 1 + count].clone(), curvature + curvature.mT, link)


def _monomials(points: Tensor) -> Tensor:
    """1, c_i, and c_i c_j for i <= j."""
    first, second = torch.triu_indices(points.shape[1], points.shape[1])
    return torch.cat([torch.ones_like(points[:, :1]), points, points[:, first] * points[:, second]], dim=1)


def _refined(rows: Tensor, values: Tensor, link: Link, start: Tensor) -> Tensor:
    from scipy.optimize import least_squares

    X, y = rows.numpy(), values.numpy()

    def residuals(unknown: object) -> object:
        return _linked(torch.from_numpy(X @ unknown), link).numpy() - y

    def slopes(unknown: object) -> object:
        inner = torch.from_numpy(X @ unknown)
        p = inner.sigmoid()
        return (p * (1 - p) if link == "sigmoid" else p).numpy()[:, None] * X

    found = least_squares(residuals, start.numpy(), jac=slopes, x_scale=1.0, max_nfev=500)
    return torch.from_numpy(found.x)


def _linked(inner: Tensor, link: Link) -> Tensor:
    if link == "identity":
        return inner
    return inner.sigmoid() if link == "sigmoid" else torch.nn.functional.softplus(inner)


def _unlinked(values: Tensor, link: Link) -> Tensor:
    if link == "identity":
        return values
    if link == "sigmoid":
        return torch.logit(values.clamp(LEAST, 1 - LEAST))
    return values.clamp_min(LEAST).expm1().log()
