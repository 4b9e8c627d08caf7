"""What is sent of matrices that are known as products of two factors, with the scales that let the least noise in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._state import Tensors, inner_product, wide
from ..errors import InputError
from ._form import Form
from .coding import SCALE_BITS, Encoding, as_told


@dataclass(frozen=True, eq=False)
class _Product:
    """Multiplies factors: name -> the names of B and A; other names were sent as they are. Then divides by `gain`."""

    form: Form
    pairs: Mapping[str, tuple[str, str]]
    gain: Mapping[str, float]

    def __call__(self, received: Tensors) -> Any:
        names = {name for pair in self.pairs.values() for name in pair}
        parts = {key: wide(tensor) for key, tensor in received.items() if key not in names}
        for key, (left, right) in self.pairs.items():
            B, A = (received[name].to(self.form.dtype) for name in (left, right))
            parts[key] = B @ A
        return self.form.filled({key: tensor / self.gain[key] for key, tensor in parts.items()})


def encoding_of(
    form: Form, parts: Tensors, factors: Mapping[str, tuple[Tensor, Tensor, float]], *, loaded: bool
) -> Encoding:
    """From (B, A, gain of their product) of some names, and all else whole: in units of its rms' root if `loaded`."""
    sent, pairs, gain, bits = {}, {}, {}, 0
    for key, tensor in parts.items():
        if key not in factors:
            gain[key] = _gain(tensor, key) if loaded else 1.0
            sent[key] = wide(tensor) * gain[key]
            bits += SCALE_BITS if loaded and tensor.numel() else 0
    for key, (B, A, product_gain) in factors.items():
        pairs[key], gain[key] = (f"{key}/B", f"{key}/A"), product_gain
        for name, factor in zip(pairs[key], (B, A), strict=True):
            if name in form.stream.vectors[0]:
                raise InputError(f"vector: a factor of {key!r} would be sent as {name!r}, which is a name of its own")
            sent[name] = factor.contiguous()
    return Encoding({key: sent[key] for key in sorted(sent)}, bits, _Product(form, pairs, gain))


def scaled(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, float]:
    """From an even split of the singular values to the one with the least noise, and the gain of its product."""
    m, n = len(B), A.shape[1]
    return B * m**0.25, A * n**0.25, (m * n) ** 0.25


def _gain(tensor: Tensor, key: str) -> float:
    """One over the root of the rms, as float32 tells it; 1 for a tensor that is all zero."""
    unit = float(tensor.abs().max()) if tensor.numel() else 0.0
    if unit == 0:
        return 1.0
    scaled = wide(tensor) / unit
    rms = unit * math.sqrt(inner_product(scaled, scaled) / tensor.numel())
    return as_told(rms**-0.5, f"vector[{key!r}]: its gain")
