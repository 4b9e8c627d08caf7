"""The methods that are compared: each makes a model of what was received."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from rmtllmf.resilience import (
    embedding_keys,
    harmful_keys,
    joint_shrink,
    measured_sensitivity,
    mse_optimal_weights,
    protect,
    resilient_fusion,
    restore,
    shrink,
    spectral_shrink,
)
from rmtllmf.taskvec import heuristic_scale, task_arithmetic

from .codes import ADAPTERS, LOADED, LOW_RANK, SIGNS, TOP_K, Code
from .conditions import KINDS, Heard, black_box, link
from .realignments import anchored, everything, lora, new_heads, normalisations, stopped
from .stage import Stage


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        make: a model from a stage and what was heard.
        heads: new heads for that model; None: the tasks' own.
        data: whether it takes the labelled pictures.
        kinds: of conditions that it is for.
        scaled, aware: of the whole link; see `link`.
        code: what is sent in place of the vectors; None: the vectors.
    """

    make: Callable[[Stage, Heard], nn.Module]
    heads: Callable[[Stage, nn.Module], dict[str, nn.Module]] | None = None
    data: bool = False
    kinds: tuple[str, ...] = KINDS
    scaled: str = "peak"
    aware: bool = False
    code: Code | None = None

    def heard(self, stage: Stage, kind: str, condition: str) -> Heard:
        """What the base station holds."""
        if kind == "black_box":
            return black_box(stage.sent, condition, stage.seed)
        if self.code:
            return self.code.heard(stage, condition, scaled=self.scaled, aware=self.aware)
        return link(stage.protocol, stage.sent, condition, stage.seed, scaled=self.scaled, aware=self.aware)

    def accuracies(self, stage: Stage, kind: str, condition: str) -> dict[str, float]:
        """Of the model that it makes, on every task."""
        model = self.make(stage, self.heard(stage, kind, condition))
        return stage.accuracies(model, self.heads(stage, model) if self.heads else None)


def unprotected(stage: Stage, heard: Heard) -> nn.Module:
    """Task arithmetic with what was received."""
    return stage.model(task_arithmetic(heard.vectors))


def papers(stage: Stage, heard: Heard) -> nn.Module:
    """R-MTLLMF: embeddings restored and frozen, the rest realigned."""
    model = stage.model()
    frozen = sorted(embedding_keys(model))
    with stage.realignment() as options:
        resilient_fusion(model, stage.world.base, heard.vectors, stage.shots(), frozen=frozen, **options)
    return model


def estimated(stage: Stage, heard: Heard, *, by: Callable[..., list[Any]], measured: bool = False) -> nn.Module:
    """Task arithmetic with estimates of what was sent; no data (`measured`: on random pictures)."""
    known = {}
    if measured:
        found = measured_sensitivity(
            stage.world.base, heard.vectors, heard.reception, stage.noise, seed=stage.seed, scale=heard.scale
        )
        known = {"sensitivity": found.lower}
    return stage.model(task_arithmetic(by(heard.vectors, heard.reception, scale=heard.scale, **known)))


def weighted(stage: Stage, heard: Heard) -> nn.Module:
    """Task arithmetic with the weights that make the squared error of the sum least; no data."""
    weights = mse_optimal_weights(heard.vectors, heard.reception, scale=heard.scale)
    scale = heuristic_scale(len(heard.vectors))
    return stage.model(task_arithmetic(heard.vectors, scale, weights=[float(weight) for weight in weights]))


def restored(stage: Stage, heard: Heard) -> nn.Module:
    """Task arithmetic, and the base model's embeddings; no data."""
    model = unprotected(stage, heard)
    model.load_state_dict(restore(model, stage.world.base, sorted(embedding_keys(model))))
    return model


def harmless(stage: Stage, heard: Heard) -> nn.Module:
    """Task arithmetic, and what noise harms from the base model, as measured on random pictures; no data."""
    model = unprotected(stage, heard)
    found = measured_sensitivity(
        stage.world.base, heard.vectors, heard.reception, stage.noise, seed=stage.seed, scale=heard.scale
    )
    keys = harmful_keys(heard.vectors, heard.reception, scale=heard.scale, sensitivity=found.lower)
    if keys:
        model.load_state_dict(restore(model, stage.world.base, keys))
    return model


