"""The trade-offs between tasks over the vectors' coefficients, from a few evaluations: an amortised Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..._call import WithState
from ..._display import counted, spread
from ..._random import Seed, generator, seed_number
from ..._state import StateLike, Tensors, finite_number, whole_number
from ..._tasks import Tasks, as_tasks, mode
from ...errors import InputError, NonFiniteError, ShapeError
from .._options import FusionOptions
from ._interpolated import Interpolated, kept, prepared, shown
from ._pareto import front_of
from ._quadratics import Link, Quadratic, fitted, unknowns

__all__ = ["ParetoFront", "pareto_front"]

Metric: TypeAlias = Callable[[Any, Any], Any]

PER_UNKNOWN = 5


@dataclass(frozen=True, eq=False)
class ParetoFront:
    """Trade-offs between T tasks over the coefficients of N vectors.

    Attributes:
        tasks: T names.
        metric: what the values are called.
        larger_is_better: whether the metric is one to be large, such as accuracy, or small, such as a loss.
        coefficients: (F, N) points of the front, in the order of the first task's values.
        predicted: (F, T) the surrogates' values there.
        measured: (F, T) the metrics themselves there; None unless asked for.
        sampled: (S, N) where the metrics were measured, to which the surrogates were fitted.
        values: (S, T) what was measured there.
        surrogates: for each task a function of (..., N) coefficients.
        errors: for each task the root mean square of ``surrogate - metric`` over the samples: what differs by less on
            the front is not told apart.

    Example:
        >>> import torch
        >>> row, none = torch.tensor([[0.3, 0.6]]), torch.zeros(0, 2)
        >>> found = ParetoFront(("a", "b"), "accuracy", True, row, 2 * row, None, none, none, (), ())
        >>> [round(c, 1) for c in found.best()]
        [0.3, 0.6]
    """

    tasks: tuple[str, ...]
    metric: str
    larger_is_better: bool
    coefficients: Tensor
    predicted: Tensor
    measured: Tensor | None
    sampled: Tensor
    values: Tensor
    surrogates: tuple[Quadratic, ...]
    errors: tuple[float, ...]

    def __repr__(self) -> str:
        shown = self.predicted if self.measured is None else self.measured
        ends = ", ".join(f"{task} {spread(shown[:, t])}" for t, task in enumerate(self.tasks))
        kind = "predicted" if self.measured is None else "measured"
        points = f"{counted(len(self.coefficients), 'point')} from {counted(len(self.sampled), 'sample')}"
        return f"ParetoFront({points}; {kind} {self.metric}: {ends})"

    def best(self, preference: Sequence[float] | None = None) -> tuple[float, ...]:
        """The coefficients on the front with the best weighted mean of the values, for the option `weights` of a rule.

        Args:
            preference: a number >= 0 for each task; None: all count the same.

        Returns:
            N numbers: ``task_arithmetic(vectors, 1.0, weights=front.best())``.

        Raises:
            ShapeError: not T numbers. InputError: a negative one, or only zeros.
        """
        numbers = [1.0] * len(self.tasks) if preference is None else list(preference)
        if len(numbers) != len(self.tasks):
            raise ShapeError(f"preference: expected {len(self.tasks)} numbers, one for each task, got {len(numbers)}")
        checked = [finite_number(number, f"preference[{index}]") for index, number in enumerate(numbers)]
        if min(checked) < 0 or max(checked) == 0:
            raise InputError(f"preference: expected numbers >= 0, and one above, got {checked}")
        values = self.predicted if self.measured is None else self.measured
        total = values.double() @ torch.tensor(checked, dtype=torch.float64)
        chosen = int(total.argmax() if self.larger_is_better else total.argmin())
        return tuple(self.coefficients[chosen].tolist())


def pareto_front(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    *,
    seed: Seed,
    base: StateLike | None = None,
    metric: Metric | None = None,
    larger_is_better: bool = True,
    link: Link | None = None,
    evaluations: int | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    size: int = 100,
    measure: bool = False,
    skip: str | Iterable[str] = (),
    progress: bool = False,
) -> ParetoFront:
    r"""Model merging with amortised Pareto fronts (MAP).

    .. math:: M_t\Bigl(\theta_0 + \sum_q c_q \tau_q\Bigr) \approx
              \tilde M_t(c) = g\bigl(e_t + b_t^T c + \tfrac12 c^T A_t c\bigr)

    for every task t, as a Taylor series of second order says near the base model, with :math:`e_t, b_t, A_t` fitted by
    least squares to metrics measured at coefficients drawn uniformly from the box. The front is that of the
    :math:`\tilde M_t`, which costs no evaluation of the model: NSGA-II, 100 generations of at least 128 points, for
    which less than 1/16384 of a value's range is no difference.

    The batches are gone through once, moved to the model's device and kept, so that all coefficients see the same
    samples. No gradients are needed. Everything is in evaluation mode. In memory there is, beside model and vectors,
    one set of the parameters that change.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        model: one encoder for all tasks, or a complete model. Not written to.
        tasks: name -> (head, batches), with logits ``head(model(inputs))``, or name -> batches of a complete model. T
            of them, which need not be those of the vectors. Batches are (inputs, targets), or mappings with the
            key "labels".
        seed: of the sampled coefficients and of NSGA-II.
        base: :math:`\theta_0`: a module, a state dict or the path of a checkpoint; None: the weights of `model`.
        metric: of logits and targets, the mean over a batch; None: the accuracy.
        larger_is_better: what the metric is.
        link: g: "sigmoid" for values in (0, 1), the default for the accuracy; "softplus" for positive ones; "identity",
            the default for any other metric.
        evaluations: S, of every task; None: five for each of the (N + 1)(N + 2) / 2 unknowns, 30 for two vectors and
            225 for eight.
        bounds: of every coefficient.
        size: how many points of the front to find, at most.
        measure: whether to measure the metrics on the front, too: up to `size` more evaluations.
        skip: names that stay as in the base, as in `FusionOptions`.
        progress: show a progress bar.

    Returns:
        A `ParetoFront`, on the CPU in float64.

    Raises:
        InputError: no batches, or an iterator that is used up, an argument out of range, fewer evaluations than
            unknowns. StateMismatchError: vectors, base and model do not fit. NonFiniteError: NaN or infinity in a
            vector or a metric. ShapeError: a metric that is not one number. TypeError: no module, no function, no seed.

    Source: Li et al., "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation", 2025;
        neither nested nor Bayesian, NSGA-II in place of NSGA-III. The number of evaluations and the box are this
        library's: the authors' code looks for the front in [-3, 3], far from where it samples.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> base, vectors = {"weight": torch.zeros(1, 1)}, [{"weight": torch.ones(1, 1)}]
        >>> tasks = {t: [(torch.ones(1, 1), torch.tensor([[goal]]))] for t, goal in (("low", 0.2), ("high", 0.6))}
        >>> loss = torch.nn.functional.mse_loss
        >>> front = pareto_front(vectors, model, tasks, base=base, metric=loss, larger_is_better=False, seed=0)
        >>> [round(float(c), 1) for c in (front.coefficients.min(), front.coefficients.max(), front.best()[0])]
        [0.2, 0.6, 0.4]
    """
    number = seed_number(seed)
    if metric is not None and not callable(metric):
        raise TypeError(f"metric: expected a function of logits and targets or None, got {type(metric).__name__}")
    form: Link = ("sigmoid" if metric is None else "identity") if link is None else link
    if form not in get_args(Link):
        raise InputError(f"link: expected one of {', '.join(map(repr, get_args(Link)))}, got {link!r}")
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"bounds: expected (lowest, highest), got {bounds!r}")
    low, high = (finite_number(bound, f"bounds[{index}]") for index, bound in enumerate(bounds))
    if low >= high:
        raise InputError(f"bounds: expected the lower one first, got {bounds}")
    points = whole_number(size, "size", at_least=1)
    at = Interpolated(vectors, model, base, FusionOptions(skip=skip))
    least = unknowns(at.count)
    count = PER_UNKNOWN * least if evaluations is None else whole_number(evaluations, "evaluations", at_least=1)
    if count < least:
        raise InputError(f"evaluations: {at.count} vectors have {least} unknowns a task; expected as many, got {count}")
    given = prepared(tasks)
    batches = {where: kept(task, where, at.device, labelled=True) for where, task in given.items()}

    def measured(call: WithState) -> list[float]:
        row = []
        for where, task in given.items():
            total = 0.0
            for inputs, targets, share in batches[where]:
                logits = call.logits(inputs, where, head=task.head)
                value = _accuracy(logits, targets) if metric is None else metric(logits, targets)
                total += share * _number(value, where)
            row.append(total)
        return row

    def table(coefficients: Tensor) -> Tensor:
        with torch.no_grad(), mode(False, model, *(task.head for task in given.values())):
            steps = shown(len(coefficients), "Pareto front" if progress else None)
            rows = [measured(at.at(coefficients[step].expand(len(at.layers), -1))) for step in steps]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(coefficients), len(given))

    drawn = torch.rand(count, at.count, generator=generator(number, "pareto", "samples"), dtype=torch.float64)
    sampled = low + (high - low) * drawn
    values = table(sampled)
    surrogates = tuple(fitted(sampled, column, form) for column in values.T)
    sign = 1.0 if larger_is_better else -1.0

    def objectives(where: Tensor) -> Tensor:
        return sign * torch.stack([surrogate.before_link(where) for surrogate in surrogates], dim=-1)

    found = front_of(objectives, low, high, at.count, points, generator(number, "pareto", "front"))
    predicted = torch.stack([surrogate(found) for surrogate in surrogates], dim=-1)
    order = predicted[:, 0].argsort(stable=True)
    found, predicted = found[order], predicted[order]
    apart = (torch.stack([surrogate(sampled) for surrogate in surrogates], dim=-1) - values).square().mean(0).sqrt()
    name = "accuracy" if metric is None else str(getattr(metric, "__name__", "metric"))
    return ParetoFront(
        tuple(as_tasks(tasks, "tasks")),
        name,
        larger_is_better,
        found,
        predicted,
        table(found) if measure else None,
        sampled,
        values,
        surrogates,
        tuple(apart.tolist()),
    )


def _accuracy(logits: Tensor, targets: Any) -> Tensor:
    if not isinstance(targets, Tensor) or targets.shape != logits.shape[:1]:
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ShapeError(f"tasks: expected targets of shape ({len(logits)},) for {len(logits)} logits, got {shape}")
    return (logits.argmax(-1) == targets).double().mean()


def _number(value: Any, where: str) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ShapeError(
            f"metric: expected one number, got shape {tuple(value.shape)} for {where}; reduce it to a mean"
        )
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric: expected a number, got {type(value).__name__} for {where}") from None
    if not math.isfinite(number):
        raise NonFiniteError(f"metric of {where} is {number}")
    return number
