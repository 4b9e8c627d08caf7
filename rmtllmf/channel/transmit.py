"""Bend task vectors as a reception does: the Gaussian model of the link, coefficient by coefficient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._coefficients import CHUNK
from .._random import Seed, reseed, seed_number
from .._state import Tensors, unclipped
from .._threads import share_out
from ..errors import InputError
from ._link import Link, checked_estimator, is_followed, link_of
from ._memory import checked_out
from ._noise import Noise
from ._numpy_vectors import Vector
from ._scale import scales_of
from ._stream import Stream, check_blocks, fading_parts
from .reception import Reception

__all__ = ["transmit"]

Flat: TypeAlias = Sequence[Mapping[str, Tensor]]
Scales: TypeAlias = Sequence[Mapping[str, float]]


def transmit(
    vectors: Iterable[Vector],
    reception: Reception | ArrayLike,
    *,
    seed: Seed,
    estimator: str = "additive",
    scale: str | float = "rms",
    out: Sequence[Tensors] | None = None,
) -> list[Any]:
    r"""What the base station holds after every user has sent its task vector.

    Coefficients :math:`2k` and :math:`2k+1` of a vector (sorted keys, floating entries only) are the real and the
    imaginary part of symbol :math:`k`, :math:`s = (x + jy)/(\sqrt 2\,\text{scale})`, and all users send their symbol
    :math:`k` in the same channel use. With the error covariance `E`, the noise covariance `N` and the gains `g` of
    the reception,

    .. math::
        \text{additive:}\quad & \hat s = s + \mathcal{CN}(0, E) \\
        \text{mmse:}\quad     & \hat s = \mathrm{diag}(g)\, s + \mathcal{CN}(0, N) \\
        \text{unbiased:}\quad & \hat s = s + \mathcal{CN}\bigl(0, \mathrm{diag}(g)^{-1} N\, \mathrm{diag}(g)^{-1}\bigr)

    so that under "additive" each coefficient of user q has error variance :math:`\mu_q\,\text{scale}_q^2`, equal parts
    of users q, r have covariance :math:`\Re(E_{qr})\,\text{scale}_q\,\text{scale}_r`, and the imaginary part of q with
    the real part of r :math:`\Im(E_{qr})\,\text{scale}_q\,\text{scale}_r`.

    Args:
        vectors: Q mappings of name -> tensor, or of name -> NumPy array, with the same keys and shapes. Integer,
            boolean and running-statistics entries are carried as they are (copies); tied tensors (two names, one
            memory) are sent once.
        reception: a `Reception` of Q users, whose error correlations are honoured; or the bare MSEs, (Q,) or a
            number for all, of a matched receiver with independent errors (:math:`g = 1 - \mu`,
            :math:`N = \mathrm{diag}(\mu(1-\mu))`). With a leading dimension of blocks, (blocks, Q): block fading over
            consecutive equal parts of the symbols.
        seed: an int or a ``torch.Generator``. The same seed gives the same bits whatever the order of the keys and
            the number of threads, per type of device.
        estimator: "additive" (the paper), "mmse" or "unbiased".
        scale: what a coefficient is divided by: "rms" or "peak" (largest magnitude, as a min-max quantiser does) of
            the user's whole vector, "tensor_rms" or "tensor_peak" of each of its tensors, or a number for all.
        out: Q mappings of name -> tensor with the names, shapes and dtypes of the vectors, that are written to and that
            the result is made of: no fresh memory is needed. Must not share memory with the vectors; after an error it
            may hold anything.

    Returns:
        A list of Q: a `TaskVector` where one was given, else a dict, of NumPy arrays if they were (the same numbers as
        for tensors); same dtypes and devices. Sums and noise are in float32, in float64 for float64 entries. Gradients
        reach the vectors and the reception, without `out`.

    Raises:
        InputError: no vectors, an all-zero vector (tensor) to normalise, unknown `estimator` or `scale`, an MSE
            outside what the estimator allows ("additive": at least 0; "mmse": 0 to 1; "unbiased": 0 to below 1),
            more blocks than symbols, an `out` that shares memory or is asked for gradients. ShapeError: the reception
            is not for Q users. StateMismatchError: keys, shapes or (of `out`) dtypes disagree. NonFiniteError: NaN or
            infinity. NotPSDError: an error covariance that is none.

    Note:
        torch's float32 normal generator never exceeds 5.77 standard deviations. Use float64 vectors for tails.

    Source: R-MTLLMF, section IV ("we compute the MSE and add Gaussian noise with variance proportional to it").

    Example:
        >>> import torch
        >>> from rmtllmf.metrics import snr_db
        >>> sent = [{"w": torch.ones(1000)}, {"w": torch.linspace(-1, 1, 1000)}]
        >>> received = transmit(sent, [0.01, 0.1], seed=0)
        >>> round(snr_db(sent[0], received[0])), round(snr_db(sent[1], received[1]))
        (20, 10)
    """
    stream = Stream.of(vectors, numpy_too=True)
    link = link_of(reception, len(stream.vectors), checked_estimator(estimator))
    names = [f"vectors[{q}]" for q in range(len(stream.vectors))]
    traced = link.differentiable or any(map(is_followed, stream.sent()))
    stream.check_out(out, traced)
    if out is not None and traced:
        raise InputError("out: memory that is written again has no gradient; leave it out, or use torch.no_grad()")
    places = None if out is None else checked_out(out, stream)
    flat = stream.flat()
    scale_of = scales_of(stream.vectors, flat, stream.keys, scale, names)
    check_blocks(link.blocks, (stream.length + 1) // 2, "reception")
    number = seed_number(seed)
    if traced:
        return stream.rebuilt(_traced(stream, flat, link, scale_of, number))
    into = [
        {key: stream.place(part, None if places is None else places[q][key]) for key, part in parts.items()}
        for q, parts in enumerate(flat)
    ]
    _bend(stream, flat, link, scale_of, number, into)
    return stream.rebuilt(into, out=places)


def _bend(stream: Stream, flat: Flat, link: Link, scale_of: Scales, seed: int, into: Flat) -> None:
    """Write what is received into `into`: chunks of single users where errors are independent, else of all users."""
    users, symbols, dtype = len(flat), (stream.length + 1) // 2, stream.dtype
    everyone = [range(q, q + 1) for q in range(users)] if link.independent else [range(users)]
    items = [(some, start) for some in everyone for start in range(0, stream.length, CHUNK)]

    def worker() -> Callable[[tuple[range, int]], None]:
        noise = Noise(seed, dtype, stream.device)

        def work(item: tuple[range, int]) -> None:
            some, start = item
            stop = min(start + CHUNK, stream.length)
            white = {q: noise.white(q, start, stop) for q in some}
            for block, first, end in fading_parts(start // 2, (stop + 1) // 2, symbols, link.blocks):
                low, high = 2 * first, min(2 * end, stop)
                for q in some:
                    weights = [link.factor[block][q][j] for j in some]
                    error = noise.mixed(weights, list(white.values()), low - start, high - start)
                    for key, where, cut in stream.pieces(low, high):
                        scaled = None if error is None else error[cut].mul_(scale_of[q][key])
                        _received(flat[q][key][where], link.gain[block][q], scaled, into[q][key][where], dtype)

        return work

    small = users * stream.length <= CHUNK  # not worth a thread
    share_out(worker, items, alone=small or stream.device.type != "cpu")


def _received(sent: Tensor, gain: Tensor | None, error: Tensor | None, into: Tensor, dtype: torch.dtype) -> None:
    """Into `into`: gain * sent + error, in `dtype`. What it finds in `error` is lost."""
    sent = sent.detach().to(dtype)
    if gain is not None:
        sent = sent * gain.to(dtype)
    if error is None:
        into.copy_(unclipped(sent, into.dtype))
    elif into.dtype == dtype:
        torch.add(sent, error, out=into)
    else:
        into.copy_(unclipped(error.add_(sent), into.dtype))


def _traced(stream: Stream, flat: Flat, link: Link, scale_of: Scales, seed: int) -> list[dict[str, Tensor]]:
    """The same bits in fresh memory, by operations that autograd follows."""
    users, symbols, dtype = len(flat), (stream.length + 1) // 2, stream.dtype
    into = [{key: torch.empty_like(part) for key, part in parts.items()} for parts in flat]
    source = torch.Generator(device=stream.device)
    for start in range(0, stream.length, CHUNK):
        stop = min(start + CHUNK, stream.length)
        white = []  # kept for the backward pass
        for q in range(users):
            reseed(source, seed, q, start // CHUNK)
            length = stop - start + (stop - start) % 2
            white.append(torch.empty(length, dtype=dtype, device=stream.device).normal_(generator=source))
        for block, first, end in fading_parts(start // 2, (stop + 1) // 2, symbols, link.blocks):
            low, high = 2 * first, min(2 * end, stop)
            noise = [_mixed(link, block, q, white, low - start, high - start) for q in range(users)]
            for key, where, cut in stream.pieces(low, high):
                for q in range(users):
                    kept = flat[q][key][where].to(dtype)
                    gain, error = link.gain[block][q], noise[q]
                    if gain is not None:
                        kept = kept * gain.to(dtype)
                    if error is not None:
                        kept = kept + error[cut] * scale_of[q][key]
                    into[q][key][where] = unclipped(kept, into[q][key].dtype)
    return into


def _mixed(link: Link, block: int, q: int, streams: Sequence[Tensor], low: int, high: int) -> Tensor | None:
    """User q's real noise (unit scale), from the users' independent streams: rows of the factor of its covariance.

    With complex weights (a + jb) the real part takes ``a*re - b*im``, the imaginary part ``a*im + b*re`` of a stream.
    """
    result = None
    for stream, weight in zip(streams, link.factor[block][q], strict=True):
        if weight is None:
            continue
        re, im = weight
        part = stream[low : high + (high - low) % 2]
        term = part * re.to(part.dtype)
        if im is not None:
            swapped = part.view(-1, 2).flip(-1)
            swapped = swapped * torch.stack([-im, im]).to(part)
            term = term + swapped.view(-1)
        result = term if result is None else result + term
    return result
