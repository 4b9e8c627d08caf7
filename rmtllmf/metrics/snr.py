"""Signal-to-noise ratio in the parameter domain."""

from __future__ import annotations

import math

import torch

from .._state import StateLike, as_state, check_finite, check_keys, check_shapes, is_bendable
from ..errors import InputError

__all__ = ["snr_db"]


def snr_db(sent: StateLike, received: StateLike) -> float:
    r"""How loud the sent parameters are beside what the channel added, in dB.

    .. math:: 10 \log_{10} \frac{\lVert \tau \rVert^2}{\lVert \hat\tau - \tau \rVert^2}

    This is not the SNR of the radio link: a task vector scaled by its peak is quieter than its symbols by the
    squared ratio of peak to rms.

    Args:
        sent: what was sent: a mapping of name -> tensor, a module, or the path of a checkpoint or of
            what `TaskVector.save` wrote.
        received: what arrived, with the same keys and shapes.

    Returns:
        dB over all floating-point entries but running statistics (integer buffers and running statistics are never
        sent); ``inf`` if both are equal. Accumulated in float64.

    Raises:
        InputError: everything sent is zero, or nothing is floating-point. StateMismatchError: keys or shapes disagree.
        NonFiniteError: NaN or infinity.

    Source: R-MTLLMF, section IV (the SNRs reported beside the MSEs).

    Example:
        >>> import torch
        >>> snr_db({"w": torch.tensor([10.0, 0.0])}, {"w": torch.tensor([10.0, 1.0])})
        20.0
    """
    clean, bent = as_state(sent, "sent", vectors=True), as_state(received, "received", vectors=True)
    check_keys(bent, clean, "received", "sent")
    check_shapes(bent, clean, "received", "sent")
    keys = sorted(key for key in clean if is_bendable(key, clean[key].dtype))
    check_finite({key: clean[key] for key in keys}, "sent")
    check_finite({key: bent[key] for key in keys}, "received")
    signal = noise = 0.0
    for key in keys:
        # hypot: norms, not their squares, so that tiny and huge entries are safe
        before = clean[key].detach().to(torch.float64)
        after = bent[key].detach().to(before.device, torch.float64)
        signal = math.hypot(signal, float(before.norm()))
        noise = math.hypot(noise, float((after - before).norm()))
    if signal == 0:
        raise InputError("sent: is all zero (or holds no floating-point entries), so that there is no signal")
    return math.inf if noise == 0 else 20 * math.log10(signal / noise)
