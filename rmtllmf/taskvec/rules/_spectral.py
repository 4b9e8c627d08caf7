"""Polar factors and leading singular triplets through Gram matrices: as exact as a float64 SVD, and faster.

The eigenvalues of the Gram matrix ``X^T X`` are the squares of the singular values of X, so rounding of relative size
eps hides what is below sqrt(eps) of the largest: each function takes the cheapest precision that the spectrum at hand
allows, and looks again at what is hidden after taking off what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import frexp, hypot, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from ..._state import extrema
from .._engine import Piece

# Least shares of the largest eigenvalue of a Gram matrix for which ...
FLOAT32_GRAM = 2e-3  # ... directions through it in float32 are good enough for a polar factor
FLOAT32_IMAGE = 1e-3  # ... so are the images of directions
FLOAT64_GRAM = {torch.float32: 1e-10, torch.float64: 1e-5}  # ... one in float64 does by less than 1e-5, than 1e-10
FLOAT32_PRODUCT = 1e-5  # ... a product with its inverse root may be taken in float32
WEAK = 3  # directions that float32 hides are looked at again if they are at most one in so many
GAP = 1e-5  # difference of eigenvalues, as a share of the largest, that float32 can see
PADDING = 32  # directions beside those wanted: float32 mixes up neighbours, which float64 tells apart again
SUBSPACE_GAP = 3e-3  # share of the largest eigenvalue that must part those wanted from those beyond the padding
BLOCK = 128
ROWS = 384  # of which the float64 copy stays in the cache


def rounding_level(parts: Sequence[Tensor]) -> float:
    r"""What the rounding of entries does to the singular values of the sum of `parts`, each (m, n).

    Independent errors of relative size :math:`\epsilon/2` make a matrix of spectral norm :math:`\frac{\epsilon}{2}
    (m^{-1/2} + n^{-1/2}) \sqrt{\sum_q \|\tau_q\|_F^2}` at most; a float64 SVD adds its own.
    """
    m, n = parts[0].shape
    if not m or not n:
        return 0.0
    norm = hypot(*(float(torch.linalg.vector_norm(part)) for part in parts))
    eps, double = torch.finfo(parts[0].dtype).eps, torch.finfo(torch.float64).eps
    return norm * (eps / 2 * (m**-0.5 + n**-0.5) + max(m, n) * double)


class Factors(NamedTuple):
    r"""A matrix :math:`Q = \sum_k A_k B_k^T`, which is cheaper to multiply with another one than to write out first."""

    pairs: list[tuple[Tensor, Tensor]]

    @property
    def mT(self) -> Factors:
        return Factors([(B, A) for A, B in self.pairs])

    def times(self, M: Tensor) -> Tensor:
        """``Q M``, in the precision of the factors."""
        (A, B), *others = self.pairs
        product = A @ (B.mT @ M.to(B.dtype))
        for A, B in others:
            product.addmm_(A, B.mT @ M.to(B.dtype))
        return product

    def whole(self) -> Tensor:
        """``Q``."""
        (A, B), *others = self.pairs
        Q = A @ B.mT
        for A, B in others:
            Q.addmm_(A, B.mT)
        return Q


def polar(X: Tensor, floor: float, dtype: torch.dtype) -> tuple[Factors, Tensor]:
    r"""The partial isometry :math:`\sum_i u_i v_i^T` over the singular values of X above `floor`, and all of these.

    Args:
        X: (m, n), float32 or float64.
        floor: above rounding, see `rounding_level`.
        dtype: float32 for errors below 1e-4, float64 for below 1e-9, relative in the Frobenius norm.

    Returns:
        Q (m, n), in factors of `dtype` or float64; the min(m, n) singular values in float64, in any order, those below
        `floor` roughly.
    """
    if X.shape[0] < X.shape[1]:
        Q, s = polar(X.mT, floor, dtype)
        return Q.mT, s
    if not X.shape[1]:
        return Factors([(X.to(dtype), X.new_zeros(0, 0, dtype=dtype))]), X.new_zeros(0, dtype=torch.float64)
    if dtype == torch.float32:
        cheap = _polar_in_float32(X, floor)
        if cheap is not None:
            return cheap
    eigenvalues, V = torch.linalg.eigh(gram(X.double()))
    least = max(float(eigenvalues[-1]) * FLOAT64_GRAM[dtype], 0.0)
    s = eigenvalues.clamp_min(0).sqrt()
    kept = s > floor
    if eigenvalues[0] > least or floor**2 > least:
        V, root = V[:, kept], s[kept]
        mild = root.numel() == 0 or root[0] ** 2 > FLOAT32_PRODUCT * root[-1] ** 2
        product = torch.float32 if mild and dtype == torch.float32 else torch.float64
        return Factors([(X.to(product), ((V / root) @ V.mT).to(product))]), s
    U, found, V = leading(X, X.shape[1], floor, dtype)
    s = torch.zeros_like(s)
    s[: len(found)] = found
    return Factors([(U.to(dtype), V.to(dtype))]), s


def leading(
    X: Tensor, count: int, floor: float, dtype: torch.dtype, *, quick: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular triplets of X (m, n), fewer where less of them are above `floor`.

    With `quick` the vectors err by some 1e-6 where float32 can part them from the others, else by 1e-10.

    Returns:
        U (m, r), the singular values (r) in falling order and V (n, r), in float64 (quick vectors: or float32).
    """
    if X.shape[0] < X.shape[1]:
        V, s, U = leading(X.mT, count, floor, dtype, quick=quick)
        return U, s, V
    if not X.shape[1]:
        X = X.double()
        return X, X.new_zeros(0), X.new_zeros(0, 0)
    if dtype == torch.float64:
        U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
        count = min(count, int((s > floor).sum()))
        return U[:, :count], s[:count], Vh[:count].mT
    subspace = _subspace(X, count) if quick else None
    if subspace is None:
        return _by_deflation(X.double(), count, floor)
    basis, even = subspace  # Rayleigh-Ritz
    if not even:
        U, s, W = _by_deflation(image(X, basis), count, floor)
        return U, s, basis @ W
    basis = basis.float()
    Y = X.float() @ basis
    eigenvalues, W = torch.linalg.eigh(gram(Y.double()))
    s = eigenvalues[-count:].flip(0).clamp_min(0).sqrt()
    s = s[s > floor]
    W = W[:, -count:].flip(1)[:, : len(s)]
    return Y @ (W / s).float(), s, basis @ W.float()


