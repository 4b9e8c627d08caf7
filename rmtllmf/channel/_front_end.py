"""The receiver in front of the decisions: filters, cancellation, and symbols that come out one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._arrays import Array, ArrayLike, Inputs
from ..errors import InputError
from ._filters import warn_floorless
from .rate import received
from .receivers import decoding_order, designed_filters

RECEIVERS = ("sic", "lmmse")
CANCELLATIONS = ("genie", "real")

Decide = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class FrontEnd:
    """One block of the channel: ``x = leak s + spread n`` are all filter outputs before anything is cancelled."""

    leak: Tensor  # (Q, Q) complex128: W^H B
    spread: Tensor  # (Q, r) complex128: n is white and of unit power, r = min(Q, N_R)
    gain: Tensor  # (Q,) float64
    noise: Tensor  # (Q,) float64, error power of the unbiased estimate as the receiver believes it to be
    order: list[int] | None  # first decoded first; None: nothing is cancelled

    def to(self, device: torch.device) -> FrontEnd:
        """On the device of the symbols."""
        leak, spread, gain, noise = (part.to(device) for part in (self.leak, self.spread, self.gain, self.noise))
        return FrontEnd(leak, spread, gain, noise, self.order)

    def receive(self, sent: Tensor, white: Tensor, decide: Decide | None) -> Tensor:
        """Unbiased estimates (Q, n) of the symbols `sent`; `decide` gives what is cancelled, None: the truth."""
        leak, spread = self.leak.to(sent.dtype), self.spread.to(sent.dtype)
        outputs = leak @ sent + spread @ white
        gain = self.gain.to(sent.real.dtype)
        if self.order is None:
            return outputs / gain[:, None]
        estimates = torch.empty_like(outputs)
        for step, q in enumerate(self.order):
            estimates[q] = outputs[q] / gain[q]
            later = self.order[step + 1 :]
            if later:
                known = sent[q] if decide is None else decide(q, estimates[q])
                outputs[later] -= leak[later, q, None] * known
        return estimates


def front_ends(
    H: Array, P: ArrayLike, C: Array, designed_for: Array | None, order: str | Array, receiver: str, users: int
) -> list[FrontEnd]:
    """One for each fading block: `H` (N_R, Q) or (blocks, N_R, Q)."""
    if receiver not in RECEIVERS:
        raise InputError(f"receiver: expected one of {', '.join(map(repr, RECEIVERS))}, got {receiver!r}")
    inputs = Inputs.of(H, "H", P, C, designed_for)
    link = received(inputs, H, P, C)
    B = link.B
    if B.shape[-1] != users:
        raise InputError(f"H: has {B.shape[-1]} users, but there are {users} vectors")
    sequence = decoding_order(inputs, order, link.strength) if receiver == "sic" else None
    F, W, floorless = designed_filters(inputs, link, designed_for, sequence)
    if floorless:
        warn_floorless()
    believed = torch.diagonal(F, dim1=-2, dim2=-1).real
    gain = (B.conj() * W).sum(-2).real
    if bool((gain <= 0).any()):
        raise InputError("P: a silent user cannot be received; leave it out")
    leak = W.mH @ B
    values, vectors = torch.linalg.eigh(link.noise)
    root = vectors * values.clamp_min(0.0).sqrt()[..., None, :]
    spread = W.mH @ root
    if spread.shape[-2] < spread.shape[-1]:  # fewer users than antennas: the same covariance from fewer numbers
        spread = torch.linalg.qr(spread.mH).R.mH
    batch = torch.broadcast_shapes(leak.shape[:-2], spread.shape[:-2])
    if len(batch) > 1:
        raise InputError(
            f"H: expected at most one leading dimension, of fading blocks, got {tuple(batch)} with P and C"
        )
    orders = None if sequence is None else sequence.expand(*batch, users).reshape(-1, users).tolist()
    leak = leak.expand(*batch, *leak.shape[-2:]).reshape(-1, *leak.shape[-2:])
    spread = spread.expand(*batch, *spread.shape[-2:]).reshape(-1, *spread.shape[-2:])
    gain, believed = (part.expand(*batch, users).reshape(-1, users) for part in (gain, believed / gain))
    return [
        FrontEnd(leak[b], spread[b], gain[b], believed[b], None if orders is None else orders[b])
        for b in range(len(leak))
    ]
