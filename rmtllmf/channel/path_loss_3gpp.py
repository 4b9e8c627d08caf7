r"""What distance costs in the cells of 3GPP TR 38.901: urban macro, urban micro (street canyon) and rural macro.

Every function takes distances in m and the carrier in Hz and returns power gains, as those of `path_loss` do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arrays import ArrayLike, Inputs
from .._state import finite_number
from ..errors import InputError, ShapeError
from .path_loss import checked_distances

__all__ = ["los_probability", "rma", "uma", "umi"]

_ROUND_SPEED_OF_LIGHT = 3.0e8  # m/s, what TR 38.901 prescribes for its breakpoint distances
MODELS = ("uma", "umi", "rma")
BASE_HEIGHT = {"uma": 25.0, "umi": 10.0, "rma": 35.0}  # m
USER_HEIGHT = 1.5  # m


def uma(
    distance: ArrayLike,
    carrier: float,
    *,
    los: bool | ArrayLike,
    base_height: float = 25.0,
    user_height: float = 1.5,
    environment_height: float | None = None,
) -> Any:
    r"""The power gain in an urban macro cell (UMa): a base station above the roofs.

    With :math:`f` in GHz, :math:`d_3` the distance between the antennas, and the breakpoint at the ground distance
    :math:`d_B = 4 (h_B - h_E)(h_U - h_E) f / c`, the path loss in dB is

    .. math::
        L_{\text{LOS}} &= 28 + 22 \log_{10} d_3 + 20 \log_{10} f \quad (d \le d_B), \\
        L_{\text{LOS}} &= 28 + 40 \log_{10} d_3 + 20 \log_{10} f - 9 \log_{10}(d_B^2 + (h_B - h_U)^2)
        \quad (d > d_B), \\
        L_{\text{NLOS}} &= \max(L_{\text{LOS}},\ 13.54 + 39.08 \log_{10} d_3 + 20 \log_{10} f - 0.6 (h_U - 1.5)).

    Args:
        distance: (...) on the ground, in m, 10 m to 5 km.
        carrier: carrier frequency in Hz, 0.5 to 100 GHz.
        los: whether there is a line of sight: True, False, or booleans that broadcast with `distance`.
        base_height: of the base station's antenna :math:`h_B`, in m.
        user_height: of the users' antennas :math:`h_U`, in m, 1.5 to 22.5 m.
        environment_height: :math:`h_E` in m, the height at which the ground reflects; 1 m if None. For users at 13 m
            and above the standard draws it at random, so that it must be given.

    Returns:
        (...) power gains, in the kind and precision of `distance`.

    Raises:
        InputError: an argument outside the range for which the standard gives the formula; TypeError: `los` is not
            boolean; ShapeError: it does not broadcast with `distance`.

    Source: 3GPP TR 38.901, table 7.4.1-1.

    Example:
        >>> import numpy as np
        >>> loss = -10 * np.log10(uma(np.array([100.0, 100.0]), 2e9, los=np.array([True, False])))
        >>> loss.round(1).tolist()
        [78.3, 98.2]
    """
    user = _between(user_height, "user_height", 1.5, 22.5, "m")
    if environment_height is None and user >= 13:
        raise InputError(
            f"environment_height: for users at {user} m TR 38.901 draws it at random (from 13 m on); give one"
        )
    ground = 1.0 if environment_height is None else finite_number(environment_height, "environment_height")
    f = _between(carrier, "carrier", 0.5e9, 100e9, "Hz") / 1e9
    base = _above(base_height, "base_height", ground)
    inputs, distances, sight = _cell(distance, los, "UMa", 5e3)
    if not 0 <= ground < user:
        raise InputError(f"environment_height: expected 0 to less than user_height, {user} m, got {ground}")
    d3 = _three_dimensional(distances, base, user)
    breakpoint = 4 * (base - ground) * (user - ground) * f * 1e9 / _ROUND_SPEED_OF_LIGHT
    near = 28.0 + 22.0 * d3 + 20 * math.log10(f)
    far = 28.0 + 40.0 * d3 + 20 * math.log10(f) - 9.0 * math.log10(breakpoint**2 + (base - user) ** 2)
    blocked = 13.54 + 39.08 * d3 + 20 * math.log10(f) - 0.6 * (user - 1.5)
    return inputs.back(_gain(torch.where(distances <= breakpoint, near, far), blocked, sight))


def umi(
    distance: ArrayLike,
    carrier: float,
    *,
    los: bool | ArrayLike,
    base_height: float = 10.0,
    user_height: float = 1.5,
) -> Any:
    r"""The power gain in an urban micro cell (UMi, street canyon): a base station below the roofs.

    With :math:`f` in GHz, :math:`d_3` the distance between the antennas, and the breakpoint at the ground distance
    :math:`d_B = 4 (h_B - 1)(h_U - 1) f / c`, the path loss in dB is

    .. math::
        L_{\text{LOS}} &= 32.4 + 21 \log_{10} d_3 + 20 \log_{10} f \quad (d \le d_B), \\
        L_{\text{LOS}} &= 32.4 + 40 \log_{10} d_3 + 20 \log_{10} f - 9.5 \log_{10}(d_B^2 + (h_B - h_U)^2)
        \quad (d > d_B), \\
        L_{\text{NLOS}} &= \max(L_{\text{LOS}},\ 22.4 + 35.3 \log_{10} d_3 + 21.3 \log_{10} f - 0.3 (h_U - 1.5)).

    Args:
        distance: (...) on the ground, in m, 10 m to 5 km.
        carrier: carrier frequency in Hz, 0.5 to 100 GHz.
        los: whether there is a line of sight: True, False, or booleans that broadcast with `distance`.
        base_height: of the base station's antenna :math:`h_B`, in m.
        user_height: of the users' antennas :math:`h_U`, in m, 1.5 to 22.5 m.

    Returns:
        (...) power gains, in the kind and precision of `distance`.

    Raises:
        InputError: an argument outside the range for which the standard gives the formula; TypeError: `los` is not
            boolean; ShapeError: it does not broadcast with `distance`.

    Source: 3GPP TR 38.901, table 7.4.1-1.

    Example:
        >>> import numpy as np
        >>> round(float(-10 * np.log10(umi(100.0, 2e9, los=True))), 1)
        80.5
    """
    f = _between(carrier, "carrier", 0.5e9, 100e9, "Hz") / 1e9
    user = _between(user_height, "user_height", 1.5, 22.5, "m")
    base = _above(base_height, "base_height", 1.0)
    inputs, distances, sight = _cell(distance, los, "UMi", 5e3)
    d3 = _three_dimensional(distances, base, user)
    breakpoint = 4 * (base - 1) * (user - 1) * f * 1e9 / _ROUND_SPEED_OF_LIGHT
    near = 32.4 + 21.0 * d3 + 20 * math.log10(f)
    far = 32.4 + 40.0 * d3 + 20 * math.log10(f) - 9.5 * math.log10(breakpoint**2 + (base - user) ** 2)
    blocked = 22.4 + 35.3 * d3 + 21.3 * math.log10(f) - 0.3 * (user - 1.5)
    return inputs.back(_gain(torch.where(distances <= breakpoint, near, far), blocked, sight))


def rma(
    distance: ArrayLike,
    carrier: float,
    *,
    los: bool | ArrayLike,
    base_height: float = 35.0,
    user_height: float = 1.5,
    building_height: float = 5.0,
    street_width: float = 20.0,
) -> Any:
    r"""The power gain in a rural macro cell (RMa).

    With :math:`f` in GHz, :math:`d_3` the distance between the antennas, :math:`h` the buildings' height, :math:`W`
    the streets' width, and the breakpoint at the ground distance :math:`d_B = 2 \pi h_B h_U f / c`, the path loss
    in dB is

    .. math::
        L_1(d) &= 20 \log_{10}(40 \pi d f / 3) + \min(.03\, h^{1.72}, 10) \log_{10} d - \min(.044\, h^{1.72}, 14.77)
                  + .002\, d \log_{10} h, \\
        L_{\text{LOS}} &= L_1(d_3) \quad (d \le d_B), \qquad
        L_{\text{LOS}} = L_1(d_B) + 40 \log_{10}(d_3 / d_B) \quad (d > d_B), \\
        L_{\text{NLOS}} &= \max\bigl(L_{\text{LOS}},\ 161.04 - 7.1 \log_{10} W + 7.5 \log_{10} h
                  - (24.37 - 3.7 (h / h_B)^2) \log_{10} h_B \\
        &\qquad + (43.42 - 3.1 \log_{10} h_B)(\log_{10} d_3 - 3) + 20 \log_{10} f
                  - (3.2 (\log_{10} 11.75\, h_U)^2 - 4.97)\bigr).

    Args:
        distance: (...) on the ground, in m: 10 m to 10 km with a line of sight, to 5 km without.
        carrier: carrier frequency in Hz, 0.5 to 30 GHz.
        los: whether there is a line of sight: True, False, or booleans that broadcast with `distance`.
        base_height: of the base station's antenna :math:`h_B`, in m, 10 to 150 m.
        user_height: of the users' antennas :math:`h_U`, in m, 1 to 10 m.
        building_height: average, in m, 5 to 50 m.
        street_width: average, in m, 5 to 50 m.

    Returns:
        (...) power gains, in the kind and precision of `distance`. The standard's formula has a jump at the breakpoint,
        because it uses a ground distance for one between antennas; it is below .02 dB at the default heights.

    Raises:
        InputError: an argument outside the range for which the standard gives the formula; TypeError: `los` is not
            boolean; ShapeError: it does not broadcast with `distance`.

    Source: 3GPP TR 38.901, table 7.4.1-1.

    Example:
        >>> import numpy as np
        >>> round(float(-10 * np.log10(rma(1000.0, 7e8, los=True))), 1)
        93.4
    """
    f = _between(carrier, "carrier", 0.5e9, 30e9, "Hz") / 1e9
    base = _between(base_height, "base_height", 10.0, 150.0, "m")
    user = _between(user_height, "user_height", 1.0, 10.0, "m")
    h = _between(building_height, "building_height", 5.0, 50.0, "m")
    width = _between(street_width, "street_width", 5.0, 50.0, "m")
    inputs, distances, sight = _cell(distance, los, "RMa", 10e3, blocked_farthest=5e3)
    d3 = _three_dimensional(distances, base, user)
    breakpoint = _rma_breakpoint(f * 1e9, base, user)

    def first(log_d: Tensor) -> Tensor:
        loss = 20 * (math.log10(40 * math.pi * f / 3) + log_d) + min(0.03 * h**1.72, 10) * log_d
        return loss - min(0.044 * h**1.72, 14.77) + 0.002 * math.log10(h) * 10**log_d

    log_breakpoint = torch.tensor(math.log10(breakpoint), dtype=d3.dtype, device=d3.device)
    clear = torch.where(distances <= breakpoint, first(d3), first(log_breakpoint) + 40 * (d3 - log_breakpoint))
    blocked = (
        161.04
        - 7.1 * math.log10(width)
        + 7.5 * math.log10(h)
        - (24.37 - 3.7 * (h / base) ** 2) * math.log10(base)
        + (43.42 - 3.1 * math.log10(base)) * (d3 - 3)
        + 20 * math.log10(f)
        - (3.2 * math.log10(11.75 * user) ** 2 - 4.97)
    )
    return inputs.back(_gain(clear, blocked, sight))


def los_probability(distance: ArrayLike, model: str, *, user_height: float = 1.5) -> Any:
    r"""The probability that a user outdoors sees the base station.

    It is 1 up to :math:`d_0`, and from there on

    .. math::
        p_{\text{UMi}} = \frac{18}{d} + \Bigl(1 - \frac{18}{d}\Bigr) e^{-d/36}, \qquad
        p_{\text{UMa}} = \Bigl(\frac{18}{d} + \Bigl(1 - \frac{18}{d}\Bigr) e^{-d/63}\Bigr)
        \Bigl(1 + \frac{5 C}{4} \Bigl(\frac{d}{100}\Bigr)^3 e^{-d/150}\Bigr), \qquad
        p_{\text{RMa}} = e^{-(d - 10)/1000}

    with :math:`d_0 = 18` m (10 m in RMa) and :math:`C = ((h_U - 13)/10)^{1.5}` for users above 13 m, 0 for others.

    Args:
        distance: (...) on the ground, in m, positive.
        model: "uma", "umi" or "rma".
        user_height: of the users' antennas :math:`h_U`, in m, at most 23 m; only UMa depends on it.

    Returns:
        (...) probabilities, in the kind and precision of `distance`.

    Raises:
        InputError: a distance that is not positive, an unknown model, a height out of range.

    Source: 3GPP TR 38.901, table 7.4.2-1.

    Example:
        >>> round(float(los_probability(36.0, "umi")), 4)  # (1 + 1/e)/2
        0.6839
    """
    if model not in MODELS:
        raise InputError(f"model: expected one of {', '.join(map(repr, MODELS))}, got {model!r}")
    user = finite_number(user_height, "user_height", positive=True)
    if user > 23:
        raise InputError(f"user_height: TR 38.901 gives the probability up to 23 m, got {user}")
    inputs, d = checked_distances(distance)
    if model == "rma":
        return inputs.back(torch.exp(-(d - 10).clamp_min(0.0) / 1000))
    beyond = d.clamp_min(18.0)
    probability = 18 / beyond + torch.exp(-beyond / (36 if model == "umi" else 63)) * (1 - 18 / beyond)
    if model == "uma" and user > 13:
        lift = ((user - 13) / 10) ** 1.5 * 1.25 * (beyond / 100) ** 3 * torch.exp(-beyond / 150)
        probability = torch.where(d <= 18, 1.0, probability * (1 + lift)).clamp_max(1.0)
    return inputs.back(probability)


def model_gain(model: str, distance: Tensor, carrier: float, los: Tensor | bool) -> Tensor:
    """The gain of one of `MODELS` at its default heights."""
    return {"uma": uma, "umi": umi, "rma": rma}[model](distance, carrier, los=los)


def model_shadowing(model: str, distance: Tensor, carrier: float, los: Tensor) -> Tensor:
    """The standard deviation of the shadowing in dB that TR 38.901, table 7.4.1-1, gives beside the path loss."""
    if model == "rma":
        near = distance <= _rma_breakpoint(carrier, BASE_HEIGHT["rma"], USER_HEIGHT)
        return torch.where(los, torch.where(near, 4.0, 6.0).to(distance.dtype), 8.0)
    return torch.where(los, 4.0, {"uma": 6.0, "umi": 7.82}[model]).to(distance.dtype)


def _rma_breakpoint(carrier: float, base: float, user: float) -> float:
    return 2 * math.pi * base * user * carrier / _ROUND_SPEED_OF_LIGHT


def _cell(
    distance: ArrayLike, los: bool | ArrayLike, model: str, farthest: float, blocked_farthest: float | None = None
) -> tuple[Inputs, Tensor, Tensor]:
    """Checked distances, and the mask of those with a line of sight, of one shape."""
    inputs, distances = checked_distances(distance)
    sight = los if isinstance(los, Tensor) else torch.as_tensor(np.asarray(los))
    if sight.dtype != torch.bool:
        raise TypeError(f"los: expected True, False or an array of booleans, got {sight.dtype}")
    try:
        distances, sight = torch.broadcast_tensors(distances, sight.to(distances.device))
    except RuntimeError:
        raise ShapeError(
            f"los: shape {tuple(sight.shape)} does not broadcast with distance of shape {tuple(distances.shape)}"
        ) from None
    limit = torch.where(sight, farthest, farthest if blocked_farthest is None else blocked_farthest)
    outside = (distances.detach() < 10.0) | (distances.detach() > limit)
    if bool(outside.any()):
        first = int(outside.flatten().nonzero()[0])
        raise InputError(
            f"distance: TR 38.901 gives {model} from 10 m to {float(limit.flatten()[first]):g} m, got "
            f"{float(distances.detach().flatten()[first]):.6g} m"
        )
    return inputs, distances, sight


def _three_dimensional(distances: Tensor, base: float, user: float) -> Tensor:
    """The logarithm, to base 10, of the distance between the antennas."""
    return torch.log10(distances.square() + (base - user) ** 2) / 2


def _gain(clear: Tensor, blocked: Tensor, sight: Tensor) -> Tensor:
    loss = torch.where(sight, clear, torch.maximum(clear, blocked))
    return 10 ** (-loss / 10)


def _between(value: float, argument: str, low: float, high: float, unit: str) -> float:
    number = finite_number(value, argument)
    if not low <= number <= high:
        raise InputError(
            f"{argument}: TR 38.901 gives the formula for {low:g} to {high:g} {unit}, got {number:g} {unit}"
        )
    return number


def _above(value: float, argument: str, ground: float) -> float:
    number = finite_number(value, argument)
    if number <= ground:
        raise InputError(f"{argument}: expected more than {ground:g} m, got {number:g} m")
    return number
