"""What the base station's weighted sum of the received vectors is: one noise for the sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._coefficients import CHUNK
from .._random import Seed, seed_number
from .._state import Tensors, all_finite, finite_number, unclipped
from .._threads import share_out
from ..errors import InputError, NonFiniteError, ShapeError
from ._link import Link, checked_estimator, is_followed, link_of
from ._memory import Spec, checked_single_out, spec_of
from ._noise import Noise
from ._numpy_vectors import Vector
from ._scale import Gauge
from ._stream import Stream, check_blocks, fading_parts
from ._sum_noise import SumNoise
from .reception import Reception

__all__ = ["transmit_sum"]


def transmit_sum(
    vectors: Iterable[Vector],
    reception: Reception | ArrayLike,
    *,
    seed: Seed,
    weights: Sequence[float] | ArrayLike | None = None,
    estimator: str = "additive",
    scale: str | float = "rms",
    out: Tensors | None = None,
) -> Any:
    r"""The weighted sum of what `transmit` makes of the vectors, drawn at once, with the same distribution.

    .. math:: \sum_q w_q \hat\tau_q = \sum_q w_q g_q \tau_q + \sum_q w_q\,\text{scale}_q\, e_q,
        \qquad e \sim \mathcal{CN}(0, E)

    with the gains `g` and the error covariance `E` of `estimator` as in `transmit` (:math:`g = 1` but for "mmse"). A
    weighted sum of jointly Gaussian errors is Gaussian, so one draw does for all users: with the real numbers
    :math:`a_q = w_q\,\text{scale}_q` each coefficient has noise of variance :math:`a^T \Re(E)\, a`. Real and imaginary
    part of a symbol have covariance :math:`a^T \Im(E)\, a = 0`, since :math:`\Im(E)` is antisymmetric: they are
    independent. Only where a scale for each tensor changes in the middle of a symbol, from `a` to `b`, is the
    covariance of its imaginary and its real part :math:`b^T \Im(E)\, a` and not zero; that pair is drawn accordingly,
    so that the distribution of the whole sum is exact in all cases.

    Args:
        vectors: Q mappings of name -> tensor, or of name -> NumPy array, with the same keys and shapes; not written to.
            Tied tensors (two names, one memory in all vectors) are sent once.
        reception: a `Reception` or MSEs, also of several blocks, as for `transmit`.
        seed: an int or a ``torch.Generator``. The same seed gives the same bits whatever the order of the keys and
            the number of threads, per type of device; other ones than the sum of what `transmit` gives.
        weights: Q numbers :math:`w_q`; None: 1 for all. A vector of weight 0 counts for nothing, but is sent.
        estimator: "additive" (the paper), "mmse" or "unbiased", as for `transmit`.
        scale: what a coefficient is divided by, as for `transmit`.
        out: a mapping of name -> tensor with the names, shapes and dtypes of the result, that is written to and that
            the result is made of. Must not share memory with the vectors; after an error it may hold anything.

    Returns:
        One mapping, in the form of the first vector: a `TaskVector` if that is one, else a dict (of NumPy arrays if
        they were given); entries that are not sent (integers, booleans, running statistics) are copies of the first
        vector's. In the vectors' dtype, the wider one where they differ, at least float32. Added up in the order given,
        in float32, in float64 for entries that any vector has in float64. Memory beyond vectors and result is a few
        chunks a thread; for half precision also the sum in float32. No gradients.

    Raises:
        InputError: as `transmit`; gradients are asked for. TypeError, ShapeError: weights that are not Q numbers, or as
            `transmit`. StateMismatchError: keys, shapes or (of `out`) dtypes disagree. NonFiniteError: NaN or infinity
            in a vector, or the sum overflows. NotPSDError: an error covariance that is none.

    Note:
        As for `transmit`, float32 noise never exceeds 5.77 standard deviations.

    Source: R-MTLLMF, eq. 6 and section IV, for what is added up; the distribution is that of a linear map of a
    Gaussian vector.

    Example:
        >>> import torch
        >>> from rmtllmf.metrics import snr_db
        >>> sent = [{"w": torch.ones(1000)}, {"w": torch.linspace(-1, 1, 1000)}]
        >>> heard = transmit_sum(sent, [0.01, 0.03], seed=0, scale=1.0)
        >>> error = heard["w"] - sent[0]["w"] - sent[1]["w"]
        >>> round(float(error.var()), 2)  # 0.01 + 0.03
        0.04
    """
    stream = Stream.of(vectors, numpy_too=True)
    users = len(stream.vectors)
    factors = _numbers(weights, users)
    link = link_of(reception, users, checked_estimator(estimator))
    stream.check_out(out, False)
    if link.differentiable or any(map(is_followed, stream.sent())):
        raise InputError("vectors: the sum has no gradients; add up what transmit() returns, or use torch.no_grad()")
    check_blocks(link.blocks, (stream.length + 1) // 2, "reception")
    spec = _spec(stream)
    place = None if out is None else checked_single_out(out, spec, stream)
    number = seed_number(seed)
    gauge = Gauge(stream.vectors, stream.keys, scale, [f"vectors[{q}]" for q in range(users)], quick=True)
    signal = [
        [weight * (1.0 if gain is None else float(gain)) for weight, gain in zip(factors, gains, strict=True)]
        for gains in link.gain
    ]
    into = {}
    for key in stream.keys:
        shape, dtype, device = spec[key]
        given = None if place is None or not place[key].is_contiguous() else place[key].view(-1)
        into[key] = given if given is not None else torch.empty(math.prod(shape), dtype=dtype, device=device)
    total = {
        key: part if part.dtype == _calculated_in(stream, key) else part.new_empty(len(part), dtype=torch.float32)
        for key, part in into.items()
    }
    _add_up(stream, signal, gauge, total)
    noise = SumNoise(stream, link, factors, gauge.scales())
    _add_noise(stream, link, noise, number, total, into)
    return stream.formed(0, into, place)


def _add_up(stream: Stream, signal: Sequence[Sequence[float]], gauge: Gauge, total: Mapping[str, Tensor]) -> None:
    """The sum without noise into `total`; `gauge` looks at the pieces while they are in the cache."""
    flat = stream.flat()

    def worker() -> Callable[[tuple[str, int, int]], None]:
        look = gauge.looker()

        def work(item: tuple[str, int, int]) -> None:
            key, start, stop = item
            parts = [vector[key][start:stop].detach() for vector in flat]
            for q, part in enumerate(parts):
                look(q, key, part)
            for block, low, high in _in_blocks(stream, key, start, stop, len(signal)):
                into = total[key][low:high]
                terms = [
                    (part[low - start : high - start].to(into.dtype), a)
                    for part, a in zip(parts, signal[block], strict=True)
                    if a != 0
                ]
                _sum(terms, into)

        return work

    items = [(key, start, stop) for key in stream.keys for start, stop in gauge.pieces(key)]
    share_out(worker, items, alone=_alone(stream))


def _sum(terms: Sequence[tuple[Tensor, float]], into: Tensor) -> None:
    if not terms:
        into.zero_()
        return
    rest = terms[1:]
    if rest and terms[0][1] == 1:
        torch.add(terms[0][0], rest[0][0], alpha=rest[0][1], out=into)
        rest = rest[1:]
    else:
        torch.mul(*terms[0], out=into)
    for part, a in rest:
        into.add_(part, alpha=a)


def _in_blocks(stream: Stream, key: str, start: int, stop: int, blocks: int) -> Iterator[tuple[int, int, int]]:
    """(block, start, stop) of the parts of a tensor's piece that lie in one block."""
    first = stream.start_of(key)
    low, high = first + start, first + stop
    for block, begin, end in fading_parts(low // 2, (high + 1) // 2, (stream.length + 1) // 2, blocks):
        yield block, max(low, 2 * begin) - first, min(high, 2 * end) - first


def _add_noise(
    stream: Stream, link: Link, law: SumNoise, seed: int, total: Mapping[str, Tensor], into: Mapping[str, Tensor]
) -> None:
    """Noise on top of `total`, into `into`; raises where the sum overflows."""
    symbols = (stream.length + 1) // 2

    def worker() -> Callable[[int], None]:
        noise = Noise(seed, stream.dtype, stream.device)

        def work(start: int) -> None:
            stop = min(start + CHUNK, stream.length)
            white = noise.white("sum", start, stop) if law.any else None
            for block, first, end in fading_parts(start // 2, (stop + 1) // 2, symbols, link.blocks):
                low, high = 2 * first, min(2 * end, stop)
                error = None if white is None else law.coloured(block, white[low - start :], low, high)
                for key, where, cut in stream.pieces(low, high):
                    part, place = total[key][where], into[key][where]
                    if error is not None:
                        torch.add(part, error[cut], out=part)
                    if place.dtype != part.dtype:
                        place.copy_(unclipped(part, place.dtype))
                    if not all_finite(place):
                        raise NonFiniteError(f"the sum of {key!r} overflows {place.dtype}")

        return work

    share_out(worker, range(0, stream.length, CHUNK), alone=_alone(stream))


def _alone(stream: Stream) -> bool:
    return stream.length <= CHUNK or stream.device.type != "cpu"


def _numbers(weights: Any, users: int) -> list[float]:
    if weights is None:
        return [1.0] * users
    if isinstance(weights, Tensor) and weights.requires_grad:
        raise InputError("weights: gradients do not flow through the weights; pass weights.detach()")
    single = isinstance(weights, Tensor | np.ndarray) and weights.ndim == 0
    if single or isinstance(weights, str | bytes | Mapping) or not isinstance(weights, Iterable):
        raise TypeError(f"weights: expected {users} numbers, got {type(weights).__name__}")
    numbers = [finite_number(number, f"weights[{index}]") for index, number in enumerate(weights)]
    if len(numbers) != users:
        raise ShapeError(f"weights: expected {users} numbers, one for each vector, got {len(numbers)}")
    return numbers


def _calculated_in(stream: Stream, key: str) -> torch.dtype:
    return torch.float64 if any(vector[key].dtype == torch.float64 for vector in stream.vectors) else torch.float32


def _spec(stream: Stream) -> Spec:
    """What the sum is, for every entry of the first vector."""
    spec = dict(spec_of(stream.vectors[0]))
    for key in [*stream.keys, *stream.alias]:
        shape, dtype, device = spec[key]
        if any(vector[key].dtype != dtype for vector in stream.vectors):
            spec[key] = (shape, _calculated_in(stream, key), device)
    return spec
