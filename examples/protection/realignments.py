"""Ways to realign a model on the few pictures: what is trained, how long, and what it is pulled to."""

from __future__ import annotations

from torch import nn

from rmtllmf.resilience import (
    normalization_keys,
    realign,
    realign_heads,
    realign_lora,
    shrink,
    steps_by_cross_validation,
)
from rmtllmf.taskvec import heuristic_scale

from .conditions import Heard
from .stage import Stage

# Learning rates of what is few or large, in units of that of all parameters: those with which the loss on the few
# pictures themselves (of seed 0, under the sum-rate attack) falls in as many steps, without a look at test pictures.
LORA, NORMALISATIONS, HEADS = 10.0, 30.0, 100.0
FOLDS, EVERY = 3, 10  # of the cross-validation: more would take longer than all the rest


def everything(stage: Stage, model: nn.Module, heard: Heard | None = None) -> nn.Module:
    """All parameters, as many steps as the paper takes."""
    with stage.realignment() as options:
        realign(model, stage.shots(), **options)
    return model


def anchored(stage: Stage, model: nn.Module, heard: Heard) -> nn.Module:
    """All parameters, pulled to the shrunken estimate that the model is, with the precision that this has."""
    shots = stage.shots()
    count = sum(len(batches.dataset) for _, batches in shots.values())
    weights = {name: 1 / (count * max(v, 1e-30)) for name, v in posterior_variance(heard).items()}
    with stage.realignment() as options:
        realign(model, shots, anchor="start", anchor_weight=weights, **options)
    return model


def posterior_variance(heard: Heard) -> dict[str, float]:
    """Of the entries of a fused estimate by `shrink`, tensor by tensor, as if users' errors were independent.

    A posterior mean f r of what was received as r = s + n leaves the error variance f (1 - f) E[r^2], which is the mean
    of its product with what it takes away.
    """
    estimates = shrink(heard.vectors, heard.reception, scale=heard.scale)
    scale = heuristic_scale(len(estimates))
    return {
        name: scale**2
        * sum(
            float((found[name].double() * (given[name] - found[name]).double()).mean())
            for found, given in zip(estimates, heard.vectors, strict=True)
        )
        for name in estimates[0]
    }


def lora(stage: Stage, model: nn.Module, heard: Heard) -> nn.Module:
    """Low-rank updates of the matrices."""
    with stage.realignment(faster=LORA) as options:
        realign_lora(model, stage.shots(), seed=stage.seed, **options)
    return model


def normalisations(stage: Stage, model: nn.Module, heard: Heard) -> nn.Module:
    """Nothing but scales and shifts of LayerNorms."""
    with stage.realignment(faster=NORMALISATIONS) as options:
        realign(model, stage.shots(), trainable=normalization_keys(model), **options)
    return model


def stopped(stage: Stage, model: nn.Module, heard: Heard) -> nn.Module:
    """All parameters, as many of the paper's steps as predict pictures best that were left out."""
    with stage.realignment() as options:
        chosen = steps_by_cross_validation(
            model, stage.shots(), seed=stage.seed, folds=FOLDS, every=EVERY, **options
        ).steps
    with stage.realignment() as options:
        realign(model, stage.shots(), **options | {"steps": chosen, "schedule_steps": options["steps"]})
    return model


def new_heads(stage: Stage, model: nn.Module) -> dict[str, nn.Module]:
    """The tasks' heads, trained on the features of a model that stays as it is."""
    with stage.realignment(faster=HEADS) as options:
        heads, _ = realign_heads(model, stage.shots(), trainable="*", **options)  # they are frozen as they come
    return heads
