r"""What distance costs: power gains of a path in free space, or by an exponent.

Every function takes distances in m and the carrier in Hz and returns power gains, so that ``functools.partial`` or a
lambda makes a `path_loss` for `UplinkScenario` of it. Path loss in dB is ``-10 log10`` of the gain. The cells of 3GPP
are in `path_loss_3gpp`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .._arrays import ArrayLike, Inputs
from .._state import finite_number
from ..errors import InputError

__all__ = ["free_space", "log_distance"]

SPEED_OF_LIGHT = 299_792_458.0  # m/s


def free_space(distance: ArrayLike, carrier: float) -> Any:
    r"""The power gain of free space between two isotropic antennas.

    .. math:: g = \Bigl(\frac{c}{4 \pi f d}\Bigr)^2

    Args:
        distance: (...) in m, positive.
        carrier: carrier frequency in Hz.

    Returns:
        (...) power gains, in the kind and precision of `distance`.

    Raises:
        InputError: a distance or the carrier is not positive; NonFiniteError: NaN or infinity.

    Source: H. Friis, "A note on a simple transmission formula", 1946.

    Example:
        >>> import numpy as np
        >>> round(float(-10 * np.log10(free_space(1000.0, 2.4e9))), 2)  # the path loss in dB
        100.05
    """
    return log_distance(distance, carrier, 2.0)


def log_distance(distance: ArrayLike, carrier: float, exponent: float, *, reference: float = 1.0) -> Any:
    r"""Free space up to a reference distance, and a power law from there on.

    .. math:: g = \Bigl(\frac{c}{4 \pi f d_0}\Bigr)^2 \Bigl(\frac{d}{d_0}\Bigr)^{-n}

    Args:
        distance: (...) in m, positive. Below the reference distance the same law is used.
        carrier: carrier frequency in Hz.
        exponent: :math:`n`; 2 is free space, cities have 2.7 to 5.
        reference: the reference distance :math:`d_0` in m.

    Returns:
        (...) power gains, in the kind and precision of `distance`.

    Raises:
        InputError: something is not positive; NonFiniteError: NaN or infinity.

    Source: T. Rappaport, "Wireless Communications", 2nd edition, eq. 4.68 and table 4.2.

    Example:
        >>> import numpy as np
        >>> gain = log_distance(np.array([10.0, 100.0]), 2.4e9, exponent=3.5)
        >>> round(float(10 * np.log10(gain[0] / gain[1])), 6)  # 35 dB per decade
        35.0
    """
    inputs, distances = checked_distances(distance)
    carrier = finite_number(carrier, "carrier", positive=True)
    exponent = finite_number(exponent, "exponent", positive=True)
    reference = finite_number(reference, "reference", positive=True)
    at_reference = (SPEED_OF_LIGHT / (4 * math.pi * carrier * reference)) ** 2
    return inputs.back(at_reference * (distances / reference) ** -exponent)


def checked_distances(distance: ArrayLike) -> tuple[Inputs, Tensor]:
    inputs = Inputs.of(distance, "distance")
    distances = inputs.real(distance, "distance")
    if bool((distances.detach() <= 0).any()):
        raise InputError(f"distance: expected positive numbers, got {float(distances.detach().min())}")
    return inputs, distances
