"""Weight disentanglement of a pair of tasks over a grid of two scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._call import WithState, check_model
from .._display import spread
from .._state import StateLike, Tensors, finite_number
from .._tasks import Task, Tasks, device_of, inputs_of, mode, named_tasks
from ..errors import InputError
from .disentanglement import checked_vectors, moved_by

__all__ = ["DisentanglementGrid", "disentanglement_grid"]

_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class DisentanglementGrid:
    r"""The weight disentanglement error of two tasks for every pair of scales.

    Attributes:
        scales: S increasing numbers, of both axes.
        total: :math:`\xi(\alpha_1, \alpha_2)` from 0 to 2, (S, S) float64: the first task's scale along the rows, the
            second's along the columns.
        per_task: task -> its summand, (S, S), the first task first.

    Example:
        >>> import torch
        >>> none = torch.zeros(1, 1)
        >>> list(DisentanglementGrid((1.0,), none, {"mnist": none, "svhn": none}).per_task)
        ['mnist', 'svhn']
    """

    scales: tuple[float, ...]
    total: Tensor
    per_task: dict[str, Tensor]

    def __repr__(self) -> str:
        size = len(self.scales)
        return (
            f"DisentanglementGrid({' and '.join(self.per_task)}, {size} x {size} scales {spread(self.scales)}: "
            f"total {spread(self.total)})"
        )


def disentanglement_grid(
    model: nn.Module,
    base: StateLike,
    vectors: Sequence[Tensors] | Mapping[str, Tensors],
    tasks: Tasks,
    scales: Iterable[float] = _SCALES,
) -> DisentanglementGrid:
    r"""How often two task vectors together predict something else than the task's own alone, for every two scales.

    .. math:: \xi(\alpha_1, \alpha_2) = \sum_{i=1}^{2} P_{x \sim \mathcal{S}_i}\Bigl[
              \arg\max f(x; \theta_0 + \alpha_i \tau_i) \ne
              \arg\max f(x; \theta_0 + \alpha_1 \tau_1 + \alpha_2 \tau_2)\Bigr]

    With the vectors scaled beforehand this is `weight_disentanglement_error` at ``scale=1``. 0 in a model whose tasks
    are disentangled at these scales; the row and the column of scale 0 tell how much each vector alone disturbs the
    other task. Of each batch every task's own model predicts once a scale: S + S^2 evaluations a task.

    The parameters for a point are made anew for every batch, so that batches may come shuffled and only once, and
    one extra model is held at a time; large batches are cheaper.

    Args:
        model: its parameters are not used and not touched: one encoder, or a complete model.
        base: :math:`\theta_0`: a module (such as `model`), a state dict or the path of a checkpoint.
        vectors: two task vectors, in the order of `tasks` or a mapping of the same names.
        tasks: two of name -> (head, batches), or name -> batches for a complete model; batches are inputs or
            (inputs, targets), of which the labels play no part.
        scales: S strictly increasing numbers.

    Returns:
        A `DisentanglementGrid`.

    Raises:
        InputError: not two tasks or vectors, scales that do not increase or are not finite, a task without inputs.
        StateMismatchError: base and vectors do not fit the model. NonFiniteError: NaN among the logits.

    Source: Ortiz-Jimenez et al., "Task arithmetic in the tangent space", 2023, eq. 6 and figure 3; R-MTLLMF, eq. 7.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> base = {"weight": torch.zeros(2, 2)}
        >>> vectors = [{"weight": torch.eye(2)}, {"weight": -2 * torch.eye(2)}]
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> disentanglement_grid(model, base, vectors, {"a": batches, "b": batches}, [0.5, 2.0]).per_task["a"]
        tensor([[1., 1.],
                [0., 1.]], dtype=torch.float64)
    """
    check_model(model)
    named = named_tasks(tasks, "tasks")
    if len(named) != 2:
        raise InputError(f"tasks: expected two, one for each axis of the grid; got {len(named)}")
    steps = _increasing(scales)
    origin, taus = checked_vectors(model, base, vectors, list(named))

    def at(first: float, second: float) -> WithState:
        return WithState(model, moved_by(origin, (first, second), taus))

    per_task = {}
    with mode(False, model, *(task.head for task in named.values())):
        for index, (name, task) in enumerate(named.items()):
            differ, count = torch.zeros(len(steps), len(steps), dtype=torch.float64), 0
            for inputs in inputs_of(task.batches, f"tasks[{name!r}]", device_of(model)):
                changed, size = _changed(at, steps, index, name, task, inputs)
                differ += changed
                count += size
            if count == 0:
                raise InputError(f"tasks[{name!r}]: expected at least one input, got only empty batches")
            per_task[name] = differ / count
    return DisentanglementGrid(steps, sum(per_task.values(), torch.zeros_like(differ)), per_task)


def _changed(
    at: Callable[[float, float], WithState], steps: tuple[float, ...], index: int, name: str, task: Task, inputs: Any
) -> tuple[Tensor, int]:
    """(S, S) how many predictions of one batch change, and its size."""
    where = f"tasks[{name!r}]"
    alone = [at(*((step, 0.0) if index == 0 else (0.0, step))).predictions(task.head, inputs, where) for step in steps]
    differ = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for row, first in enumerate(steps):
        for column, second in enumerate(steps):
            together = at(first, second).predictions(task.head, inputs, where)
            differ[row, column] = int((together != alone[(row, column)[index]]).sum())
    return differ, len(alone[0])


def _increasing(scales: Iterable[float]) -> tuple[float, ...]:
    if isinstance(scales, str) or not isinstance(scales, Iterable):
        raise TypeError(f"scales: expected a sequence of numbers, got {type(scales).__name__}")
    steps = tuple(finite_number(step, f"scales[{index}]") for index, step in enumerate(scales))
    if not steps or any(right <= left for left, right in pairwise(steps)):
        raise InputError(f"scales: expected at least one number, strictly increasing, got {list(steps)}")
    return steps
