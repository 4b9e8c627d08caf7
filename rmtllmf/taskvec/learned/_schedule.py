"""Coefficients by Adam: the loop that rules with a differentiable objective share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._call import WithState
from ..._state import finite_number, whole_number
from ..._tasks import Task, mode
from ...errors import InputError
from ._interpolated import Interpolated, shown
from .weights import LearnedWeights


class Schedule(NamedTuple):
    """Where coefficients start, how they move, and where they may be."""

    start: float
    steps: int
    lr: float
    bounds: tuple[float, float] | None

    @classmethod
    def of(cls, start: object, steps: object, lr: object, bounds: object) -> Schedule:
        """Checked."""
        first = finite_number(start, "start")
        count, rate = whole_number(steps, "steps", at_least=0), finite_number(lr, "lr", positive=True)
        if bounds is None:
            return cls(first, count, rate, None)
        if not isinstance(bounds, tuple | list) or len(bounds) != 2:
            raise TypeError(f"bounds: expected (lowest, highest) or None, got {bounds!r}")
        low, high = (finite_number(bound, f"bounds[{index}]") for index, bound in enumerate(bounds))
        if not low <= first <= high:
            raise InputError(f"bounds: expected them around start, {first:g}, got {bounds}")
        return cls(first, count, rate, (low, high))

    def run(
        self,
        at: Interpolated,
        model: nn.Module,
        tasks: Iterable[Task],
        objective: Callable[[WithState], float],
        *,
        shared: bool = False,
        penalty: Callable[[Tensor], Tensor] | None = None,
        bar: Any = None,
    ) -> LearnedWeights:
        """Minimise ``objective(model) + penalty(coefficients)``, of which the first adds to the parameters' gradients.

        `shared`: the coefficients of a vector are the same for all layers. `bar`: what a progress bar says.
        """
        rows = len(at.layers)
        chosen = torch.full((1 if shared else rows, at.count), self.start, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([chosen], lr=self.lr)
        losses = []
        with torch.enable_grad(), mode(False, model, *(task.head for task in tasks)):
            for _ in shown(self.steps, bar):
                coefficients = chosen.expand(rows, -1)
                loss = objective(at.at(coefficients))
                adam.zero_grad()
                coefficients.backward(at.slopes())
                if penalty is not None:
                    extra = penalty(chosen)
                    extra.backward()
                    loss += float(extra.detach())
                losses.append(loss)
                adam.step()
                if self.bounds is not None:
                    with torch.no_grad():
                        chosen.clamp_(*self.bounds)
        found = at.weights(chosen.detach().expand(rows, -1))
        return LearnedWeights(MappingProxyType(found), tuple(losses))
