"""The law of the noise of a weighted sum over users: deviations, and covariances where a scale changes in a symbol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._link import Link
from ._stream import Stream


class SumNoise:
    """Makes unit noise into the noise of ``sum_q weights[q] * received_q``.

    With ``E = L L^H`` and the real numbers ``a = weights * scales`` of a tensor, ``u = L^T a`` has one entry a stream:
    the noise of a coefficient has variance ``a^T Re(E) a = |u|^2``. For a symbol with its real part in a tensor of `a`
    and its imaginary part in one of `b`, ``Cov(imaginary, real) = b^T Im(E) a = Im(u_b^T conj(u_a))``.

    Attributes:
        deviation: per block, name -> standard deviation.
        pair: per block, name of a tensor that begins with an imaginary part -> what its first coefficient takes of the
            unit noise of the real part, and of its own; only where they are correlated.
        any: whether there is noise at all.
    """

    def __init__(
        self, stream: Stream, link: Link, weights: Sequence[float], scale_of: Sequence[Mapping[str, float]]
    ) -> None:
        self.stream = stream
        keys = [key for key in stream.keys if stream.vectors[0][key].numel()]
        root = link.root.to(torch.complex128)
        rows = [[w * scale[key] for w, scale in zip(weights, scale_of, strict=True)] for key in keys]
        a = torch.tensor(rows, dtype=torch.complex128).reshape(len(keys), len(weights))
        self.deviation: list[dict[str, float]] = []
        self.pair: list[dict[str, tuple[float, float]]] = []
        for L in root:
            streams = a @ L
            deviation = torch.linalg.vector_norm(streams, dim=-1).tolist()
            self.deviation.append(dict(zip(keys, deviation, strict=True)))
            pair = {}
            for i in range(1, len(keys)):
                if stream.start_of(keys[i]) % 2 and not torch.equal(a[i - 1], a[i]) and deviation[i - 1] > 0:
                    taken = float(torch.vdot(streams[i - 1], streams[i]).imag) / deviation[i - 1]
                    if taken:
                        pair[keys[i]] = taken, max(0.0, deviation[i] ** 2 - taken**2) ** 0.5
            self.pair.append(pair)
        self.any = any(value > 0 for deviation in self.deviation for value in deviation.values())

    def coloured(self, block: int, white: Tensor, low: int, high: int) -> Tensor:
        """The noise of coefficients [low, high) of the stream, from and in the memory of `white`, that begins there."""
        deviation, pair = self.deviation[block], self.pair[block]
        pieces = list(self.stream.pieces(low, high))
        firsts = {}
        for key, where, cut in pieces:
            if key in pair and where.start == 0:
                real, own = pair[key]
                at = cut.start
                firsts[at] = white[at - 1] * real + white[at] * own
        for key, _, cut in pieces:
            white[cut].mul_(deviation[key])
        for at, value in firsts.items():
            white[at] = value
        return white
