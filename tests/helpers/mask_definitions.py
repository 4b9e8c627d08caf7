"""Rules that decide entry by entry (or column by column) what is kept of each task, as their papers write them."""

from __future__ import annotations

from torch import Tensor


def emr_unified(x: Tensor) -> Tensor:
    """Of (N, ...) tensors: the sign of the sum, and the largest magnitude among those of this sign."""
    sign = x.sum(0).sign()
    agree = (x.sign() == sign) & (sign != 0)
    return sign * (x.abs() * agree).amax(0)