def realigned(
    stage: Stage,
    heard: Heard,
    *,
    make: Callable[[Stage, Heard], nn.Module],
    by: Callable[[Stage, nn.Module, Heard], nn.Module] = everything,
) -> nn.Module:
    """Another method's model after realignment."""
    return by(stage, make(stage, heard), heard)


def protected(stage: Stage, heard: Heard, *, data: bool) -> nn.Module:
    """`protect`, with the few labelled pictures or with random ones."""
    model = stage.model()
    with stage.realignment() as options:
        protect(
            model,
            stage.world.base,
            heard.vectors,
            heard.reception,
            stage.shots(seen=False) if data else None,
            seed=stage.seed,
            scale=heard.scale,
            inputs=None if data else stage.noise,
            **options,
        )
    return model


BOUNDS: dict[str, Callable[[Stage], nn.Module]] = {
    "base": lambda stage: stage.model(),
    "base realigned": lambda stage: everything(stage, stage.model()),
    "clean": lambda stage: stage.model(task_arithmetic(stage.sent)),
    "clean realigned": lambda stage: everything(stage, stage.model(task_arithmetic(stage.sent))),
}
"""Methods that need no uplink."""

_estimate = partial(estimated, by=shrink)
_better: dict[str, Any] = {"kinds": ("link",), "scaled": "rms"}
_coded: dict[str, Any] = {"make": unprotected, "kinds": ("link",)}
MAIN: dict[str, Method] = {
    "unprotected": Method(unprotected),
    "R-MTLLMF": Method(papers, data=True),
    "shrink": Method(_estimate),
    "shrink, measured": Method(partial(estimated, by=shrink, measured=True)),
    "joint_shrink": Method(partial(estimated, by=joint_shrink), kinds=("link",)),
    "spectral_shrink": Method(partial(estimated, by=spectral_shrink)),
    "weights": Method(weighted),
    "protect": Method(partial(protected, data=False)),
    "shrink, realigned": Method(partial(realigned, make=_estimate), data=True),
    "protect, 10 shots": Method(partial(protected, data=True), data=True),
    "aware": Method(unprotected, kinds=("link",), aware=True),
    "restored": Method(restored),
    "realigned": Method(partial(realigned, make=unprotected), data=True),
    "harmful restored": Method(harmless),
    "rms": Method(unprotected, **_better),
    "rms, aware": Method(unprotected, aware=True, **_better),
    "rms, aware, protect": Method(partial(protected, data=False), aware=True, **_better),
    "rms, aware, protect, 10 shots": Method(partial(protected, data=True), data=True, aware=True, **_better),
}
"""In the order of the table; from "aware" on receiver and sender do better too, where it is said."""

REALIGNMENTS: dict[str, Method] = {
    "shrink, anchored": Method(partial(realigned, make=_estimate, by=anchored), data=True),
    "shrink, stopped early": Method(partial(realigned, make=_estimate, by=stopped), data=True),
    "shrink, LoRA": Method(partial(realigned, make=_estimate, by=lora), data=True),
    "shrink, normalisations": Method(partial(realigned, make=_estimate, by=normalisations), data=True),
    "shrink, heads": Method(_estimate, heads=new_heads, data=True),
}
"""Other realignments of the same estimate as that of "shrink, realigned"."""

CODES: dict[str, Method] = {
    "low rank": Method(code=LOW_RANK, **_coded),
    "adapters": Method(code=ADAPTERS, **_coded),
    "top-k": Method(code=TOP_K, **_coded),
    "signs": Method(code=SIGNS, **_coded),
    # Signs scaled matrix by matrix all have the modulus 1, so that their peak is their rms whatever a vector's is.
    "signs, one modulus": Method(code=SIGNS, scaled="tensor_rms", **_coded),
    "power loading": Method(code=LOADED, **_coded),
}
"""What senders may send in place of the vectors, at equal channel uses."""

METHODS = MAIN | REALIGNMENTS | CODES