def image(X: Tensor, V: Tensor) -> Tensor:
    """``X V`` in float64, without a float64 copy of all of X."""
    if X.dtype == V.dtype or X.is_cuda:
        return X.to(V.dtype) @ V
    Y = V.new_empty(len(X), V.shape[1])
    for start in range(0, len(X), ROWS):
        rows = slice(start, start + ROWS)
        torch.mm(X[rows].to(V.dtype), V, out=Y[rows])
    return Y


def preimage(X: Tensor, U: Tensor) -> Tensor:
    """``X^T U`` likewise."""
    if X.dtype == U.dtype or X.is_cuda:
        return X.to(U.dtype).mT @ U
    Y = U.new_zeros(X.shape[1], U.shape[1])
    for start in range(0, len(X), ROWS):
        rows = slice(start, start + ROWS)
        Y.addmm_(X[rows].to(U.dtype).mT, U[rows])
    return Y


def gram(X: Tensor) -> Tensor:
    """The lower triangle of ``X^T X``, which is all that `eigh` and `cholesky` read, and some of the upper."""
    n = X.shape[1]
    if n <= BLOCK or X.is_cuda:
        return X.mT @ X
    G = X.new_zeros(n, n)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        torch.mm(X[:, start:stop].mT, X[:, :stop], out=G[start:stop, :stop])
    return G


