"""Search the scale of a fused update on a few labelled samples of every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._display import spread
from .._loss import loss_of
from .._state import StateLike, Tensors, finite_number, whole_number
from .._tasks import Head, Tasks, as_tasks, device_of, logits_of, mode, pairs
from ..errors import InputError, NonFiniteError, ShapeError
from ._moved import Moved
from .realign import Loss

__all__ = ["ScaleSearch", "search_scale"]

SCALES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
GOLDEN = (3 - math.sqrt(5)) / 2


@dataclass(frozen=True)
class ScaleSearch:
    """What a search of the scale found.

    Attributes:
        scale: the one to use, ``update.apply_to(base, scale)``.
        losses: every scale that was looked at, increasing -> the mean loss over the tasks; infinite where it was not
            a finite number.
        evaluations: how many they are; each took one pass of every batch through the model.

    Example:
        >>> found = ScaleSearch(scale=0.5, losses={0.0: 1.2, 0.5: 0.3, 1.0: 0.4}, evaluations=3)
        >>> found.losses[found.scale]
        0.3
    """

    scale: float
    losses: Mapping[float, float]
    evaluations: int

    def __repr__(self) -> str:
        found = f"scale {self.scale:.3g}, loss {self.losses[self.scale]:.3g}"
        return f"ScaleSearch({found}; {self.evaluations} evaluated, scales {spread(list(self.losses))})"


def search_scale(
    model: nn.Module,
    base: StateLike,
    update: Tensors,
    tasks: Tasks,
    *,
    scales: Iterable[float] | None = None,
    loss: Loss = cross_entropy,
    refinements: int = 10,
    tolerance: float = 0.01,
    one_standard_error: bool = False,
) -> ScaleSearch:
    r"""The scale of an update with the least mean loss over the tasks.

    .. math:: \min_\lambda\ L(\lambda) = \frac{1}{N} \sum_{i=1}^N \frac{1}{M_i} \sum_{m=1}^{M_i}
              \ell\bigl(h_i(f(x_m; \theta_{\text{base}} + \lambda \tau)), y_m\bigr)

    A coarse grid that includes 0, the base model; then parabolas through the best three points and golden sections
    (Brent's method) between the neighbours of the grid's best. No scale is looked at twice, and the result is never
    worse on these samples than the base model or any point of the grid. Only if the loss has a single minimum between
    the two neighbours, and none elsewhere, is it the least of all.

    The batches are gone through once, moved to the model's device and kept, so that every scale sees the same
    samples: a DataLoader may shuffle, augment or be an iterator. Everything is in evaluation mode without gradients.
    Beside the base and the update there is one copy of the parameters that the update names, written anew for every
    scale.

    Args:
        model: its parameters and buffers are not used and not touched: one encoder for all tasks, or a complete model.
        base: :math:`\theta_\text{base}`: a module (such as `model`), a state dict or the path of a checkpoint.
        update: :math:`\tau`, name -> tensor, what a rule of fusion returns. What it does not name stays as in `base`,
            and so do integer entries and running statistics.
        tasks: name -> (head, batches), with logits ``head(model(inputs))``; or the batches of a complete model.
            Batches are (inputs, targets), or mappings with the key "labels".
        scales: the grid, to which 0 is added; None: 0, 1/8, 1/4, 1/2, 1, 2, 4. Nothing outside of it is looked at.
        loss: of logits and targets, a scalar: the mean over the samples of a batch. Every sample of a task counts the
            same, where targets are tensors with one entry or row a sample; else every batch does.
        refinements: scales to look at after the grid, at most; 0: the grid alone.
        tolerance: refine until the minimum is known to this share of the distance between the grid's two neighbours.
        one_standard_error: of all scales that were looked at take the one nearest to 0 whose loss is not above the
            least by more than one standard error of the difference, sample by sample. Off by default: a single number
            hardly overfits, and the rule trades some loss for a smaller step away from the base model. It calls `loss`
            for every sample.

    Returns:
        A `ScaleSearch`. Between equal losses the scale nearest to 0 wins.

    Raises:
        InputError: no batches, or an iterator that is used up, no scales, `refinements` or `tolerance` out of range,
            fewer than two samples of a task for the standard error.
        StateMismatchError: base and update do not fit the model, or change two names of a tied tensor differently.
        ShapeError: the loss is not one number. NonFiniteError: NaN or infinity in `update`, or a loss of the base model
            that is not finite; at other scales such a loss counts as infinite.
        TypeError: no module, no function, batches that are no pairs.

    Source: Brent, "Algorithms for minimization without derivatives", 1973, chapter 5; Ilharco et al., "Editing models
        with task arithmetic", 2023, which tune the scale on held-out samples.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> base, update = {"weight": torch.zeros(2, 2)}, {"weight": 4 * torch.eye(2)}
        >>> batches = [(torch.eye(2), torch.eye(2))]
        >>> found = search_scale(model, base, update, batches, loss=torch.nn.functional.mse_loss)
        >>> found.scale, found.losses[0.0]
        (0.25, 0.5)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function of logits and targets, got {type(loss).__name__}")
    if not isinstance(one_standard_error, bool):
        raise TypeError(f"one_standard_error: expected True or False, got {type(one_standard_error).__name__}")
    grid = _grid(SCALES if scales is None else scales)
    budget = whole_number(refinements, "refinements", at_least=0)
    share = finite_number(tolerance, "tolerance", positive=True)
    moved = Moved.of(model, base, update)
    samples = _Samples.of(tasks, loss, device_of(model), each=one_standard_error)
    losses: dict[float, float] = {}
    rows: dict[float, list[Tensor]] = {}

    def value_at(scale: float) -> float:
        rows[scale] = samples.losses(moved.at(scale))
        value = sum(float(row.mean()) for row in rows[scale]) / len(rows[scale])
        return value if math.isfinite(value) else math.inf

    with torch.no_grad(), mode(False, model, *samples.heads):
        for scale in grid:
            losses[scale] = value_at(scale)
            if scale == 0 and losses[scale] == math.inf:
                raise NonFiniteError("loss of the base model (scale 0) is not finite, so that nothing can be compared")
        _refine(value_at, losses, budget, share)
    best = _least(losses)
    if one_standard_error:
        best = min((scale for scale in losses if _is_within(rows[scale], rows[best])), key=_nearness)
    return ScaleSearch(best, MappingProxyType(dict(sorted(losses.items()))), len(losses))


def _grid(scales: Iterable[float]) -> list[float]:
    """0, then the others."""
    if isinstance(scales, str) or not isinstance(scales, Iterable):
        raise TypeError(f"scales: expected a sequence of numbers, got {type(scales).__name__}")
    numbers = {finite_number(scale, f"scales[{index}]") for index, scale in enumerate(scales)}
    if not numbers:
        raise InputError("scales: expected at least one number, got none")
    return [0.0, *sorted(numbers - {0.0})]


def _nearness(scale: float) -> tuple[float, float]:
    return abs(scale), -scale


def _least(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda scale: (losses[scale], *_nearness(scale)))


def _refine(value_at: Callable[[float], float], losses: dict[float, float], budget: int, share: float) -> None:
    """Add up to `budget` scales around the best one to `losses`, between its neighbours."""
    lower, best, upper = _neighbours(losses)
    tolerance = share * (upper - lower)
    before, last = math.inf, math.inf
    for _ in range(budget):
        wider = upper - best if upper - best >= best - lower else lower - best
        if abs(wider) <= tolerance * (1 + 1e-9):
            return
        step = _to_vertex(lower, best, upper, losses)
        if step is None or not abs(step) < before / 2 or not lower < best + step < upper:
            step = GOLDEN * wider
        if abs(step) < tolerance / 100:  # the vertex is reached: see that it is a minimum
            step = math.copysign(tolerance, wider)
        scale = best + step
        if scale in losses:  # no number in between
            return
        losses[scale] = value_at(scale)
        before, last = last, abs(step)
        lower, best, upper = _neighbours(losses)


def _neighbours(losses: Mapping[float, float]) -> tuple[float, float, float]:
    """The best scale between the scales next to it; itself where there is none."""
    known, best = sorted(losses), _least(losses)
    index = known.index(best)
    return known[max(index - 1, 0)], best, known[min(index + 1, len(known) - 1)]


def _to_vertex(lower: float, best: float, upper: float, losses: Mapping[float, float]) -> float | None:
    """From the best of three scales to the lowest point of the parabola through them; None if there is none."""
    if not lower < best < upper:
        return None
    left, right = best - lower, upper - best
    down, up = (losses[lower] - losses[best]) / left, (losses[upper] - losses[best]) / right
    if not (math.isfinite(down) and math.isfinite(up) and down + up > 0):
        return None
    return (down * right - up * left) / (2 * (down + up))


def _is_within(rows: list[Tensor], best: list[Tensor]) -> bool:
    """Whether the mean loss over the tasks is not higher by more than a standard error of the difference."""
    apart = [row - other for row, other in zip(rows, best, strict=True)]
    mean = sum(float(row.mean()) for row in apart)
    return mean <= math.sqrt(sum(float(row.var()) / len(row) for row in apart))


class _Samples(NamedTuple):
    """The batches of every task, kept."""

    heads: list[Head | None]
    batches: list[list[tuple[Any, Any]]]
    names: list[str]
    loss: Loss
    each: bool

    @classmethod
    def of(cls, tasks: Tasks, loss: Loss, device: torch.device | None, *, each: bool) -> _Samples:
        """Gone through once."""
        given = as_tasks(tasks, "tasks")
        kept, names = [], [f"tasks[{name!r}]" if name else "tasks" for name in given]
        for where, task in zip(names, given.values(), strict=True):
            batches = [batch for batch in pairs(task.batches, where, device) if _size(batch[1]) != 0]
            if not batches:
                raise InputError(f"{where}: expected at least one sample, got only empty batches")
            sizes = [_size(targets) for _, targets in batches]
            if each and None in sizes:
                raise InputError(f"{where}: one_standard_error needs targets as tensors with one entry or row a sample")
            if each and sum(size or 0 for size in sizes) < 2:
                raise InputError(f"{where}: one_standard_error needs at least two samples of every task, got one")
            kept.append(batches)
        return cls([task.head for task in given.values()], kept, names, loss, each)

    def losses(self, model: Callable[..., Any]) -> list[Tensor]:
        """For every task the losses of its samples, or (1,) their mean."""
        return [self._row(model, *task) for task in zip(self.heads, self.batches, self.names, strict=True)]

    def _row(self, model: Callable[..., Any], head: Head | None, batches: list[tuple[Any, Any]], where: str) -> Tensor:
        values, weights = [], []
        for inputs, targets in batches:
            logits = logits_of(model, head, inputs)
            size = _size(targets)
            if not self.each:
                values.append(_number(loss_of(self.loss, logits, targets, where), where))
                weights.append(1 if size is None else size)
                continue
            if not isinstance(logits, Tensor) or logits.shape[:1] != targets.shape[:1]:
                raise InputError(f"{where}: one_standard_error needs logits as a tensor with one row for each target")
            rows = zip(logits.split(1), targets.split(1), strict=True)
            values += [_number(loss_of(self.loss, *row, where), where) for row in rows]
        row = torch.tensor(values, dtype=torch.float64)
        return row if self.each else (row @ torch.tensor(weights, dtype=torch.float64) / sum(weights))[None]


def _size(targets: object) -> int | None:
    return len(targets) if isinstance(targets, Tensor) and targets.ndim else None


def _number(value: Any, where: str) -> float:
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(value).__name__} for {where}")
    if value.numel() != 1:
        raise ShapeError(f"loss: expected one number, got shape {tuple(value.shape)} for {where}; reduce it to a mean")
    return float(value)
