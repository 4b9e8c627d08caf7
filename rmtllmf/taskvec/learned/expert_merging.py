"""Expert Merging: coefficients for which the fused model answers as each task's fine-tuned model does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss
from typing_extensions import Unpack

from ..._call import WithState
from ..._state import StateLike, Tensors, finite_number, select_names, wide
from ..._tasks import Head, Tasks, mode
from ...errors import InputError, ShapeError
from .._options import FusionOptions, Weights, checked_options
from .._sources import sources_of
from ..rules.arithmetic import heuristic_scale
from ..vector import TaskVector
from ._interpolated import Interpolated, descend, kept, prepared, rows_of
from ._schedule import Schedule
from .weights import LearnedWeights, fused_by

__all__ = ["expert_merging", "expert_merging_coefficients"]


def expert_merging_coefficients(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    *,
    base: StateLike | None = None,
    hidden: str | Iterable[str] | None = None,
    start: float | None = None,
    steps: int = 100,
    lr: float = 0.01,
    temperature: float = 3.0,
    hidden_weight: float = 1.0,
    anchor_weight: float = 0.8,
    task_weights: Sequence[float] | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    weights: Weights | None = None,
    skip: str | Iterable[str] = (),
    progress: bool = False,
) -> LearnedWeights:
    r"""The coefficients of Expert Merging, one for every tensor of every vector.

    .. math:: \min_\alpha \sum_k \beta_k\, \mathbb{E}_{x \sim k} \Bigl[
              \mu \sum_{s \in S} \frac{\|h_s(x; \theta(\alpha)) - h_s(x; \theta_k)\|^2}{\dim h_s}
              + T^2 \operatorname{KL}\bigl(\operatorname{softmax} \tfrac{z(x; \theta_k)}{T} \,\|\,
              \operatorname{softmax} \tfrac{z(x; \theta(\alpha))}{T}\bigr) \Bigr]
              + \frac{\gamma}{N L} \sum_{k,l} |\alpha_{k,l} - \bar\alpha|

    with the experts :math:`\theta_k = \theta_0 + \tau_k`, by Adam. No labels are used, and a few inputs will do: the
    paper takes five to ten of every task. The batches are gone through once, moved to the model's device and kept, with
    the experts' answers; every step sees all of them. Everything is in evaluation mode. In memory are, beside model and
    vectors, one set of the parameters that change, and its gradient.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        model: one encoder for all tasks, or a complete model. Not written to.
        tasks: name -> (head, batches), with logits ``head(model(inputs))``, or name -> batches of a complete model; the
            k-th is what the k-th vector is the expert of. Batches are inputs or (inputs, targets), of which the
            targets are not looked at.
        base: :math:`\theta_0`: a module, a state dict or the path of a checkpoint; None: the weights of `model`.
        hidden: S, names of sub-modules or glob patterns such as ``"*.resblocks.5"``, whose outputs are compared: a
            tensor, or the first of a tuple. None: the output of the encoder, for tasks with a head; (): none.
        start: :math:`\bar\alpha`; None: `heuristic_scale` of N.
        steps, lr: of Adam. The paper does not say; these are this library's.
        temperature: T. The authors' code has 3.
        hidden_weight: :math:`\mu`; 0 for predictions only.
        anchor_weight: :math:`\gamma`, of the distance to the start. The best of the paper are .8 and 5, for two models.
        task_weights: :math:`\beta`, a number >= 0 for each task; None: 1.
        bounds, weights, skip, progress: as for `adamerging_coefficients`.

    Returns:
        `LearnedWeights`, with the objective before each step.

    Raises:
        InputError: no batches, or an iterator that is used up, not one task for each vector, a pattern that matches
            nothing, an argument out of range. StateMismatchError: vectors, base and model do not fit. NonFiniteError:
            NaN or infinity in a vector or in an expert's answers. ShapeError: logits that are no (..., K). TypeError:
            no module, an output that is no tensor.

    Source: Zhang et al., "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided Layer
        Chunking", 2025; without its chunks. The paper has the squared norm of the difference of hidden states, the
        authors' code its mean over the entries, as here; the code's coefficients are sigmoids of free numbers.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> base, inputs = {"weight": torch.zeros(2, 2)}, torch.eye(2)
        >>> vectors = [{"weight": torch.diag(3 * inputs[q])} for q in (0, 1)]
        >>> tasks = {"first": [inputs[:1]], "second": [inputs[1:]]}
        >>> found = expert_merging_coefficients(vectors, model, tasks, base=base, anchor_weight=0, lr=0.05)
        >>> [round(c, 1) for c in found.weights["weight"]]  # the experts do not disturb each other
        [1.0, 1.0]
    """
    smooth = finite_number(temperature, "temperature", positive=True)
    mu, gamma = _at_least_0(hidden_weight, "hidden_weight"), _at_least_0(anchor_weight, "anchor_weight")
    at = Interpolated(vectors, model, base, FusionOptions(weights=weights, skip=skip))
    first = heuristic_scale(at.count) if start is None else start
    schedule = Schedule.of(first, steps, lr, bounds)
    given = prepared(tasks)
    if len(given) != at.count:
        raise InputError(f"tasks: expected one for each of {at.count} vectors, in their order, got {len(given)}")
    beta = _task_weights(task_weights, at.count)
    names = [] if hidden is None else select_names([name for name, _ in model.named_modules()], hidden, "hidden")
    batches = {where: kept(task, where, at.device, labelled=False) for where, task in given.items()}
    answers: dict[str, list[list[Tensor]]] = {where: [] for where in given}

    with torch.no_grad(), mode(False, model, *(task.head for task in given.values())):
        for k, (where, task) in enumerate(given.items()):
            only = torch.zeros(len(at.layers), at.count, dtype=torch.float64)
            only[:, k] = 1
            expert = at.at(only)
            for inputs, _, _ in batches[where]:
                with _watched(model, names) as seen:
                    head = _recorded(task.head, seen, encoder=hidden is None)
                    logits = expert.inside(lambda logits: logits, inputs, where, head=head)
                    answers[where].append([logits.clone(), *(state.clone() for state in seen)])

    def objective(call: WithState) -> float:
        total = 0.0
        for b, (where, task) in zip(beta, given.items(), strict=True):
            for (inputs, _, share), (expected, *states) in zip(batches[where], answers[where], strict=True):
                if b == 0:
                    continue
                with _watched(model, names) as seen:

                    def down(
                        logits: Tensor,
                        factor: float = b * share,
                        where: str = where,
                        expected: Tensor = expected,
                        states: list[Tensor] = states,
                        seen: list[Tensor] = seen,
                    ) -> float:
                        value = smooth**2 * _divergence(expected / smooth, logits / smooth)
                        if mu:
                            value = value + mu * sum(mse_loss(h, e) for h, e in zip(seen, states, strict=True))
                        return factor * descend(value, factor, at.parameters, where)

                    head = _recorded(task.head, seen, encoder=hidden is None)
                    total += call.inside(down, inputs, where, head=head)
        return total

    def to_the_start(coefficients: Tensor) -> Tensor:
        return gamma * (coefficients - schedule.start).abs().mean()

    bar = "expert merging" if progress else None
    return schedule.run(at, model, given.values(), objective, penalty=to_the_start, bar=bar)


def expert_merging(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    *,
    base: StateLike | None = None,
    hidden: str | Iterable[str] | None = None,
    start: float | None = None,
    steps: int = 100,
    lr: float = 0.01,
    temperature: float = 3.0,
    hidden_weight: float = 1.0,
    anchor_weight: float = 0.8,
    task_weights: Sequence[float] | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of Expert Merging.

    .. math:: \tau_l = \sum_k \alpha_{k,l} \tau_{k,l}

    with the :math:`\alpha` of `expert_merging_coefficients`.

    Args:
        vectors, model, tasks, base, hidden, start: as for `expert_merging_coefficients`.
        steps, lr, temperature, hidden_weight, anchor_weight, task_weights, bounds: likewise.
        options: as for every rule, see `FusionOptions`.

    Returns:
        The update, a `TaskVector`.

    Raises:
        As `expert_merging_coefficients`.

    Source: Zhang et al., "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided Layer
        Chunking", 2025.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> vectors, base = [{"weight": torch.eye(2)}], {"weight": torch.zeros(2, 2)}
        >>> update = expert_merging(vectors, model, [torch.eye(2)], base=base, start=0.5, anchor_weight=0)
        >>> dict(update.map(lambda name, tensor: tensor.round(decimals=1)))  # one expert: it is found again
        {'weight': tensor([[1., 0.],
                [0., 1.]])}
    """
    options = checked_options(options)
    given = sources_of(vectors, "vectors")
    learn = partial(
        expert_merging_coefficients,
        model=model,
        tasks=tasks,
        base=base,
        hidden=hidden,
        start=start,
        steps=steps,
        lr=lr,
        temperature=temperature,
        hidden_weight=hidden_weight,
        anchor_weight=anchor_weight,
        task_weights=task_weights,
        bounds=bounds,
    )
    return fused_by(learn, given, options)


