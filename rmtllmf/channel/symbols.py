"""The link down to its symbols: quantised and modulated, or analog, over the real channel, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike
from .._random import Seed, reseed, seed_number
from .._state import whole_number
from ..errors import InputError
from ._front_end import CANCELLATIONS, front_ends
from ._modem import DECISIONS, AnalogModem, DigitalModem, Modem, quantisers
from ._numpy_vectors import Vector
from ._scale import scales
from ._stream import Stream, check_blocks, fading_parts
from .code import LdpcCode
from .constellation import ORDERS, Constellation, checked_order
from .quantiser import QUANTISERS

__all__ = ["transmit_symbols"]


@torch.no_grad()  # decisions have no derivative, and a graph of every chunk would not fit
def transmit_symbols(
    vectors: Iterable[Vector],
    H: Array,
    P: ArrayLike,
    C: Array,
    *,
    seed: Seed,
    modulation: int | str = 64,
    receiver: str = "sic",
    designed_for: Array | None = None,
    order: str | Array = "weakest_first",
    cancellation: str = "genie",
    bits: int | None = None,
    quantiser: str | None = None,
    decisions: str | None = None,
    per_tensor: bool = False,
    code: LdpcCode | None = None,
    scale: str | float | None = None,
    progress: bool = False,
) -> list[Any]:
    r"""What the base station holds after every user has sent its task vector, symbol by symbol.

    .. math:: y = H P^{1/2} s + z, \qquad z \sim \mathcal{CN}(0, C)

    Digital (`modulation` 4, 16, 64, 256): every coefficient is quantised to `bits` bits, the bits of a user's stream
    fill Gray-labelled QAM symbols in order, most significant first. Analog (``modulation="analog"``): coefficients
    :math:`2k` and :math:`2k+1` are the real and imaginary part of symbol k,
    :math:`s = (x + jy)/(\sqrt 2\,\text{scale})`. The stream is that of `transmit`: the floating tensors in
    sorted-key order; all users send symbol k in the same channel use. With a `code` the bits are those of its words.
    The extremes (or the rms, or the scale) that a receiver needs to undo the scaling are taken to arrive without error.

    Args:
        vectors: Q mappings of name -> tensor (or NumPy array) with the same keys and shapes; not written to. Integer,
            boolean and running-statistics entries are carried as they are, tied tensors are sent once.
        H: (N_R, Q) complex, or (blocks, N_R, Q): block fading over consecutive equal parts of the symbols.
        P: transmit powers in W: a number, (..., Q), or (..., Q, Q) exactly diagonal; none of them zero.
        C: (..., N_R, N_R) covariance of the whole noise in W.
        seed: an int or a ``torch.Generator``; the same seed gives the same bits of noise, per type of device.
        modulation: 4, 16, 64, 256 or "analog".
        receiver: "sic" or "lmmse".
        designed_for: (..., N_R, N_R) the covariance that the receiver believes in; None: it knows `C`.
        order: of successive cancellation, as for `sic`; belongs to "sic", as the next one.
        cancellation: "genie": the true symbols are subtracted; "real": what was decided (analog: what was estimated),
            so that errors are passed on to the users decoded later.
        bits: per coefficient, 1 to 12; None: 8. Digital only, as the next three.
        quantiser: "uniform" between the extremes (None: this), "companded" or "lloyd_max".
        decisions: "hard": the nearest point (None: this). "soft": the posterior mean of every coefficient, from the
            bits' probabilities, with the error power that the receiver believes in; "real" cancellation then subtracts
            the posterior mean of the symbol.
        per_tensor: quantise every tensor between its own extremes instead of the whole vector's.
        code: an error-correcting code around the link, as `LdpcCode`. It is decoded from the bits' probabilities, and
            "real" cancellation then subtracts what was decoded, encoded again; that takes a single fading block.
        scale: analog only: as for `transmit`; None: "rms".
        progress: show a bar.

    Returns:
        A list of Q: a `TaskVector` where one was given, else a dict, of NumPy arrays if they were; same dtypes and
        devices; without gradients.

    Raises:
        InputError: an option that is unknown or belongs to the other kind of modulation, a silent user, no vectors,
            more blocks than symbols. TypeError, ShapeError, NotPSDError, NonFiniteError: as `sic`.
        StateMismatchError: keys or shapes of the vectors disagree.

    Note:
        Estimates are divided by their gain before decisions, so the analog link is `transmit`'s "unbiased" estimator.
        With genie cancellation or a linear receiver its error covariance is exactly that of the reception. Three
        things set the digital link apart from that Gaussian model: errors pass on under "real" cancellation, decisions
        saturate (an error is never larger than the range), and a wrong most significant bit costs half the range.

    Source: R-MTLLMF, eq. 2 and section IV (64-QAM).

    Example:
        >>> import torch
        >>> from rmtllmf.channel import UplinkScenario
        >>> from rmtllmf.metrics import snr_db
        >>> up = UplinkScenario(num_users=2, max_distance=200.0).draw(seed=0)
        >>> sent = [{"w": torch.linspace(-1, 1, 4000)}, {"w": torch.linspace(-1, 1, 4000).square()}]
        >>> received = transmit_symbols(sent, up.H, up.P, up.noise_covariance, seed=0, modulation=16)
        >>> snr_db(sent[0], received[0]) > 40  # no symbol is lost: the quantiser's steps are all there is
        True
    """
    stream = Stream.of(vectors, numpy_too=True)
    flat = stream.flat()
    modem = _modem(stream, flat, modulation, bits, quantiser, decisions, per_tensor, code, scale)
    if cancellation not in CANCELLATIONS:
        raise InputError(f"cancellation: expected one of {', '.join(map(repr, CANCELLATIONS))}, got {cancellation!r}")
    if receiver == "lmmse":
        kept = isinstance(order, str) and order == "weakest_first"
        clash = [name for name, default in (("order", kept), ("cancellation", cancellation == "genie")) if not default]
        if clash:
            raise InputError(f"{', '.join(clash)}: the linear receiver cancels nothing; leave out, or choose 'sic'")
    ends = front_ends(H, P, C, designed_for, order, receiver, len(stream.vectors))
    if code is not None and cancellation == "real" and receiver == "sic" and len(ends) > 1:
        raise InputError("cancellation: 'real' with a code needs a single fading block, or words would span several")
    total = modem.symbols(stream.length)
    check_blocks(len(ends), total, "H")
    number, source = seed_number(seed), torch.Generator(device=stream.device)
    ends = [end.to(stream.device) for end in ends]
    out = [{key: torch.empty_like(part) for key, part in parts.items()} for parts in flat]
    with _bar(stream.length, progress) as advance:
        for index, start in enumerate(range(0, stream.length, modem.chunk)):
            stop = min(start + modem.chunk, stream.length)
            sent = modem.modulate(start, stop)
            reseed(source, number, "symbols", index)
            shape = (ends[0].spread.shape[-1], sent.shape[1])
            white = torch.randn(shape, dtype=sent.dtype, device=sent.device, generator=source)
            estimates, noise = torch.empty_like(sent), torch.empty_like(sent.real)
            first = modem.symbols(start)
            for block, low, high in fading_parts(first, first + sent.shape[1], total, len(ends)):
                part, end = slice(low - first, high - first), ends[block]
                decide = None if cancellation == "genie" else modem.decider(end)
                estimates[:, part] = end.receive(sent[:, part], white[:, part], decide)
                noise[:, part] = end.noise.to(noise.dtype)[:, None]
            modem.demodulate(start, stop, estimates, noise, out)
            advance(stop - start)
    return stream.rebuilt(out, every_dtype=True)


def _modem(
    stream: Stream,
    flat: Sequence[Mapping[str, Tensor]],
    modulation: int | str,
    bits: int | None,
    quantiser: str | None,
    decisions: str | None,
    per_tensor: bool,
    code: LdpcCode | None,
    scale: str | float | None,
) -> Modem:
    """The modem, after a check that no option belongs to the other kind."""
    named = [(vector, f"vectors[{q}]") for q, vector in enumerate(stream.vectors)]
    if isinstance(modulation, str):
        if modulation != "analog":
            raise InputError(f"modulation: expected {ORDERS} or 'analog', got {modulation!r}")
        digital = {
            "bits": bits,
            "quantiser": quantiser,
            "decisions": decisions,
            "per_tensor": per_tensor or None,
            "code": code,
        }
        clash = [name for name, value in digital.items() if value is not None]
        if clash:
            raise InputError(f"{', '.join(clash)}: the analog link quantises nothing; leave out, or choose a QAM order")
        chosen = "rms" if scale is None else scale
        return AnalogModem(stream, flat, [scales(vector, stream.keys, chosen, name) for vector, name in named])
    constellation = Constellation(checked_order(modulation, "modulation", "or 'analog'"))
    if scale is not None:
        raise InputError("scale: belongs to the analog link; the digital one scales by its quantiser")
    width, kind = 8 if bits is None else bits, "uniform" if quantiser is None else quantiser
    how = "hard" if decisions is None else decisions
    if whole_number(width, "bits", at_least=1) > 12:
        raise InputError(f"bits: expected at most 12 bits a coefficient, got {width}")
    if kind not in QUANTISERS:
        raise InputError(f"quantiser: expected one of {', '.join(map(repr, QUANTISERS))}, got {kind!r}")
    if how not in DECISIONS:
        raise InputError(f"decisions: expected one of {', '.join(map(repr, DECISIONS))}, got {how!r}")
    if code is not None and not isinstance(code, LdpcCode):
        raise TypeError(f"code: expected an LdpcCode or None, got {type(code).__name__}")
    if code is not None and how == "soft":
        raise InputError("decisions: a decoded word is decided; leave 'soft' out, or the code")
    fitted = [quantisers(vector, stream.keys, kind, width, per_tensor, name) for vector, name in named]
    return DigitalModem(stream, flat, fitted, constellation, width, how == "soft", code)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    if not progress:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="transmit", unit="coefficient", unit_scale=True) as bar:
        yield bar.update
