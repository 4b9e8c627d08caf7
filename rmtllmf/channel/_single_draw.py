"""The worst case for one draw, in NumPy: there torch would spend several times as long on calls as on the work.

Same equations as `_water_filling`, for the plain case only. Whatever is not plain (a batch, a gradient, another device,
a channel of deficient rank, input that is wrong) is left to the general way, which also has the error messages.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ._water_filling import EPS, ILL_CONDITIONED, MAX_STEPS

Solved = tuple[NDArray[Any], float, float, int]


def solve_single(H: object, P: object, P_N: object, noise: object) -> Solved | None:
    """C, rate, level and steps; None if this is not the plain case."""
    h, p, jammer, floor = _array(H), _array(P), _number(P_N), _number(noise)
    if h is None or p is None or jammer is None or floor is None or jammer == 0:
        return None
    if h.ndim != 2 or h.dtype.kind != "c" or p.dtype.kind != "f" or p.shape not in ((), h.shape[1:]) or h.size == 0:
        return None
    amplitude, strongest = float(np.abs(h).max()), float(p.max())
    if not (0 < amplitude < math.inf and 0 < strongest < math.inf and p.min() >= 0):
        return None
    B = h * (np.sqrt(p / strongest) / amplitude)
    trace = float(np.vdot(B, B).real)
    unit = trace * amplitude * amplitude * strongest
    if not 0 < unit < math.inf:
        return None
    wide = B.shape[1] >= B.shape[0]
    v, V = np.linalg.eigh((B @ B.conj().T if wide else B.conj().T @ B) / trace)
    if v[0] < ILL_CONDITIONED * v[-1]:
        return None
    U: NDArray[Any] = V if wide else B @ (V / np.sqrt(v * trace))
    c, level, steps = _fill(v, jammer / unit, floor / unit)
    if steps == MAX_STEPS:
        return None
    half = U * np.sqrt(c * unit)
    C: NDArray[Any] = half @ half.conj().T
    C = (C + C.conj().T) / 2
    return C, float(np.log1p(v / (c + floor / unit)).sum()), level / unit, steps


def _fill(v: NDArray[Any], P_N: float, s2: float) -> tuple[NDArray[Any], float, int]:
    """As `_water_filling.fill`, for positive `v` and `P_N`."""
    top, total = float(v[-1]), float(v.sum())
    start = s2 * s2 * (top - v) / (v * top)
    base = 2 * s2 + v
    squared, shift = base * base, s2 + s2 * s2 / top
    raised = P_N + len(v) * s2
    equal = raised * (raised + total) / total
    t = min(P_N * (P_N + 2 * s2 + top) / top, equal - shift + 8 * EPS * (equal + shift))
    steps = 0
    while steps < MAX_STEPS:
        steps += 1
        gap = t - start
        d = v * np.maximum(gap, 0.0)
        root = np.sqrt(squared + 4 * d)
        excess = float((2 * d / (base + root)).sum()) - P_N
        step = excess / float(v @ ((gap >= 0) / root))
        step /= 1 + step / (t + shift)
        t = max(t - step, 0.0)
        if abs(step) <= 4 * EPS * t or abs(excess) <= 4 * EPS * P_N:
            break
    d = v * np.maximum(t - start, 0.0)
    return 2 * d / (base + np.sqrt(squared + 4 * d)), 1 / (t + shift), steps


def _array(value: object) -> NDArray[Any] | None:
    if isinstance(value, Tensor):
        if value.requires_grad or value.device.type != "cpu" or not (value.is_floating_point() or value.is_complex()):
            return None
        value = value.resolve_conj().resolve_neg().numpy()
    if isinstance(value, float):
        return np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fc" or isinstance(value, np.ma.MaskedArray):
        return None
    return np.asarray(value).astype(np.complex128 if value.dtype.kind == "c" else np.float64, copy=False)


def _number(value: object) -> float | None:
    """A finite number >= 0; the jammer's and the floor's general limits are the general way's."""
    if isinstance(value, Tensor):
        if value.requires_grad or value.ndim or value.is_complex():
            return None
        value = value.item()
    elif isinstance(value, np.ndarray | np.generic):
        if value.ndim or value.dtype.kind != "f" or isinstance(value, np.ma.MaskedArray):
            return None
        value = value.item()
    if not isinstance(value, float) or not 0 <= value < math.inf:
        return None
    return value
