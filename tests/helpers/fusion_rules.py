"""One row for each fusion rule: `tests/taskvec/test_rules.py` holds every rule to the same properties.

To add a rule, write its definition naively (on float64, whole tensors, as the paper does) and add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rmtllmf.taskvec import task_arithmetic, weighted_average

Vectors = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Row:
    """A rule with options, and what is true of it."""

    name: str
    rule: Callable[..., Any]  # (vectors, **options) -> update
    naive: Callable[..., dict[str, torch.Tensor]] | None  # (vectors in float64) -> update; None: has a test of its own
    permutable: bool = True  # the order of the tasks does not matter
    homogeneous: bool = True  # rule(c tau) = c rule(tau) for c > 0
    premultiplied: bool = True  # weights mean: fuse w tau
    tolerance: float = 1e-5  # relative to the largest entry, in float32
    fewest: int = 1  # vectors


def each_key(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Vectors], dict[str, torch.Tensor]]:
    """The naive form of a rule that works tensor by tensor, from a function of the stacked (N, ...) tensors."""
    return lambda vectors: {key: function(torch.stack([v[key] for v in vectors])) for key in vectors[0]}


ROWS = [
    Row("task arithmetic", partial(task_arithmetic, scale=0.3), each_key(lambda x: 0.3 * x.sum(0))),
    Row("weighted average", weighted_average, each_key(lambda x: x.mean(0)), premultiplied=False),
]
