"""Bend task vectors as a reception does: the Gaussian model of the link, coefficient by coefficient."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._random import Seed, reseed, seed_number
from .._state import Tensors, check_same_states, identity, is_bendable
from ..errors import InputError, StateMismatchError
from ._link import ESTIMATORS, Link, link_of
from ._scale import scales
from .receivers import Reception

__all__ = ["transmit"]

_CHUNK = 1 << 16  # coefficients per chunk of noise: even, so that a symbol never spans two, and small enough for cache


def transmit(
    vectors: Sequence[Tensors],
    reception: Reception | ArrayLike,
    *,
    seed: Seed,
    estimator: str = "additive",
    scale: str | float = "rms",
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
        vectors: Q mappings of name -> tensor with the same keys and shapes. Integer, boolean and running-statistics
            entries are carried as they are, tied tensors are sent once. Not written to.
        reception: a `Reception` of Q users, whose error correlations are honoured; or the bare MSEs, (Q,) or a
            number for all, of a matched receiver with independent errors (:math:`g = 1 - \mu`,
            :math:`N = \mathrm{diag}(\mu(1-\mu))`). With a leading dimension of blocks, (blocks, Q): block fading over
            consecutive equal parts of the symbols.
        seed: an int or a ``torch.Generator``. The same seed gives the same bits whatever the order of the keys and
            the number of threads, per type of device.
        estimator: "additive" (the paper), "mmse" or "unbiased".
        scale: what a coefficient is divided by: "rms" or "peak" (largest magnitude, as a min-max quantiser does) of
            the user's whole vector, "tensor_rms" or "tensor_peak" of each of its tensors, or a number for all.

    Returns:
        A list of Q: a `TaskVector` where one was given, else a dict; same dtypes and devices. Sums and noise are in
        float32, in float64 for float64 entries.

    Raises:
        InputError: no vectors, an all-zero vector (tensor) to normalise, unknown `estimator` or `scale`, an MSE
            outside what the estimator allows ("additive": at least 0; "mmse": 0 to 1; "unbiased": 0 to below 1),
            more blocks than symbols. ShapeError: the reception is not for Q users. StateMismatchError: keys or
            shapes disagree. NonFiniteError: NaN or infinity. NotPSDError: an error covariance that is none.

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
    keys = check_same_states(vectors, "vectors")
    if estimator not in ESTIMATORS:
        raise InputError(f"estimator: expected one of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}")
    bent_keys, alias = _what_is_sent(vectors, keys)
    link = link_of(reception, len(vectors), estimator)
    scale_of = [scales(vector, bent_keys, scale, f"vectors[{q}]") for q, vector in enumerate(vectors)]
    received = _bend(vectors, bent_keys, link, scale_of, seed_number(seed))
    for bent in received:
        bent.update({key: bent[original] for key, original in alias.items()})
    return [_like(vector, bent) for vector, bent in zip(vectors, received, strict=True)]


def _what_is_sent(vectors: Sequence[Tensors], keys: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The keys that go over the air, and the others that are tied to one of them in every vector: sent once."""
    sent: dict[Hashable, str] = {}
    alias: dict[str, str] = {}
    for key in keys:
        bendable = is_bendable(key, vectors[0][key])
        for q, vector in enumerate(vectors):
            if is_bendable(key, vector[key]) != bendable:
                raise StateMismatchError(
                    f"vectors[{q}][{key!r}] is {vector[key].dtype}; vectors[0] has {vectors[0][key].dtype}"
                )
        if bendable:
            memory = tuple(identity(vector[key]) for vector in vectors)
            if memory in sent:
                alias[key] = sent[memory]
            else:
                sent[memory] = key
    return list(sent.values()), alias


def _like(vector: Tensors, bent: Mapping[str, Tensor]) -> Any:
    """`bent` in the shape of `vector`: through its own `map` if it has one (a TaskVector), else a dict."""
    if hasattr(vector, "map"):
        return vector.map(lambda key, tensor: bent.get(key, tensor))
    return {key: bent.get(key, tensor) for key, tensor in vector.items()}


def _bend(
    vectors: Sequence[Tensors], keys: Sequence[str], link: Link, scale_of: Sequence[Mapping[str, float]], seed: int
) -> list[dict[str, Tensor]]:
    if not keys:
        return [{} for _ in vectors]
    first = vectors[0]
    device = first[keys[0]].device
    sizes = [first[key].numel() for key in keys]
    total = sum(sizes)
    symbols = (total + 1) // 2
    if link.blocks > max(1, symbols):
        raise InputError(f"reception: {link.blocks} blocks are more than the {symbols} symbols of a vector")
    double = any(vector[key].dtype == torch.float64 for vector in vectors for key in keys)
    dtype = torch.float64 if double else torch.float32
    flat = [{key: vector[key].reshape(-1) for key in keys} for vector in vectors]
    out = [{key: torch.empty_like(part) for key, part in parts.items()} for parts in flat]
    source = torch.Generator(device=device)
    buffers = [torch.empty(_CHUNK, dtype=dtype, device=device) for _ in vectors]
    position = 0  # of the tensor in the stream of coefficients
    tensors = iter(zip(keys, sizes, strict=True))
    key, size = next(tensors)
    for start in range(0, total, _CHUNK):
        length = min(_CHUNK, total - start + total % 2)
        if link.differentiable:  # autograd needs the noise again
            buffers = [torch.empty_like(buffer) for buffer in buffers]
        streams = [buffer[:length] for buffer in buffers]
        for q, stream in enumerate(streams):
            reseed(source, seed, q, start // _CHUNK)
            stream.normal_(generator=source)
        for block, low, high in _parts(start, min(start + length, total), symbols, link.blocks):
            noise = [_mixed(link, block, q, streams, low - start, high - start) for q in range(len(vectors))]
            at = low
            while at < high:
                while at >= position + size:
                    position += size
                    key, size = next(tensors)
                end = min(high, position + size)
                where, cut = slice(at - position, end - position), slice(at - low, end - low)
                for q in range(len(vectors)):
                    sent = flat[q][key][where].to(dtype)
                    gain = link.gain[block][q]
                    kept = sent if gain is None else sent * gain.to(dtype)
                    error = noise[q]
                    if error is not None:
                        kept = kept + error[cut] * scale_of[q][key]
                    out[q][key][where] = kept
                at = end
    return [{key: out[q][key].view(first[key].shape) for key in keys} for q in range(len(vectors))]


def _parts(start: int, stop: int, symbols: int, blocks: int) -> Iterator[tuple[int, int, int]]:
    """(block, start, stop) of the pieces of coefficients [start, stop) that lie in one fading block each."""
    at = start
    while at < stop:
        block = (at // 2) * blocks // symbols
        end = min(stop, 2 * -(-(block + 1) * symbols // blocks))
        yield block, at, end
        at = end


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
