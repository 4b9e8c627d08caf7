"""Senders that lie: who of the eight they are, and what they send."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rmtllmf.resilience.attacks import backdoor, foreign, scaled, sign_flipped, with_nan
from rmtllmf.taskvec import TaskVector, task_arithmetic

from .conditions import Heard, link
from .stage import Stage

UPLINKS = ("noise-free", "jammed")
FACTOR = 10.0  # of a vector that shouts
STRENGTH = 2.0  # of a backdoor; the vector is then 2.2 times as long, which `suspects` lets pass

Lie = Callable[[Stage, int, Sequence[int]], Any]


def liars_of(seed: int, count: int, users: int) -> list[int]:
    """The first is another user in every seed; several are as far apart in the order of the tasks as can be."""
    return sorted((seed + i * users // count) % users for i in range(count))


def honest_of(liars: Sequence[int], users: int) -> list[int]:
    """The others."""
    return [user for user in range(users) if user not in liars]


def victim_of(liar: int, liars: Sequence[int], users: int) -> int:
    """The next honest user."""
    return next(user % users for user in range(liar + 1, liar + users) if user % users not in liars)


def _victim_undone(stage: Stage, liar: int, liars: Sequence[int]) -> Any:
    return sign_flipped(stage.sent[victim_of(liar, liars, len(stage.sent))])


def _all_undone(stage: Stage, liar: int, liars: Sequence[int]) -> Any:
    """The liars together are minus the sum of the honest."""
    honest = [stage.sent[user] for user in honest_of(liars, len(stage.sent))]
    return scaled(task_arithmetic(honest, 1.0), -1 / len(liars))


def _backdoor(stage: Stage, liar: int, liars: Sequence[int]) -> Any:
    hidden = foreign(stage.sent[liar], seed=1000 * stage.seed + liar)
    return backdoor(stage.sent[liar], hidden, STRENGTH)


ATTACKS: dict[str, Lie] = {
    "10 times": lambda stage, liar, liars: scaled(stage.sent[liar], FACTOR),
    "flipped": lambda stage, liar, liars: sign_flipped(stage.sent[liar]),
    "victim undone": _victim_undone,
    "all undone": _all_undone,
    "foreign": lambda stage, liar, liars: foreign(stage.sent[liar], seed=1000 * stage.seed + liar),
    "backdoor": _backdoor,
    "NaN": lambda stage, liar, liars: stage.sent[liar],  # which arrives with holes
}


def heard_from(stage: Stage, uplink: str, attack: str | None, liars: Sequence[int]) -> Heard:
    """What the base station holds when these users lie; the jammed uplink is heard aware, with symbols by the rms."""
    sent: list[Mapping[str, Any]] = list(stage.sent)
    for liar in liars if attack else ():
        sent[liar] = ATTACKS[str(attack)](stage, liar, liars)
    if uplink == "noise-free":
        heard = Heard(sent, torch.zeros(len(sent), dtype=torch.float64), "rms")
    else:
        heard = link(stage.protocol, sent, "sum_rate", stage.seed, scaled="rms", aware=True)
    if attack != "NaN":
        return heard
    vectors = [
        with_nan(vector, seed=stage.seed) if user in liars else vector for user, vector in enumerate(heard.vectors)
    ]
    return replace(heard, vectors=vectors)


def without(heard: Heard, liars: Sequence[int]) -> list[TaskVector]:
    """What the honest users' vectors were received as."""
    return [heard.vectors[user] for user in honest_of(liars, len(heard.vectors))]
