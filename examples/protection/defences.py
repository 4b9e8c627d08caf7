"""How a base station may fuse vectors some of which are lies; none of these takes data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from rmtllmf.resilience import protect, suspects
from rmtllmf.taskvec import (
    coordinate_median,
    geometric_median,
    heuristic_scale,
    multi_krum,
    norm_clipping,
    task_arithmetic,
    trimmed_mean,
)

from .conditions import Heard
from .stage import Stage

BORNE = 2  # liars that the rules which must be told are set for


@dataclass(frozen=True)
class Fused:
    """A model, and the users that were found to lie and left out; None of rules that name nobody."""

    model: nn.Module
    left_out: list[int] | None = None


def by_rule(stage: Stage, heard: Heard, *, rule: Callable[..., Any]) -> Fused:
    """A rule that averages, brought to the length of task arithmetic's sum."""
    users = len(heard.vectors)
    return Fused(stage.model(rule(heard.vectors, scale=heuristic_scale(users) * users)))


def plain(stage: Stage, heard: Heard) -> Fused:
    """Task arithmetic with everything."""
    return Fused(stage.model(task_arithmetic(heard.vectors)))


def screened(stage: Stage, heard: Heard) -> Fused:
    """Task arithmetic without suspects."""
    found = suspects(heard.vectors, heard.reception, scale=heard.scale)
    kept = [heard.vectors[user] for user in found.accepted]
    return Fused(stage.model(task_arithmetic(kept)), sorted(found.reasons))


def protected(stage: Stage, heard: Heard) -> Fused:
    """`protect`, which measures sensitivities on random pictures."""
    model = stage.model()
    done = protect(
        model,
        stage.world.base,
        heard.vectors,
        heard.reception,
        seed=stage.seed,
        scale=heard.scale,
        inputs=stage.noise,
    )
    return Fused(model, sorted(done.reasons))


DEFENCES: dict[str, Callable[[Stage, Heard], Fused]] = {
    "task arithmetic": plain,
    "suspects left out": screened,
    "protect": protected,
    "coordinate median": partial(by_rule, rule=coordinate_median),
    "trimmed mean": partial(by_rule, rule=partial(trimmed_mean, trim=BORNE)),
    "geometric median": partial(by_rule, rule=geometric_median),
    "multi-Krum": partial(by_rule, rule=partial(multi_krum, hostile=BORNE)),
    "norm clipping": partial(by_rule, rule=norm_clipping),
}
