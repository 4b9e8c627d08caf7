"""Shrink the singular values of the received matrices: task matrices are low rank, and the noise is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._state import Tensors, all_finite, select_names, unclipped
from .._threads import share_out
from ..channel import Reception
from ..channel._link import is_followed
from ..errors import InputError, NonFiniteError, NotPSDError
from ._noise import KnownNoise, Scale
from ._singular_values import EQUAL, denoised

__all__ = ["spectral_shrink"]

GUARD = 0.99  # share of the energy found alone that must be found jointly


def spectral_shrink(
    received: Iterable[Tensors],
    reception: Reception | ArrayLike,
    *,
    estimator: str = "additive",
    scale: Scale = "rms",
    joint: bool = False,
    skip: str | Iterable[str] = (),
) -> list[Any]:
    r"""The matrices in the noise, by optimal shrinkage of singular values under a known noise level.

    A received matrix (m, n), m <= n (else its transpose), with the singular triplets :math:`s_i, u_i, v_i`, noise of
    variance :math:`\sigma^2`, :math:`\beta = m/n` and :math:`y_i = s_i / (\sigma \sqrt n)` becomes

    .. math::
        \hat\tau = \sum_{y_i > 1 + \sqrt\beta} \eta(y_i)\, \sigma \sqrt n\, u_i v_i^T, \qquad
        \eta(y) = \frac{\sqrt{(y^2 - \beta - 1)^2 - 4 \beta}}{y},

    of the least Frobenius error that any function of the singular values has, for large matrices of low rank. A matrix
    of high rank in little noise may lose more by it than it gains: where Stein's unbiased estimate of the error says
    so, the matrix stays as it was received. Pure noise becomes exactly zero in about five of six cases, else a little
    of one direction: the edge is that of large matrices.

    Matrices are the 2-D tensors, and 4-D convolution kernels as (out, in kh kw). All others (vectors, scalars, 3-D) are
    handed through as they were received, and so is what `skip` names: neither divided by a gain nor shrunk.

    Where the noise of a matrix is not everywhere the same (block fading), its rows are divided by their noise's
    standard deviation, shrunk and multiplied by it again, each triplet with the coefficient that is then best for the
    Frobenius error. For large matrices of low rank in general position whose rows lie in one block each, no other
    coefficients for the triplets of the whitened matrix err less; other triplets might, and a row across two blocks
    counts with its mean variance. Rows without noise stay as they are, and tell nothing about the others.

    With `joint` the other users' noise tells about a user's own. With the covariance V of the noise of the Q users, in
    the block of an entry, the users being shrunk in turn, the one with the least noise first,

    .. math::
        \hat\tau_q = \mathrm{shrink}\Bigl(\hat x_q - \sum_{j \neq q} c_{qj} (\hat x_j - \hat\tau_j)\Bigr), \qquad
        c_{qj} = -\frac{(V^{-1})_{qj}}{(V^{-1})_{qq}}, \qquad \sigma_q^2 = \frac{1}{(V^{-1})_{qq}},

    starting from every user's matrix shrunk alone. This was preferred to shrinking the Q whitened matrices
    :math:`L^{-1} [x_1 \dots x_Q]`, :math:`V = L L^T`, which mixes low ranks to high ones, and to shrinking these
    stacked side by side or on top of each other, which gains where tasks share their column or row space and loses more
    where they do not. An estimate with less than .99 of the energy of the one alone is not used: the tasks are so alike
    there that signal was taken for noise. Users whose errors are uncorrelated get what they get alone. The correlation
    of real with imaginary parts is not used.

    Args:
        received: Q mappings of name -> tensor as `transmit` returns them. Not written to.
        reception: the `Reception` with which they were received, or the bare MSEs, (Q,) or (blocks, Q).
        estimator: "additive", "mmse" or "unbiased", as they were received. Matrices of "mmse" are divided by the gain.
        scale: what the coefficients were divided by: "rms" or "tensor_rms", then measured on the received vectors, or
            a number for all or for each user.
        joint: use the correlation of the users' noise, where that is positive definite. Takes two to three times as
            long, and memory for some 3Q float64 copies of a matrix on each thread.
        skip: names or glob patterns of tensors to leave alone, under any of their tied names.

    Returns:
        A list of Q in the form of the received: estimates of the sent matrices. Ties stay ties, other entries are
        copies. Calculated in float64, whatever the number of threads to the same bits; without gradients.

    Raises:
        InputError: what `transmit` refuses, a pattern that matches nothing, vectors that want gradients, or a gain of 0
            (a silent user) in a matrix of "mmse". NotPSDError: `joint`, and errors that are perfectly correlated.
            NonFiniteError: NaN or infinity in a vector, or a result that overflows half precision.
            StateMismatchError, ShapeError: as `transmit`.

    Source: Gavish and Donoho, "Optimal shrinkage of singular values", IEEE Trans. Inf. Theory 63(4), 2017 (the
        Frobenius loss); for unequal rows Leeb and Romanov, "Optimal spectral shrinkage and PCA with heteroscedastic
        noise", IEEE Trans. Inf. Theory 67(5), 2021; for the estimated error Candes, Sing-Long and Trzasko, "Unbiased
        risk estimates for singular value thresholding and spectral estimators", IEEE Trans. Signal Process. 61(19),
        2013.

    Example:
        >>> import torch
        >>> from rmtllmf.channel import transmit
        >>> sent = [{"w": torch.outer(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 60))}]
        >>> received = transmit(sent, [0.5], seed=0)
        >>> shrunk = spectral_shrink(received, [0.5])
        >>> [round(float((x["w"] - sent[0]["w"]).norm() / sent[0]["w"].norm()), 2) for x in (received[0], shrunk[0])]
        [0.70, 0.15]
    """
    if not isinstance(joint, bool | np.bool_):
        raise TypeError(f"joint: expected a bool, got {type(joint).__name__}")
    known = KnownNoise.of(received, reception, estimator=estimator, scale=scale)
    stream = known.stream
    _check(known)
    names = [*stream.keys, *stream.alias]
    skipped = {stream.alias.get(key, key) for key in select_names(names, skip, "skip")}
    matrices = [key for key in stream.keys if key not in skipped and _is_matrix(stream.vectors[0][key])]
    for key in matrices:
        if any(not bool(known.gain[part.block].all()) for part in known.parts[key]):
            raise InputError(
                f"reception: the gain of {key!r} is 0 for a silent user, of whom nothing was received; leave that "
                "user out"
            )
    matrices.sort(key=lambda key: (-stream.vectors[0][key].numel(), key))  # the longest first, so that no thread waits
    flat = stream.flat()
    result: list[dict[str, Tensor]] = [
        {key: parts[key].detach().clone() for key in stream.keys if key not in matrices} for parts in flat
    ]
    everyone = range(known.users)
    items = [(key, some) for key in matrices for some in ([everyone] if joint else [range(q, q + 1) for q in everyone])]

    def worker() -> Callable[[tuple[str, range]], None]:
        def work(item: tuple[str, range]) -> None:
            key, users = item
            shape = stream.vectors[0][key].shape
            values = {q: _unbiased(known, key, q, flat[q][key]).view(shape[0], -1) for q in users}
            found = {q: _shrunk(known, key, X, _variances(known, key, q)) for q, X in values.items()}
            if joint:
                _predict(known, key, values, found)
            for q in users:
                result[q][key] = _stored(found[q].best, flat[q][key].dtype, f"received[{q}][{key!r}]")

        return work

    share_out(worker, items, alone=any(tensor.device.type != "cpu" for tensor in stream.sent()))
    return [stream.formed(q, parts) for q, parts in enumerate(result)]


def _check(known: KnownNoise) -> None:
    for q, vector in enumerate(known.stream.vectors):
        for key in known.stream.keys:
            if is_followed(vector[key]):
                raise InputError(
                    f"received[{q}][{key!r}] wants gradients, which do not flow through singular values here; detach "
                    "it, or call under torch.no_grad()"
                )
            if not all_finite(vector[key]):
                raise NonFiniteError(f"received[{q}][{key!r}] holds NaN or infinity; expected finite numbers")


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim in (2, 4) and tensor.numel() > 0


def _unbiased(known: KnownNoise, key: str, q: int, flat: Tensor) -> Tensor:
    """What was received over its gain, flat, in float64."""
    values = flat.to(torch.float64, copy=True)
    for part in known.parts[key]:
        gain = float(known.gain[part.block, q])
        if gain != 1:
            values[part.start : part.stop] /= gain
    return values


def _stored(estimate: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    stored = unclipped(estimate.reshape(-1), dtype).to(dtype)
    if not all_finite(stored):
        raise NonFiniteError(f"{name}: the estimate overflows {dtype}")
    return stored


def _covariance(known: KnownNoise, key: str, block: int) -> Tensor:
    """(Q, Q) of the noise after division by the gains."""
    return known.covariance_of(key, block) / (known.gain[block][:, None] * known.gain[block])


def _variances(known: KnownNoise, key: str, q: int) -> list[float]:
    """Of the noise of a user in each part."""
    return [float(_covariance(known, key, part.block)[q, q]) for part in known.parts[key]]


def _row_variance(known: KnownNoise, key: str, X: Tensor, variances: Sequence[float]) -> Tensor:
    """The mean over each row of X, from a variance for each part."""
    if len(set(variances)) == 1:
        return X.new_full((len(X),), variances[0])
    every = X.new_empty(X.numel())
    for part, variance in zip(known.parts[key], variances, strict=True):
        every[part.start : part.stop] = variance
    return every.view_as(X).mean(1)


class _Found(NamedTuple):
    """An estimate of a matrix."""

    shrunk: Tensor
    best: Tensor  # that, or the received matrix where this is closer
    energy: float  # of the signal, less the squared error of the best


def _shrunk(known: KnownNoise, key: str, X: Tensor, variances: Sequence[float]) -> _Found:
    """From the variance of the noise in each part of X."""
    rows = _row_variance(known, key, X, variances)
    estimate, closer = denoised(X, rows)
    if closer:
        return _Found(estimate, estimate, float(estimate.square().sum()))
    return _Found(estimate, X, float(X.square().sum() - 2 * X.shape[1] * rows.sum()))


def _predict(known: KnownNoise, key: str, values: dict[int, Tensor], found: dict[int, _Found]) -> None:
    """Replace what was `found` of each user alone by what is found once its noise is predicted from the others'."""
    parts = known.parts[key]
    eps = max(torch.finfo(vector[key].dtype).eps for vector in known.stream.vectors)
    laws = {block: _law(known, key, block, eps) for block in sorted({part.block for part in parts})}
    noise = {q: (X - found[q].shrunk).view(-1) for q, X in values.items()}
    loudness = known.variance(key).tolist()
    for q in sorted(values, key=lambda q: loudness[q]):
        if not any(bool(coefficients[q].any()) for coefficients, _ in laws.values()):
            continue
        rest = values[q].clone()
        flat = rest.view(-1)
        for part in parts:
            cut = slice(part.start, part.stop)
            for j, coefficient in _nonzero(laws[part.block][0][q]):
                flat[cut].sub_(noise[j][cut], alpha=coefficient)
        variances = [float(laws[part.block][1][q]) for part in parts]
        estimate = _shrunk(known, key, rest, variances)
        if estimate.energy >= GUARD * found[q].energy:
            found[q], noise[q] = estimate, (values[q] - estimate.shrunk).view(-1)