def _divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """KL of the softmax of `expected` and that of `logits`, the mean over the rows."""
    return kl_div(wide(logits).log_softmax(-1), wide(expected).log_softmax(-1), reduction="batchmean", log_target=True)


@contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """What the named sub-modules put out in the meantime, in the order in which they are called."""
    seen: list[Tensor] = []
    modules = dict(model.named_modules())
    handles = []
    try:
        for name in names:

            def look(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                seen.append(_state(output, f"hidden: the output of {name!r}"))

            handles.append(modules[name].register_forward_hook(look))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _recorded(head: Head | None, seen: list[Tensor], *, encoder: bool) -> Head:
    """The head, which notes what the encoder puts out."""
    logits: Callable[[Any], Any] = rows_of(head)
    if head is None or not encoder:
        return logits

    def noting(output: Any) -> Any:
        seen.append(_state(output, "hidden: the output of the encoder"))
        return logits(output)

    return noting


def _state(output: Any, what: str) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(f"{what}: expected a tensor, or a tuple of which the first is one, got {type(first).__name__}")
    return wide(first)


def _task_weights(values: object, count: int) -> list[float]:
    if values is None:
        return [1.0] * count
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"task_weights: expected {count} numbers or None, got {type(values).__name__}")
    numbers = [_at_least_0(value, f"task_weights[{index}]") for index, value in enumerate(values)]
    if len(numbers) != count:
        raise ShapeError(f"task_weights: expected {count} numbers, one for each task, got {len(numbers)}")
    return numbers


def _at_least_0(value: object, argument: str) -> float:
    number = finite_number(value, argument)
    if number < 0:
        raise InputError(f"{argument}: expected a number >= 0, got {number:g}")
    return number
