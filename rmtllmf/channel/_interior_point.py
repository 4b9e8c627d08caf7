r"""Which noise of given power makes the largest SINR as small as possible: a primal-dual interior point method.

With :math:`\gamma_q(C) = b_q^H (C + \sigma^2 I + \sum_{j > q} b_j b_j^H)^{-1} b_q`,

.. math:: \max_{C \succeq 0,\ \mathrm{tr}\, C = 1,\ \tau}\ \tau \quad \text{subject to}\quad 1/\gamma_q(C) \ge \tau

is convex: :math:`1/\gamma_q` is the largest :math:`\tau` with :math:`X_q \succeq \tau\, b_q b_q^H`, so it is concave.
Far above the noise, where a rate is a difference of large logarithms, it is nearly linear in `C`, which is why it is
preferred here: about ten Newton steps do, at any signal to noise ratio. With :math:`v_q = X_q^{-1} b_q`,

.. math:: d\,\frac{1}{\gamma_q} = \frac{v_q^H\, dC\, v_q}{\gamma_q^2}, \qquad
          d^2 \frac{1}{\gamma_q} = -\frac{2}{\gamma_q^2}\, \bigl\| G_q^H\, dC\, v_q \bigr\|^2, \qquad
          G_q G_q^H = X_q^{-1} - \frac{v_q v_q^H}{\gamma_q}

The steps are Mehrotra's predictor and corrector, with the direction of Helmberg and others for :math:`ZC = \mu I`, in
coordinates in which `C` is the identity. Where the curvature cuts them short, a Newton step of the plain barrier method
leads back to the central path. Roots of :math:`X_q^{-1}` come from each other by changes of rank one, so no matrix as
large as a user's power is ever factored. None of this needs to be trusted: `duality_gap` bounds the error of any `C`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_TARGET = 1e-11  # relative gap to stop at
_ACCEPTED = 1e-9  # and from which on it is worth while to stop
_STALLED = 4  # after so many steps without halving the gap: rounding is all that is left
_MAX_STEPS = 100
_BOUNDARY = 0.99  # share of the way to the boundary that a step may go
_CURVED = 0.3  # share of the slack expected by the slopes that must be left after a step
_SLOW = 0.5  # a step this much shorter than planned has left the central path: centre first
_HALVINGS = 20  # of a step
_MEMORY = 2**22  # complex numbers in the largest intermediate result; batches are cut to fit


class Point(NamedTuple):
    """Where the iteration stands; all tensors lead with the batch."""

    L: Tensor  # (n, n), C = L L^H
    Z: Tensor  # (n, n) L^H Z L, multiplier of C >= 0
    tau: Tensor  # () in units of the start's smallest 1/gamma
    slack: Tensor  # (Q,) of 1/gamma_q >= tau
    weight: Tensor  # (Q,) its multiplier
    level: Tensor  # () multiplier of the trace
    pace: Tensor  # () share of the planned way that the last step went


class Received(NamedTuple):
    """What the noise leaves of the users."""

    v: Tensor  # (Q, n) X_q^-1 b_q
    gamma: Tensor  # (Q,) SINR
    G: Tensor  # (Q, n, n) root of the rest of X_q^-1


def minimise_largest_sinr(signal: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The optimal `C` and a bound on its error.

    `signal` (batch, n, Q), first decoded first, and `floor` (batch,) are in units of the jammer's power; somebody is
    heard in every batch item.

    Returns:
        (batch, n, n) root `L` of ``C = L L^H``, of unit trace, and (batch,) how far the largest SINR of that very `C`
        may be above the optimum, relatively: a duality gap with what rounding may add. It is for the caller to judge.
    """
    size, users = signal.shape[-2:]
    chunk = max(1, _MEMORY // (users * size**3))
    parts = [_solve(*part) for part in zip(signal.split(chunk), floor.split(chunk), strict=True)]
    roots, gaps = zip(*parts, strict=True)
    return torch.cat(roots), torch.cat(gaps)


def _solve(signal: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    heard = signal.abs().square().sum(-2) > 0
    point, unit = _start(signal, floor, heard)
    best, gap = point.L.clone(), torch.full_like(floor, torch.inf)
    left = torch.arange(len(floor), device=floor.device)  # batch items not solved yet
    patience = torch.zeros_like(left)
    now = receive(signal, point.L, floor)
    for _ in range(_MAX_STEPS):
        new, previous = duality_gap(point.L, point.weight, now, heard), gap[left]
        better = new < previous  # not where it is NaN
        best[left[better]], gap[left[better]] = point.L[better], new[better]
        patience = torch.where(new < 0.5 * previous, 0, patience + 1)
        going = (gap[left] > _TARGET) & ((patience < _STALLED) | (gap[left] > _ACCEPTED)) & torch.isfinite(new)
        if not bool(going.any()):
            break
        if not bool(going.all()):
            signal, floor, heard, unit = signal[going], floor[going], heard[going], unit[going]
            left, patience = left[going], patience[going]
            point, now = Point(*(part[going] for part in point)), Received(*(part[going] for part in now))
        point, now = _step(point, now, signal, floor, heard, unit)
    return best / best.abs().square().sum((-2, -1), keepdim=True).sqrt(), gap


def receive(signal: Tensor, L: Tensor, floor: Tensor) -> Received:
    """Last decoded first: the root of X_q^-1 turns into that of X_(q-1)^-1 by a change of rank one."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    R = torch.linalg.qr(torch.cat([L.mH, floor.sqrt()[:, None, None] * eye], dim=-2)).R
    root = torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True)
    v, gamma, G = [], [], []
    for q in range(signal.shape[-1] - 1, -1, -1):
        seen = root.mH @ signal[..., q, None]
        power = seen.abs().square().sum((-2, -1))
        direction = seen / torch.where(power > 0, power, 1.0).sqrt()[:, None, None]
        filtered = root @ direction
        rest = root - filtered @ direction.mH
        root = rest + filtered * (1 + power).rsqrt()[:, None, None] @ direction.mH
        v.append(filtered[..., 0] * power.sqrt()[:, None])
        gamma.append(power)
        G.append(rest)
    return Received(torch.stack(v[::-1], 1), torch.stack(gamma[::-1], 1), torch.stack(G[::-1], 1))


def duality_gap(L: Tensor, weight: Tensor, now: Received, heard: Tensor) -> Tensor:
    r"""How far the largest SINR may be above the optimum, relatively; holds for any weights >= 0.

    With weights that add up to 1 and :math:`D = \sum_q w_q \nabla (1/\gamma_q)`, concavity bounds the optimum by
    :math:`\tau^* \le \sum_q w_q / \gamma_q + \lambda_{max}(D) - \mathrm{tr}\, D C`.
    """
    weight = torch.where(heard, weight, 0.0)
    weight = weight / weight.sum(-1, keepdim=True)
    gamma = torch.where(heard, now.gamma, 1.0)
    reached = torch.where(heard, 1 / gamma, torch.inf).amin(-1)
    root = now.v.mT * (weight.sqrt() / gamma)[:, None, :]
    trace = L.abs().square().sum((-2, -1))
    highest = trace * _largest(root) - (L.mH @ root).abs().square().sum((-2, -1))
    above = (weight * torch.where(heard, 1 / gamma - reached[:, None], 0.0)).sum(-1)
    # C itself is rounded to eps of its trace
    rounding = torch.finfo(gamma.dtype).eps * trace * (now.v.abs().square().sum(-1) / gamma).amax(-1)
    return (above + highest).clamp_min(0.0) / reached + rounding


def _start(signal: Tensor, floor: Tensor, heard: Tensor) -> tuple[Point, Tensor]:
    """White noise, a tau of half of what it reaches, and multipliers that satisfy all equations."""
    batch, size, _ = signal.shape
    eye = torch.eye(size, dtype=signal.dtype, device=signal.device)
    L = (eye / math.sqrt(size)).expand(batch, size, size)
    now = receive(signal, L, floor)
    unit = 1 / now.gamma.amax(-1)
    inverse, slope = _inverse(now, heard, unit)
    tau = torch.full_like(unit, 0.5)
    slack = inverse - tau[:, None]
    weight = 1 / slack
    weight = weight / weight.sum(-1, keepdim=True)
    root = L.mH @ now.v.mT * (weight * slope).sqrt()[:, None, :]
    D = root @ root.mH
    level = 1.2 * size * _largest(root)
    return Point(L, level[:, None, None] * (L.mH @ L) - D, tau, slack, weight, level, torch.ones_like(unit)), unit


def _inverse(now: Received, heard: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """1/gamma and 1/gamma^2 in units of `unit`; for silent users a constant out of reach: tau is at most n."""
    gamma = torch.where(heard, now.gamma, 1.0)
    inverse = 1 / (gamma * unit[:, None])
    far = 2.0 * now.v.shape[-1]
    return torch.where(heard, inverse, far), torch.where(heard, inverse / gamma, 0.0)


def _step(
    point: Point, now: Received, signal: Tensor, floor: Tensor, heard: Tensor, unit: Tensor
) -> tuple[Point, Received]:
    """Predictor and corrector, or a step back to the central path, on one factorisation of Newton's equations.

    Unknowns: the n^2 real coordinates of D in ``C + L D L^H``, the weights, tau and the level.
    """
    users, size = now.v.shape[-2:]
    square = size * size
    eye = torch.eye(size, dtype=point.L.dtype, device=point.L.device)
    z, turn = torch.linalg.eigh(point.Z)
    L, slack, weight = point.L @ turn, point.slack, point.weight
    products = ((weight * slack).sum(-1) + z.sum(-1)) / (users + size)
    lost = point.pace < _SLOW
    weight = torch.where(lost[:, None], products[:, None] / slack, weight)  # the barrier's own multipliers
    z = torch.where(lost[:, None], products[:, None], z)
    _, slope = _inverse(now, heard, unit)
    seen = now.v @ L.conj()
    slopes = _coordinates(seen[..., :, None] * seen.conj()[..., None, :]) * slope[..., None]
    gram = L.mH @ L
    trace = _coordinates(gram)
    mean = 0.5 * (z[:, :, None] + z[:, None, :])

    curvature = _curvature(L.mH[:, None] @ now.G, seen, weight * slope)
    curvature = curvature + torch.diag_embed(_entries(mean))
    ratio = slack / weight
    row = 1 / ratio.clamp_min(1.0)  # slack constraints have huge ones
    system = curvature.new_zeros(len(z), square + users + 2, square + users + 2)
    system[:, :square, :square] = curvature
    system[:, :square, square:-2] = -slopes.mT
    system[:, :square, -1] = system[:, -1, :square] = trace
    system[:, square:-2, :square] = slopes * row[..., None]
    system[:, square:-2, square:-2] = torch.diag_embed(ratio * row)
    system[:, square:-2, -2] = -row
    system[:, -2, square:-2] = 1.0
    LU, pivots, _ = torch.linalg.lu_factor_ex(system)

    Z = torch.diag_embed(z).to(L.dtype)
    dual = (weight[..., None] * slopes).sum(1) - point.level[:, None] * trace
    power = 1 - torch.diagonal(gram, dim1=-2, dim2=-1).real.sum(-1)
    share = 1 - weight.sum(-1)

    def newton(product: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The step that changes ``weight slack`` by `product` and ``Z C`` by `matrix`, and solves the rest."""
        right = [dual + _coordinates(Z + matrix), row * (product / weight), share[:, None], power[:, None]]
        x = torch.linalg.lu_solve(LU, pivots, torch.cat(right, dim=-1)[..., None])[..., 0]
        D, dweight = _hermitian(x[:, :square], size), x[:, square:-2]
        return D, matrix - mean * D, x[:, -2], (product - slack * dweight) / weight, dweight, x[:, -1]

    def lengths(D: Tensor, dZ: Tensor, dslack: Tensor, dweight: Tensor, most: float) -> tuple[Tensor, Tensor]:
        """How far C and the slacks, and Z and the weights, may go."""
        scaled = dZ * (z[:, :, None] * z[:, None, :]).rsqrt()
        primal = torch.minimum(_lowest(D), (dslack / slack).amin(-1))
        multipliers = torch.minimum(_lowest(scaled), (dweight / weight).amin(-1))
        return most / (-primal).clamp_min(most), most / (-multipliers).clamp_min(most)

    D, dZ, _, dslack, dweight, _ = newton(-weight * slack, -Z)
    there, back = lengths(D, dZ, dslack, dweight, 1.0)
    predicted = ((weight + back[:, None] * dweight) * (slack + there[:, None] * dslack)).sum(-1)
    predicted = predicted + _inner(Z + back[:, None, None] * dZ, eye + there[:, None, None] * D)
    target = torch.where(lost, 1.0, (predicted / (products * (users + size))).clamp(0.0, 1.0) ** 3) * products
    second = torch.where(lost, 0.0, 1.0)
    product = target[:, None] - weight * slack - second[:, None] * dweight * dslack
    matrix = target[:, None, None] * eye - Z - 0.5 * second[:, None, None] * (dZ @ D + D @ dZ)
    D, dZ, dtau, dslack, dweight, dlevel = newton(product, matrix)
    there, back = lengths(D, dZ, dslack, dweight, _BOUNDARY)
    for _ in range(_HALVINGS):
        change, _ = torch.linalg.cholesky_ex(eye + there[:, None, None] * D)
        new, tau = L @ change, point.tau + there * dtau
        now = receive(signal, new, floor)
        reached = _inverse(now, heard, unit)[0] - tau[:, None]
        short = (reached < _CURVED * (slack + there[:, None] * dslack)).any(-1)
        if not bool(short.any()):
            break
        there, back = torch.where(short, 0.5 * there, there), torch.where(short, 0.5 * back, back)
    weight = weight + back[:, None] * dweight
    Z = change.mH @ (Z + back[:, None, None] * dZ) @ change
    return Point(new, Z, tau, reached, weight, point.level + back * dlevel, there), now


def _curvature(G: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
    """(n^2, n^2): sum over users of ``2 weight norm(G^H D seen)^2`` as a form in the coordinates of D."""
    products = G.mH[..., None] * seen[..., None, None, :]  # of user q, row a of G^H, entry (i, j) of D
    low, high = _pairs(seen.shape[-1], seen.device)
    below, above = products[..., low, high], products[..., high, low]
    diagonal = torch.diagonal(products, dim1=-2, dim2=-1)
    rows = torch.cat([diagonal, math.sqrt(0.5) * (below + above), math.sqrt(0.5) * 1j * (below - above)], dim=-1)
    rows = (rows * (2 * weight).sqrt()[..., None, None]).flatten(1, 2)
    rows = torch.cat([rows.real, rows.imag], dim=1)
    return rows.mT @ rows


def _pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    low, high = torch.tril_indices(size, size, -1, device=device)
    return low, high


def _entries(matrix: Tensor) -> Tensor:
    """Of a real symmetric matrix, each as often as a Hermitian matrix has coordinates there."""
    below = matrix[..., *_pairs(matrix.shape[-1], matrix.device)]
    return torch.cat([torch.diagonal(matrix, dim1=-2, dim2=-1), below, below], dim=-1)


def _coordinates(matrix: Tensor) -> Tensor:
    """(..., n^2) of a Hermitian matrix in an orthonormal basis over the reals."""
    below = math.sqrt(2.0) * matrix[..., *_pairs(matrix.shape[-1], matrix.device)]
    return torch.cat([torch.diagonal(matrix, dim1=-2, dim2=-1).real, below.real, below.imag], dim=-1)


def _hermitian(coordinates: Tensor, size: int) -> Tensor:
    """The Hermitian matrix that has these coordinates."""
    low, high = _pairs(size, coordinates.device)
    diagonal, real, imag = coordinates.split([size, len(low), len(low)], dim=-1)
    below = math.sqrt(0.5) * torch.complex(real, imag)
    matrix = torch.diag_embed(diagonal).to(below.dtype)
    matrix[..., low, high], matrix[..., high, low] = below, below.conj()
    return matrix


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.mT * b).sum((-2, -1)).real


def _lowest(matrix: Tensor) -> Tensor:
    """The smallest eigenvalue; NaN where there is none to be found."""
    finite = torch.isfinite(matrix).all(-1).all(-1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values = torch.linalg.eigvalsh(torch.where(finite[:, None, None], matrix, eye))
    return torch.where(finite, values[:, 0], torch.nan)


def _largest(root: Tensor) -> Tensor:
    """The largest eigenvalue of ``root root^H``."""
    return -_lowest(-(root @ root.mH))