def _nonzero(row: Tensor) -> Iterator[tuple[int, float]]:
    return ((j, coefficient) for j, coefficient in enumerate(row.tolist()) if coefficient)


def _law(known: KnownNoise, key: str, block: int, eps: float) -> tuple[Tensor, Tensor]:
    """Coefficients (Q, Q) that predict each user's noise from the others', and the variances (Q,) that remain."""
    V = _covariance(known, key, block)
    deviation = V.diagonal().clamp_min(0).sqrt()
    coefficients, remaining = torch.zeros_like(V), deviation.square()
    noisy = torch.nonzero(deviation).view(-1)
    if len(noisy) < 2:
        return coefficients, remaining
    deviation = deviation[noisy]
    correlation = V[noisy][:, noisy] / deviation[:, None] / deviation
    if float(torch.triu(correlation, 1).abs().max()) <= EQUAL:  # uncorrelated but for rounding
        return coefficients, remaining
    least = float(torch.linalg.eigvalsh(correlation)[0])
    resolution = len(noisy) * max(eps**2, 16 * torch.finfo(torch.float64).eps)
    if least <= resolution:
        raise NotPSDError(
            f"reception: the errors of the users are perfectly correlated in block {block} (least eigenvalue of their "
            f"correlation {least:.3g}, resolution {resolution:.3g}), so that a user's noise would be known exactly; "
            "expected a positive definite covariance: use joint=False, or leave one of the users out"
        )
    precision = torch.linalg.inv(correlation)
    own = precision.diagonal()
    scaled = -precision / own[:, None] * deviation[:, None] / deviation
    coefficients[noisy[:, None], noisy] = scaled.fill_diagonal_(0)
    remaining[noisy] = deviation.square() / own
    return coefficients, remaining
