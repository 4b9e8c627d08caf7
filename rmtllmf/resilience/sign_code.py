"""Send the signs of a task vector's entries, and one scale for each tensor or row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._arrays import ArrayLike
from .._coefficients import SCALES
from .._state import Tensors
from ..channel import Reception
from ..errors import InputError, NonFiniteError, ShapeError
from ._form import Form
from ._noise import KnownNoise, Scale
from .coding import SCALE_BITS, Encoding, checked_received

__all__ = ["sign_code", "soft_signs"]

Per = Literal["tensor", "row"]


@dataclass(frozen=True, eq=False)
class _Signs:
    """Decides for the nearer of the two values of each entry; `scales` broadcast to the tensors."""

    form: Form
    scales: Mapping[str, Tensor]

    def __call__(self, received: Tensors) -> Any:
        return self.form.filled(
            {key: _signed(self.scales[key].to(tensor.device), tensor) for key, tensor in received.items()}
        )


def sign_code(vector: Tensors, *, per: Per = "tensor") -> Encoding:
    r"""The sign of every entry times the mean magnitude of its tensor or row: two values, as BPSK, QPSK in pairs.

    .. math:: x_j = s \operatorname{sgn} \tau_j, \quad s = \frac{1}{n} \sum_j |\tau_j|
              = \arg\min_s \|\tau - s \operatorname{sgn} \tau\|^2; \qquad
              E\|\hat\tau - \tau\|^2 = \|\tau\|^2 - n s^2 (1 - 4 p)

    after hard decisions (`Encoding.decode`) that are wrong with probability :math:`p = Q(s/\sigma)`, and
    :math:`\|\tau\|^2 - n s^2 E[\tanh((1 + z \sigma/s) s^2/\sigma^2)]`, z normal, with `soft_signs`. Hard decisions are
    worse than the base model from p = 1/4 on; soft ones never are.

    It saves no channel uses: every entry is still sent, and the scales come on top. What is lost by rounding (36 % of
    the energy of normal entries) no channel brings back; for entries in units of their rms, sending them as they are is
    better. It pays where the *peak* is what senders are limited by (``scale="peak"`` of `transmit`), because all
    symbols have the same, where entries sent as they are lose :math:`\max_j \tau_j^2 / \text{rms}^2`, 10 dB for a
    thousand normal ones.

    Args:
        vector: a mapping of name -> tensor. A 0 counts as positive.
        per: "tensor", or "row": a scale for each index of the first dimension of tensors that have two or more.

    Returns:
        An `Encoding`: tensors like the vector's, and 32 bits (a float32) for each scale.

    Raises:
        InputError: an unknown `per`, or no floating entries. NonFiniteError: NaN or infinity, or a scale that is too
            large for float32. TypeError: no mapping.

    Source: J. Bernstein et al., "signSGD", 2018; M. Rastegari et al., "XNOR-Net", 2016, for the scale.

    Example:
        >>> import torch
        >>> code = sign_code({"w": torch.tensor([1.0, -2.0, 3.0])})
        >>> code.sent, code.bits
        ({'w': tensor([ 2., -2.,  2.])}, 32)
        >>> code.decode({"w": torch.tensor([0.3, -9.0, -0.1])})
        {'w': tensor([ 2., -2., -2.])}
    """
    if per not in get_args(Per):
        raise InputError(f"per: expected 'tensor' or 'row', got {per!r}")
    form, parts = Form.of(vector)
    sent, scales = {}, {}
    for key, tensor in parts.items():
        across = tuple(range(1 if per == "row" and tensor.ndim > 1 else 0, tensor.ndim))
        if tensor.numel():
            scale = tensor.abs().to(torch.float64).mean(across, keepdim=True) if across else tensor.abs()
        else:
            scale = tensor.new_zeros((1,) * tensor.ndim)
        scales[key] = scale.to(torch.float32)
        if not torch.isfinite(scales[key]).all():
            raise NonFiniteError(f"vector[{key!r}]: its scale overflows float32, in which it is told")
        sent[key] = _signed(scales[key].to(form.dtype), tensor)
    told = sum(scale.numel() for key, scale in scales.items() if sent[key].numel())
    return Encoding(sent, SCALE_BITS * told, _Signs(form, scales))


def soft_signs(
    codes: Sequence[Encoding],
    received: Sequence[Tensors],
    reception: Reception | ArrayLike,
    *,
    estimator: str = "additive",
    scale: Scale = "rms",
) -> list[Any]:
    r"""The posterior mean of what sign codes stand for, each entry being :math:`\pm s` with equal probability.

    .. math:: \hat x = s \tanh\frac{s g \hat x_{\text{received}}}{\sigma^2}, \qquad
              x_{\text{received}} = g x + n, \quad n \sim \mathcal N(0, \sigma^2)

    the least mean squared error of all decisions from a user's own reception: hard where it is good, towards 0 (the
    base model) where it is bad.

    Args:
        codes: what `sign_code` gave for each of Q users.
        received: Q mappings, what the base station has of ``code.sent``.
        reception: a `Reception`, or bare MSEs (Q,) or (blocks, Q), as for `transmit`; of the repeated channel if
            symbols were repeated. Correlations between users are not used.
        estimator: "additive", "mmse" or "unbiased", as for `transmit`.
        scale: as for `transmit`, peaks included: the scales that were told say what everything was divided by. Or one
            number for each user.

    Returns:
        A list of Q vectors in the form of those encoded.

    Raises:
        TypeError: `codes` are no sign codes. ShapeError: not as many codes as received mappings.
        StateMismatchError: names or shapes are not those sent. NonFiniteError: NaN or infinity. InputError: as
            `transmit`.

    Source: the conditional mean of a binary symbol in Gaussian noise; Guo, Shamai and Verdu, IEEE Trans. Information
    Theory 51, 2005.

    Example:
        >>> import torch
        >>> code = sign_code({"w": torch.tensor([1.0, -1.0])})
        >>> soft_signs([code], [{"w": torch.tensor([0.1, -5.0])}], 0.25)
        [{'w': tensor([ 0.3799, -1.0000])}]
    """
    codes, received = list(codes), list(received)
    if len(codes) != len(received):
        raise ShapeError(f"codes: expected one for each of {len(received)} received mappings, got {len(codes)}")
    for q, code in enumerate(codes):
        if not isinstance(code, Encoding) or not isinstance(code.decoder, _Signs):
            raise TypeError(f"codes[{q}]: expected what sign_code returns, got {type(code).__name__} of another kind")
    states = [
        checked_received(vector, code.sent, f"received[{q}]")
        for q, (vector, code) in enumerate(zip(received, codes, strict=True))
    ]
    told = isinstance(scale, str)
    if told and scale not in SCALES:
        raise InputError(f"scale: expected one of {', '.join(map(repr, SCALES))} or numbers, got {scale!r}")
    known = KnownNoise.of(states, reception, estimator=estimator, scale=1.0 if told else scale)
    results = []
    for q, (code, state) in enumerate(zip(codes, states, strict=True)):
        units = _told_scales(code.sent, str(scale)) if told else known.scale[q]
        results.append(_soft(code.decoder, state, known, q, units))
    return results


def _soft(signs: Any, state: Tensors, known: KnownNoise, q: int, units: Mapping[str, float]) -> Any:
    parts = {}
    for key, tensor in state.items():
        flat = tensor.reshape(-1).to(signs.form.dtype)
        scale = signs.scales[key].to(flat).expand(tensor.shape).reshape(-1)
        soft = torch.empty_like(flat)
        for part in known.parts[key]:
            cut = slice(part.start, part.stop)
            variance = float(known.covariance[part.block, q, q]) * units[key] ** 2
            if variance > 0:
                ratio = scale[cut].to(torch.float64) * float(known.gain[part.block, q]) * flat[cut] / variance
                soft[cut] = scale[cut] * torch.tanh(ratio).to(flat.dtype)
            else:
                soft[cut] = _signed(scale[cut], flat[cut])
        parts[key] = soft
    return signs.form.filled(parts)


def _told_scales(sent: Tensors, kind: str) -> dict[str, float]:
    """What `transmit` divided by, from the magnitudes that were told: no sign is needed for that."""
    if kind.endswith("rms"):
        squares = {key: float(tensor.to(torch.float64).square().sum()) for key, tensor in sent.items()}
        if kind == "rms":
            whole = math.sqrt(math.fsum(squares.values()) / sum(tensor.numel() for tensor in sent.values()))
            return dict.fromkeys(sent, whole)
        return {key: math.sqrt(square / max(1, sent[key].numel())) for key, square in squares.items()}
    peaks = {key: float(tensor.abs().max()) if tensor.numel() else 0.0 for key, tensor in sent.items()}
    return dict.fromkeys(sent, max(peaks.values())) if kind == "peak" else peaks


def _signed(scale: Tensor, tensor: Tensor) -> Tensor:
    return torch.where(tensor >= 0, scale, -scale).expand(tensor.shape)
