"""The uplinks of the experiment: who hears what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rmtllmf.channel import (
    Reception,
    UplinkScenario,
    barrage_covariance,
    lmmse,
    repeat_block,
    sic,
    strongest_user_covariance,
    transmit,
    worst_case_covariance,
)
from rmtllmf.metrics import cosine_similarity, snr_db
from rmtllmf.taskvec import TaskVector

from .protocol import Protocol


def reception(protocol: Protocol, condition: str, seed: int, *, times: int = 1) -> Reception:
    """How the users are received: the same draw of the uplink for every condition.

    Every symbol is sent `times` times in its block, and combined.
    """
    up = UplinkScenario(num_users=len(protocol.tasks), num_antennas=protocol.antennas).draw(protocol.blocks, seed=seed)
    power, thermal = protocol.jamming * up.noise, up.noise_covariance
    jammers = {
        "ideal": lambda: torch.zeros_like(thermal),
        "strongest_user": lambda: strongest_user_covariance(up.H, up.P, power),
        "sum_rate": lambda: worst_case_covariance(up.H, up.P, power, noise=up.noise),
        "barrage": lambda: barrage_covariance(up.H, power),
    }
    noise = jammers[condition]() + thermal
    H, believed = up.H, None if protocol.knows_jammer else thermal
    if times > 1:
        H, noise, thermal = repeat_block(H, noise, times, thermal)
        believed = None if believed is None else thermal
    if protocol.receiver == "lmmse":
        return lmmse(H, up.P, noise, designed_for=believed)
    return sic(H, up.P, noise, designed_for=believed, order=protocol.order)


def received(protocol: Protocol, vectors: Sequence[TaskVector], heard: Reception, seed: int) -> list[TaskVector]:
    """What the base station holds of the task vectors."""
    scale = protocol.reference if protocol.reference in ("rms", "peak") else reference_of(protocol, vectors)
    return transmit(vectors, heard, seed=seed, estimator=protocol.estimator, scale=scale)


def reference_of(protocol: Protocol, vectors: Sequence[TaskVector]) -> float:
    """What a symbol of unit variance stands for, if the protocol gives it as a number of times the vectors' rms."""
    rms = [vector.norm() / sum(tensor.numel() for tensor in vector.values()) ** 0.5 for vector in vectors]
    return float(protocol.reference) * sum(rms) / len(rms)


def facts(
    sent: Sequence[TaskVector], heard: Sequence[TaskVector], mse: Sequence[float], restored: Sequence[str]
) -> dict[str, Any]:
    """Numbers about an uplink: mean squared errors, parameter-domain SNRs, and cosines between the vectors."""
    rest = [name for name in sent[0] if name not in set(restored)]
    return {
        "mse": list(mse),
        "snr_db": [snr_db(before, after) for before, after in zip(sent, heard, strict=True)],
        "cosine_sent": cosine_similarity(sent).tolist(),
        "cosine": cosine_similarity(heard).tolist(),
        "cosine_without_restored": cosine_similarity([vector.select(rest) for vector in heard]).tolist(),
    }
