"""What senders send in place of their vectors, over the same channel uses: fewer numbers, each of them more often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paper.uplink import reception
from rmtllmf.channel import Reception
from rmtllmf.resilience import (
    Encoding,
    embedding_keys,
    factors_code,
    joint_shrink,
    loaded,
    low_rank_code,
    power_loading,
    reliable_bits,
    repetitions,
    sign_code,
    soft_signs,
    squared_gradients,
    top_k_code,
)
from rmtllmf.taskvec import TaskVector, low_rank

from .conditions import Heard, link
from .stage import Stage

TIMES = 8  # as often the numbers of a code are sent, where that can be chosen
ADAPTER_RANK = 4  # of every matrix


@dataclass(frozen=True)
class Code:
    """A code for all users, and how the base station reads it.

    Attributes:
        encode: from a stage and the uplink to an encoding for each user, all of the same shapes.
        estimate: from the encodings and what was heard of their numbers to vectors.
    """

    encode: Callable[[Stage, Reception], list[Encoding]]
    estimate: Callable[[Sequence[Encoding], Heard], list[Any]]

    def heard(self, stage: Stage, condition: str, *, scaled: str, aware: bool) -> Heard:
        """Vectors as the base station reads them: what is told costs channel uses too, the rest is repetition."""
        channel = reception(replace(stage.protocol, knows_jammer=aware), condition, stage.seed)
        codes = self.encode(stage, channel)
        times = min(repeated(code, whole, channel) for code, whole in zip(codes, stage.sent, strict=True))
        if times < 1:
            raise ValueError(f"{condition}: the code does not fit into the channel uses of the vectors")
        numbers = [code.sent for code in codes]
        heard = link(stage.protocol, numbers, condition, stage.seed, scaled=scaled, aware=aware, times=times)
        found = self.estimate(codes, heard)
        return replace(heard, vectors=[completed(vector, stage.sent[0]) for vector in found])


def repeated(code: Encoding, whole: TaskVector, channel: Reception) -> int:
    """As often as a code's numbers fit into the channel uses of a vector; bits at the worst channel use's capacity."""
    return repetitions(code, whole, bits_per_use=reliable_bits(channel))


def completed(vector: Any, whole: TaskVector) -> TaskVector:
    """With zeros for what was not sent."""
    return TaskVector({name: vector.get(name, torch.zeros_like(tensor)) for name, tensor in whole.items()})


def matrices(stage: Stage) -> list[str]:
    """What all codes send: fine-tuning moves only these on the testbed, and embeddings would be restored anyway."""
    kept = set(embedding_keys(stage.world.base))
    return [name for name, tensor in stage.sent[0].items() if tensor.ndim == 2 and name not in kept]


def sent_matrices(stage: Stage) -> list[TaskVector]:
    """The part of the vectors that codes send."""
    return [vector.select(matrices(stage)) for vector in stage.sent]


def shrunk(codes: Sequence[Encoding], heard: Heard) -> list[Any]:
    """Posterior means of the numbers, decoded."""
    better = joint_shrink(heard.vectors, heard.reception, scale=heard.scale)
    return [code.decode(numbers) for code, numbers in zip(codes, better, strict=True)]


def decided(codes: Sequence[Encoding], heard: Heard) -> list[Any]:
    """Posterior means of signs."""
    return soft_signs(codes, heard.vectors, heard.reception, scale=heard.scale)


def low_ranks(stage: Stage, channel: Reception) -> list[Encoding]:
    """Ranks in proportion to the matrices' sizes."""
    return [low_rank_code(vector, ratio=1 / TIMES, only=matrices(stage)) for vector in stage.sent]


def adapters(stage: Stage, channel: Reception) -> list[Encoding]:
    """Factors of one rank for every matrix, as LoRA adapters have.

    The testbed's models are fine-tuned as a whole, so these are the best such factors of the finished updates: what an
    adapter trained for the task would be at best, in these terms.
    """
    found = []
    for vector in sent_matrices(stage):
        factors = low_rank(vector, rank=ADAPTER_RANK, names=list(vector))
        found.append(factors_code({name: (factors.B[name], factors.A[name]) for name in vector}))
    return found


def largest(stage: Stage, channel: Reception) -> list[Encoding]:
    """The largest entries: as many as can be sent so many times when their positions are paid."""
    whole, vectors = stage.sent, sent_matrices(stage)
    low, high = 0.0, 1 / TIMES
    for _ in range(12):
        density = (low + high) / 2
        fits = repeated(top_k_code(vectors[0], density), whole[0], channel) >= TIMES
        low, high = (density, high) if fits else (low, density)
    return [top_k_code(vector, low) for vector in vectors]


def signs(stage: Stage, channel: Reception) -> list[Encoding]:
    """The signs, and a scale for each matrix."""
    return [sign_code(vector) for vector in sent_matrices(stage)]


def unequal(stage: Stage, channel: Reception) -> list[Encoding]:
    """All numbers, those of matrices that outputs depend on with more power; gains are told."""
    noise = float(channel.mse.mean()) * float(stage.protocol.reference) ** 2  # beside numbers of mean square 1
    sensitivity = output_sensitivity(stage)
    found = []
    for vector in sent_matrices(stage):
        gains = power_loading(vector, {name: sensitivity[name] for name in vector}, noise=noise)
        found.append(loaded(vector, gains))
    return found


def output_sensitivity(stage: Stage) -> dict[str, float]:
    """Mean squared derivatives of the base model's outputs on random pictures, which everybody can calculate."""
    pictures = stage.noise[0]
    with torch.no_grad():
        width = stage.world.base(pictures[:1]).shape[1]
    source = torch.Generator().manual_seed(stage.seed)
    directions = torch.randn(len(pictures), width, generator=source)

    def along(outputs: Tensor, direction: Tensor) -> Tensor:
        return (outputs * direction).sum()

    return squared_gradients(stage.world.base, [(pictures, directions)], loss=along)


LOW_RANK = Code(low_ranks, shrunk)
ADAPTERS = Code(adapters, shrunk)
TOP_K = Code(largest, shrunk)
SIGNS = Code(signs, decided)
LOADED = Code(unequal, shrunk)
