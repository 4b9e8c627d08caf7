"""What iterative rules find: what every tensor of every vector is multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..._display import counted, course, spread
from ..._state import Tensors
from .._options import FusionOptions
from ..rules.arithmetic import task_arithmetic
from ..vector import TaskVector

__all__ = ["LearnedWeights"]


@dataclass(frozen=True)
class LearnedWeights:
    """Weights of task vectors that were learned from data.

    Attributes:
        weights: name -> a number for each vector, for the option `weights` of any linear rule.
        losses: the mean loss over the tasks before each step, one number a step.
        gaps: of Frank-Wolfe merging, before each step: the linear model of the loss promises no more than this; empty
            for other rules.

    Example:
        >>> import torch
        >>> from rmtllmf.taskvec import task_arithmetic
        >>> found = LearnedWeights({"w": (0.5, 0.25)}, losses=(0.7, 0.6))
        >>> dict(task_arithmetic([{"w": torch.ones(1)}, {"w": torch.ones(1)}], 1.0, weights=found.weights))
        {'w': tensor([0.7500])}
    """

    weights: Mapping[str, tuple[float, ...]]
    losses: tuple[float, ...]
    gaps: tuple[float, ...] = ()

    def __repr__(self) -> str:
        columns = list(zip(*self.weights.values(), strict=True))
        each = "; ".join(spread(column) for column in columns)
        return f"LearnedWeights({counted(len(self.weights), 'tensor')}, vectors by {each}; {course(self.losses)})"


def fused_by(learn: Callable[..., LearnedWeights], vectors: Sequence[Tensors], options: FusionOptions) -> TaskVector:
    """Task arithmetic with the weights that `learn` finds for the vectors, those of `options` included."""
    found = learn(
        vectors,
        weights=options.pop("weights", None),
        skip=options.get("skip", ()),
        progress=options.get("progress", False),
    )
    return task_arithmetic(vectors, 1.0, **(options | {"weights": found.weights}))