def scaled(parts: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """`parts`, contiguous, over a power of two for which squares of entries neither overflow nor vanish; and that."""
    peak = 0.0
    for part in parts:
        low, high = extrema(part)
        if not (isfinite(low) and isfinite(high)):
            raise torch.linalg.LinAlgError("entries that are not finite")  # type: ignore[attr-defined]
        peak = max(peak, high, -low)
    exponent = frexp(peak)[1] - 1
    unit = 1.0 if abs(exponent) < 20 else 2.0**exponent
    return [part.contiguous() if unit == 1 else part.contiguous() / unit for part in parts], unit


def averaged(count: int, factor: float) -> Callable[[Piece], None]:
    """What the rules for matrices do to all other tensors."""

    def combine(piece: Piece) -> None:
        torch.mul(piece.parts[0], 1.0, out=piece.into)
        for part in piece.parts[1:]:
            piece.into.add_(part)
        piece.into.mul_(factor / count)

    return combine


def _polar_in_float32(X: Tensor, floor: float) -> tuple[Factors, Tensor] | None:
    """`polar` for m >= n, in float32 but for the directions that a float32 Gram matrix hides; None: too many of them.

    To first order, what hides them turns them towards the others by the residual over the difference of eigenvalues.
    """
    n, single = X.shape[1], X.float()
    G = gram(single)
    if 8 * float(G.trace()) ** 2 < n * float(torch.linalg.matrix_norm(G)) ** 2:
        return None  # a few large ones: most of the others will be hidden
    eigenvalues, V = torch.linalg.eigh(G)
    least = FLOAT32_GRAM * float(eigenvalues[-1])
    weak = int((eigenvalues <= least).sum())
    if floor**2 >= least or WEAK * weak > n:
        return None
    strong, V_weak, V_strong = eigenvalues[weak:], V[:, :weak], V[:, weak:]
    s = strong.double().sqrt()
    if not weak:
        return Factors([(single, (V * strong.rsqrt()) @ V.mT)]), s
    B = V_weak.double()
    R = preimage(X, image(X, B))
    gap = strong[:, None] - (B * R).sum(0).float()
    blurred = (GAP * float(eigenvalues[-1])) ** 2
    turned = (V_strong.mT @ R.float()) * gap / (gap.square() + blurred)
    B = _orthonormal(B - (V_strong @ turned).double())
    U, hidden, W = _by_deflation(image(X, B), weak, floor)
    V_strong = V_strong + V_weak @ turned.mT
    Q = Factors([(single, (V_strong * strong.rsqrt()) @ V_strong.mT), (U.float(), (B @ W).float())])
    s = torch.cat([s, hidden, s.new_zeros(weak - len(hidden))])
    return Q, s


def _subspace(X: Tensor, count: int) -> tuple[Tensor, bool] | None:
    """Orthonormal directions, in float64, that hold the leading right singular vectors; None: float32 will not do.

    And whether singular values are even enough for their images to be taken in float32.
    """
    wide = count + PADDING
    if 2 * wide > X.shape[1]:
        return None
    eigenvalues, V = torch.linalg.eigh(gram(X.float()))
    largest = float(eigenvalues[-1])
    if not float(eigenvalues[-count] - eigenvalues[-wide - 1]) > SUBSPACE_GAP * largest:
        return None
    return _orthonormal(V[:, -wide:].double()), float(eigenvalues[-count]) > FLOAT32_IMAGE * largest


def _orthonormal(V: Tensor) -> Tensor:
    """`V`, which is nearly so, made so."""
    factor = torch.linalg.cholesky(V.mT @ V)
    return torch.linalg.solve_triangular(factor, V.mT, upper=False).mT


def _by_deflation(X: Tensor, count: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Leading triplets of a float64 X (m, n), m >= n: those that the Gram matrix shows, then those of what is left."""
    Us: list[Tensor] = []
    ss: list[Tensor] = []
    Vs: list[Tensor] = []
    while True:
        eigenvalues, V = torch.linalg.eigh(gram(X))
        eigenvalues, V = eigenvalues.flip(0), V.flip(1)
        least = float(eigenvalues[0]) * FLOAT64_GRAM[torch.float32]
        found = min(count, int((eigenvalues > max(least, floor**2)).sum()))
        if not found:
            break
        V = V[:, :found]
        s = eigenvalues[:found].sqrt()
        U = X @ V / s
        Us.append(U)
        ss.append(s)
        Vs.append(V)
        count -= found
        if not count or floor**2 >= least:
            break
        X = X - U @ (U.mT @ X)
        X = X - (X @ V) @ V.mT
    if not Us:
        return X[:, :0], X[0, :0], X.mT[:, :0]
    return torch.cat(Us, 1), torch.cat(ss), torch.cat(Vs, 1)
