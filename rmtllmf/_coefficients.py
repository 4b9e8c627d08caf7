"""How a vector's coefficients are cut up for the channel: fixed, so that noise is the same wherever it is drawn."""

from __future__ import annotations

from torch import Tensor

SCALES = ("rms", "peak", "tensor_rms", "tensor_peak")
"""What coefficients can be measured in, beside a number."""

CHUNK = (
    1 << 16
)  # coefficients that share a generator: even, so that a symbol never spans two, and small enough for cache

ROW = 4096  # squares added up at once, in float64, by one thread: the same bits for any number of them


def sums_of_rows(squares: Tensor) -> list[float]:
    """The sum of each row of `ROW` entries, and of what is left at the end."""
    whole = len(squares) // ROW * ROW
    sums: list[float] = squares[:whole].view(-1, ROW).sum(-1).tolist() if whole else []
    if whole < len(squares):
        sums.append(float(squares[whole:].sum()))
    return sums
