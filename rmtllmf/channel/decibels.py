"""Decibels and back: everywhere else powers are in W and ratios are linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arrays import refuse_masked
from ..errors import InputError, NonFiniteError

__all__ = ["db", "dbm", "from_db", "from_dbm"]

Numbers = TypeVar("Numbers", float, NDArray[np.floating], Tensor)

MILLIWATT = 1e-3


def db(ratio: Numbers) -> Numbers:
    r"""A ratio of powers in decibels.

    .. math:: 10 \log_{10} r

    Args:
        ratio: linear, at least 0 (which is minus infinity in dB); a number, an array or a tensor of any shape.

    Returns:
        In dB, of the kind and shape that was given; gradients are kept.

    Raises:
        InputError: a negative ratio; NonFiniteError: NaN. TypeError: no real numbers.

    Example:
        >>> db(0.5)
        -3.010299956639812
        >>> db(np.array([1.0, 100.0]))
        array([ 0., 20.])
    """
    return _applied(ratio, "ratio", _decibels)


def from_db(decibels: Numbers) -> Numbers:
    r"""The ratio of powers that a number of decibels stands for.

    .. math:: 10^{x / 10}

    Args:
        decibels: x in dB; a number, an array or a tensor of any shape.

    Returns:
        Linear, of the kind and shape that was given; gradients are kept.

    Raises:
        NonFiniteError: NaN. TypeError: no real numbers.

    Example:
        >>> round(from_db(-3.0), 4)
        0.5012
    """
    return _applied(decibels, "decibels", lambda x: 10 ** (x / 10), signed=True)


def dbm(power: Numbers) -> Numbers:
    r"""A power in decibels relative to a milliwatt.

    .. math:: 10 \log_{10} \frac{p}{1\,\mathrm{mW}}

    Args:
        power: in W, at least 0; a number, an array or a tensor of any shape.

    Returns:
        In dBm, of the kind and shape that was given; gradients are kept.

    Raises:
        InputError: a negative power; NonFiniteError: NaN. TypeError: no real numbers.

    Example:
        >>> from rmtllmf.channel import UplinkScenario
        >>> dbm(UplinkScenario().power)
        -10.0
    """
    return _applied(power, "power", lambda x: _decibels(x / MILLIWATT))


def from_dbm(decibels: Numbers) -> Numbers:
    r"""The power that a number of decibels relative to a milliwatt stands for.

    .. math:: 10^{x / 10}\,\mathrm{mW}

    Args:
        decibels: x in dBm; a number, an array or a tensor of any shape.

    Returns:
        In W, of the kind and shape that was given; gradients are kept.

    Raises:
        NonFiniteError: NaN. TypeError: no real numbers.

    Example:
        >>> from_dbm(30.0)
        1.0
    """
    return _applied(decibels, "decibels", lambda x: MILLIWATT * 10 ** (x / 10), signed=True)


def _decibels(x: Tensor) -> Tensor:
    return 10 * torch.log10(x)


def _applied(value: Numbers, argument: str, function: Callable[[Tensor], Tensor], *, signed: bool = False) -> Numbers:
    """The function of a float64 or given tensor, in the caller's kind."""
    if isinstance(value, Tensor):
        x = value
    else:
        refuse_masked(value, argument)
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise TypeError(f"{argument}: expected real numbers, got {_kind(value, array.dtype)}")
        x = torch.from_numpy(np.array(array, dtype=np.float64))
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{argument}: expected real numbers, got {x.dtype}")
    held = x.detach()
    if bool(held.isnan().any()):
        raise NonFiniteError(f"{argument}: holds NaN; expected numbers")
    if not signed and bool((held < 0).any()):
        raise InputError(f"{argument}: expected numbers >= 0, got {float(held.min()):g}")
    result = function(x if x.is_floating_point() else x.double())
    if isinstance(value, Tensor):
        return result
    if not isinstance(value, np.ndarray):
        return float(result) if result.ndim == 0 else result.numpy()  # type: ignore[return-value]
    kept = array.dtype if array.dtype.kind == "f" else np.dtype(np.float64)
    return result.numpy().astype(kept)


def _kind(value: object, dtype: np.dtype) -> str:
    return f"an array of dtype {dtype}" if isinstance(value, np.ndarray) else repr(value)
