"""Unequal error protection: which tensors of a task vector get how much of the transmit power."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._state import Tensors, check_keys, finite_number, inner_product, whole_number, wide
from ..errors import InputError, NonFiniteError
from ._form import Form
from .coding import SCALE_BITS, Encoding, as_told

__all__ = ["loaded", "power_loading"]


@dataclass(frozen=True, eq=False)
class _Unloaded:
    """Divides by the gains; what was sent with gain 0 becomes 0."""

    form: Form  # of what is sent without gains
    gains: Mapping[str, float]
    inner: Callable[[Tensors], Any] | None  # what decodes that, if it is not the vector itself

    def __call__(self, received: Tensors) -> Any:
        parts = {}
        for key, tensor in received.items():
            gain = self.gains[key]
            parts[key] = wide(tensor) / gain if gain else torch.zeros_like(tensor)
        plain = self.form.filled(parts)
        return plain if self.inner is None else self.inner(plain)


def power_loading(
    vector: Tensors | Encoding, sensitivity: Mapping[str, float] | None = None, *, noise: float | None = None
) -> dict[str, float]:
    r"""The gains, one for each tensor, with which the noise of a transmission does least harm.

    Tensor k has :math:`n_k` entries of mean square :math:`v_k`, of which an error of variance 1 costs :math:`w_k`. It
    is sent as :math:`a_k \tau_k`, all tensors with the energy of the plain vector, and divided by :math:`a_k` when
    received. With :math:`p_k = a_k^2 v_k` in units of the vector's mean square, and noise :math:`\mu` in the same,
    equal for all,

    .. math:: \min_{p \ge 0} \sum_k n_k w_k v_k \frac{\mu}{p_k} \quad \text{or} \quad
              \min_{p \ge 0} \sum_k n_k w_k v_k \frac{\mu}{p_k + \mu} \qquad \text{where} \quad
              \sum_k n_k p_k = \sum_k n_k

    The first is for values used as they are received, :math:`p_k \propto \sqrt{w_k v_k}`; the least error is
    :math:`\mu (\sum_k n_k \sqrt{w_k v_k})^2 / \sum_k n_k`. The second is for the posterior mean, which shrinks by
    :math:`p_k/(p_k + \mu)` before it divides: :math:`p_k = \max(0, t \sqrt{w_k v_k} - \mu)`, so that tensors below the
    water level are not sent, and decode to 0, the base model. Tensors of equal mean square get
    :math:`a_k^2 \propto \sqrt{w_k}` from the first.

    Args:
        vector: a mapping of name -> tensor, or an `Encoding`, whose tensors are then those that are sent.
        sensitivity: name -> :math:`w_k`, at least 0, for every name; those of tied tensors add up. None: 1 for every
            tensor that is sent, so that errors in its entries count. (What `low_rank_code` sends is loaded already.)
        noise: None for the first problem; for the second :math:`\mu`, the variance of the error in a received number
            of mean square 1: the MSE under "additive", one over the SINR under "mmse" and "unbiased".

    Returns:
        Name of what is sent -> :math:`a_k`, as float32 tells it, for `loaded`; 0 for tensors that are all zero or have
        sensitivity 0. Transmit with ``scale="rms"`` or a number, because scales of single tensors would undo it.

    Raises:
        InputError: a negative sensitivity, nothing left to send, or a `noise` that is not positive.
        StateMismatchError: `sensitivity` has other names. NonFiniteError: NaN or infinity. TypeError: other kinds.

    Source: the Cauchy-Schwarz inequality; T. Berger, "Rate distortion theory", 1971, section 4.5, for water levels.

    Example:
        >>> import torch
        >>> power_loading({"a": torch.ones(4), "b": torch.ones(4)}, {"a": 16.0, "b": 1.0})
        {'a': 1.264911..., 'b': 0.632455...}
        >>> power_loading({"a": torch.ones(4), "b": torch.ones(4)}, {"a": 16.0, "b": 1.0}, noise=1.0)
        {'a': 1.414213..., 'b': 0.0}
    """
    form, parts = Form.of(vector.sent if isinstance(vector, Encoding) else vector)
    weights = dict.fromkeys(parts, 1.0) if sensitivity is None else _weights(form, sensitivity)
    level = None if noise is None else finite_number(noise, "noise", positive=True)
    sizes = {key: tensor.numel() for key, tensor in parts.items()}
    total = sum(sizes.values())
    unit = max(float(tensor.abs().max()) for tensor in parts.values() if tensor.numel())
    if unit == 0:
        raise InputError("vector: is all zero, so there is nothing to load")
    energy = {key: _square(tensor, unit) for key, tensor in parts.items()}
    merit = {key: math.sqrt(weights[key] * energy[key] / sizes[key]) if sizes[key] else 0.0 for key in parts}
    if not any(merit.values()):
        raise InputError("sensitivity: is 0 wherever the vector is not, so there is nothing to send")
    power = _in_proportion(merit, sizes, total) if level is None else _above_water(merit, sizes, total, level)
    mean = math.fsum(energy.values()) / total
    gains = {}
    for key in parts:
        share = power[key] * mean * sizes[key] / energy[key] if power[key] > 0 else 0.0
        gains[key] = as_told(math.sqrt(share), f"the gain of {key!r}")
    return gains


def loaded(vector: Tensors | Encoding, gains: Mapping[str, float], *, gain_bits: int = SCALE_BITS) -> Encoding:
    r"""A vector or an encoding whose tensors are sent with gains: :math:`a_k \tau_k`, divided by :math:`a_k` again.

    Where the gains are for the posterior mean (`power_loading` with `noise`), shrink what was received, as `transmit`
    gave it, before decoding: dividing by a gain and shrinking commute.

    Args:
        vector: a mapping of name -> tensor, or an `Encoding`.
        gains: name of what is sent -> a number, at least 0. At 0 zeros are sent, and 0 is what is decoded: the energy
            of the silent symbols is there for the others, because `transmit` has one scale for all of them.
        gain_bits: what telling a gain costs. 0 where the base station knows them, having made them up itself.

    Returns:
        An `Encoding` of the same names and shapes, that also pays for the gains.

    Raises:
        InputError: a negative gain, or none above 0. StateMismatchError: gains for other names. NonFiniteError: NaN or
            infinity in the vector, or a product that overflows. TypeError: other kinds.

    Source: as `power_loading`.

    Example:
        >>> import torch
        >>> code = loaded({"a": torch.ones(2), "b": torch.ones(2)}, {"a": 2.0, "b": 0.5})
        >>> code.sent, code.bits
        ({'a': tensor([2., 2.]), 'b': tensor([0.5000, 0.5000])}, 64)
        >>> code.decode(code.sent)
        {'a': tensor([1., 1.]), 'b': tensor([1., 1.])}
    """
    bits = whole_number(gain_bits, "gain_bits", at_least=0)
    form, parts = Form.of(vector.sent if isinstance(vector, Encoding) else vector)
    if not isinstance(gains, Mapping):
        raise TypeError(f"gains: expected a mapping of name -> number, got {type(gains).__name__}")
    check_keys(gains, parts, "gains", "what is sent")
    told = {key: as_told(_nonnegative(gains[key], f"gains[{key!r}]"), f"gains[{key!r}]") for key in parts}
    if not any(told.values()):
        raise InputError("gains: expected at least one above 0, got none")
    sent = {key: told[key] * tensor.to(form.dtype) for key, tensor in parts.items()}
    for key, tensor in sent.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"gains[{key!r}]: {told[key]:g} times the vector overflows {tensor.dtype}")
    before, inner = (vector.bits, vector.decoder) if isinstance(vector, Encoding) else (0, None)
    return Encoding(sent, before + bits * len(told), _Unloaded(form, told, inner))


def _weights(form: Form, sensitivity: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(sensitivity, Mapping):
        raise TypeError(f"sensitivity: expected a mapping of name -> number, got {type(sensitivity).__name__}")
    owned = {key: form.names_of(key) for key in form.stream.keys}
    check_keys(sensitivity, [name for names in owned.values() for name in names], "sensitivity", "the vector")
    numbers = {name: _nonnegative(value, f"sensitivity[{name!r}]") for name, value in sensitivity.items()}
    return {key: math.fsum(numbers[name] for name in names) for key, names in owned.items()}


def _nonnegative(value: object, argument: str) -> float:
    number = finite_number(value, argument)
    if number < 0:
        raise InputError(f"{argument}: expected a number of at least 0, got {number:g}")
    return number


def _square(tensor: Tensor, unit: float) -> float:
    scaled = wide(tensor) / unit
    return inner_product(scaled, scaled)


def _in_proportion(merit: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, float]:
    whole = math.fsum(sizes[key] * value for key, value in merit.items())
    return {key: value / whole * total for key, value in merit.items()}


def _above_water(merit: Mapping[str, float], sizes: Mapping[str, int], total: int, noise: float) -> dict[str, float]:
    """Take in tensors from the best on, as long as the next is above the water that the ones before leave."""
    entries, weight, slope = 0, 0.0, math.inf
    for key in sorted(merit, key=lambda key: -merit[key]):
        if merit[key] * slope <= noise:
            break
        entries += sizes[key]
        weight += sizes[key] * merit[key]
        slope = (total + noise * entries) / weight
    return {key: max(0.0, slope * value - noise) for key, value in merit.items()}
