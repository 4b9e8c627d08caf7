"""What the base station holds: white noise at the paper's signal-to-noise ratios, or the whole link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from paper.protocol import Protocol
from paper.uplink import reception, reference_of
from rmtllmf.channel import transmit
from rmtllmf.taskvec import TaskVector

BLACK_BOX = {"ideal": -16.2, "strongest_user": -21.7, "sum_rate": -27.3}
"""The paper's signal-to-noise ratios of received parameters, in dB: nothing about sender or receiver can be changed."""

KINDS = ("black_box", "link")


@dataclass(frozen=True)
class Heard:
    """Received vectors, and what is known about them: the arguments of the library's estimators."""

    vectors: list[Any]
    reception: Any
    scale: Any


def black_box(sent: Sequence[TaskVector], condition: str, seed: int) -> Heard:
    """White noise of independent users."""
    mse = torch.full((len(sent),), 10 ** (-BLACK_BOX[condition] / 10), dtype=torch.float64)
    return Heard(transmit(sent, mse, seed=1000 + seed), mse, "rms")


def link(
    protocol: Protocol, sent: Sequence[Any], condition: str, seed: int, *, scaled: str, aware: bool, times: int = 1
) -> Heard:
    """The uplink of the paper's experiment, with symbols `scaled` by "peak" or "rms", to a receiver that is `aware`.

    "tensor_rms": every tensor by its own rms. Every symbol is sent `times` times in its block, and combined.
    """
    channel = reception(replace(protocol, knows_jammer=aware), condition, seed, times=times)
    scale = reference_of(protocol, [TaskVector(vector) for vector in sent]) if scaled == "peak" else scaled
    return Heard(transmit(sent, channel, seed=seed, scale=scale), channel, scale)
