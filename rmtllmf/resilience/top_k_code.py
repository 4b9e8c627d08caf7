"""Send the largest entries of a task vector, and pay for telling which they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._state import Tensors, finite_number
from ..errors import InputError
from ..taskvec.rules._shares import how_many
from ._form import Form
from .coding import Encoding

__all__ = ["top_k_code"]

Per = Literal["vector", "tensor"]

_EXACT = 4096  # entries up to which the binomial coefficient is calculated as a whole number


@dataclass(frozen=True, eq=False)
class _Positions:
    """Puts values back: for each sent tensor the names that it runs through, and the positions in all of them."""

    form: Form
    groups: Mapping[str, list[str]]
    positions: Mapping[str, Tensor]

    def __call__(self, received: Tensors) -> Any:
        parts: dict[str, Tensor] = {}
        for name, keys in self.groups.items():
            sizes = [self.form.template(key).numel() for key in keys]
            flat = torch.zeros(sum(sizes), dtype=self.form.dtype, device=received[name].device)
            flat[self.positions[name].to(flat.device)] = received[name].to(flat.dtype)
            parts |= dict(zip(keys, flat.split(sizes), strict=True))
        return self.form.filled(parts)


def top_k_code(vector: Tensors, density: float, *, per: Per = "vector") -> Encoding:
    r"""The k entries of largest magnitude of n, and :math:`\lceil \log_2 \binom{n}{k} \rceil` bits for where they are.

    .. math:: x = (\tau_j)_{j \in T}, \quad |T| = k, \quad
              E\|\hat\tau - \tau\|^2 = \sum_{j \notin T} \tau_j^2 + k \sigma^2
              = \Bigl(1 - e + \frac{\mu}{K} e\Bigr) \|\tau\|^2

    where e is the share of the energy that the k largest have, and the last form is for K averaged copies of entries in
    units of their rms, errors of variance :math:`\mu` (`repeated_mse`). The whole vector costs :math:`\mu`.

    Positions cost more than it seems: at a density of 1 %, 8 bits an entry that is sent. They have to be right, so they
    are bits of a reliable code; `channel_uses` and `repetitions` count them, at what a channel use carries.

    Args:
        vector: a mapping of name -> tensor.
        density: the share of entries that is sent, in (0, 1]: ``max(1, floor(density n))`` of them. Of those that equal
            the smallest magnitude sent, the first in the flat order of the sorted names.
        per: "vector": the largest of the whole vector, sent as one tensor "values"; "tensor": of each tensor, under its
            name.

    Returns:
        An `Encoding`: values in the order of their positions, of the same shapes for all users.

    Raises:
        InputError: a `density` outside (0, 1], an unknown `per`, or no floating entries. NonFiniteError: NaN or
            infinity. TypeError: no mapping.

    Source: S. Stich et al., "Sparsified SGD with memory", 2018; T. Cover, "Enumerative source encoding", 1973, for the
    bits.

    Example:
        >>> import torch
        >>> code = top_k_code({"a": torch.tensor([0.1, -4.0]), "b": torch.tensor([2.0, 0.0])}, density=0.5)
        >>> code.sent["values"], code.bits  # ceil(log2 6)
        (tensor([-4.,  2.]), 3)
        >>> code.decode(code.sent)
        {'a': tensor([ 0., -4.]), 'b': tensor([2., 0.])}
    """
    share = finite_number(density, "density")
    if not 0 < share <= 1:
        raise InputError(f"density: expected a share in (0, 1], where 1 sends all, got {share:g}")
    if per not in get_args(Per):
        raise InputError(f"per: expected 'vector' or 'tensor', got {per!r}")
    form, parts = Form.of(vector)
    keys = [key for key, tensor in parts.items() if tensor.numel()]
    groups = {"values": keys} if per == "vector" else {key: [key] for key in keys}
    sent, positions, bits = {}, {}, 0
    for name, group in groups.items():
        device = parts[group[0]].device
        flat = torch.cat([parts[key].reshape(-1).to(device, form.dtype) for key in group])
        count = how_many(share, len(flat))
        positions[name] = _largest(flat.abs(), count)
        sent[name] = flat[positions[name]]
        bits += position_bits(len(flat), count)
    return Encoding(sent, bits, _Positions(form, groups, positions))


def position_bits(n: int, k: int) -> int:
    """The whole bits that tell which k of n: the logarithm of the binomial coefficient, rounded up."""
    if n <= _EXACT:
        return (math.comb(n, k) - 1).bit_length()
    nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.ceil(max(0.0, nats) / math.log(2))


def _largest(magnitude: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest, ascending; of equal ones the first."""
    if count == len(magnitude):
        return torch.arange(count, device=magnitude.device)
    threshold = magnitude.kthvalue(len(magnitude) - count + 1).values
    above = magnitude > threshold
    equal = (magnitude == threshold).nonzero().flatten()
    above[equal[: count - int(above.sum())]] = True
    return above.nonzero().flatten()
