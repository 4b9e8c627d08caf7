"""A channel that is known with an error: what a jammer, or a receiver, may have in place of the truth."""

from __future__ import annotations

from typing import Any

import torch

from .._arrays import Array, ArrayLike, Inputs, check_channel
from .._random import Seed, generator, seed_number
from ..errors import InputError, ShapeError

__all__ = ["imperfect_channel"]


def imperfect_channel(H: Array, error: ArrayLike, *, seed: Seed) -> Any:
    r"""An estimate of the channel with a given relative error.

    .. math:: \hat h_q = \sqrt{1 - \varepsilon}\, h_q + \sqrt{\varepsilon}\, \frac{\lVert h_q \rVert}{\sqrt{N_R}}\, w_q,
              \qquad w_q \sim \mathcal{CN}(0, I)

    It has the mean power of the channel, and correlation :math:`1 - \varepsilon` in power with it: 0 is perfect
    knowledge, 1 is a channel of the right strengths and random directions. A jammer that knows no better designs its
    noise for it, ``worst_case_covariance(imperfect_channel(H, 0.1, seed=0), P, P_N)``, and meets the true one.

    Args:
        H: (..., N_R, Q) complex channel.
        error: (...) :math:`\varepsilon`, from 0 to 1.
        seed: an int or a ``torch.Generator``. Drawn on the CPU: the same numbers on every device.

    Returns:
        (..., N_R, Q) complex, with the batch shape of `H`.

    Raises:
        TypeError: `H` is real. ShapeError: shapes do not fit. InputError: `error` outside 0 to 1.

    Source: the Gauss-Markov model of channel estimation errors; B. Hassibi and B. Hochwald, 2003.

    Example:
        >>> import numpy as np
        >>> H = np.ones((4, 2)) + 0j
        >>> bool(np.all(imperfect_channel(H, 0.0, seed=0) == H))
        True
    """
    inputs = Inputs.of(H, "H", error)
    channel = inputs.complex(H, "H")
    check_channel(channel)
    epsilon = inputs.nonnegative(error, "error")
    if bool((epsilon.detach() > 1).any()):
        raise InputError(f"error: expected a share between 0 and 1, got {float(epsilon.detach().max())}")
    try:
        epsilon = epsilon.expand(channel.shape[:-2])[..., None, None]
    except RuntimeError:
        raise ShapeError(f"error: shape {tuple(epsilon.shape)} does not fit H {tuple(channel.shape)}") from None
    source = generator(seed_number(seed), "imperfect_channel")
    w = torch.randn(channel.shape, dtype=torch.complex128, generator=source).to(channel.device)
    strength = channel.abs().square().mean(dim=-2, keepdim=True).sqrt()
    return inputs.back((1 - epsilon).sqrt() * channel + epsilon.sqrt() * strength * w)
