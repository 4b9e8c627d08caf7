"""Weight disentanglement: whether adding the other task vectors changes what a model predicts on a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._call import WithState, check_model, state_of
from .._state import (
    StateLike,
    Tensors,
    as_vectors,
    check_keys,
    check_shapes,
    finite_number,
    heuristic_scale,
    is_bendable,
    map_tied,
)
from .._tasks import Tasks, device_of, inputs_of, mode, named_tasks
from ..errors import InputError

__all__ = ["Disentanglement", "checked_vectors", "moved_by", "weight_disentanglement_error"]


@dataclass(frozen=True)
class Disentanglement:
    r"""The weight disentanglement error: 0 if no task notices the others.

    Attributes:
        total: :math:`\xi`, the sum over the tasks, from 0 to N.
        per_task: task -> the share of its inputs whose prediction changes.

    Example:
        >>> Disentanglement(total=0.5, per_task={"mnist": 0.2, "svhn": 0.3}).per_task["svhn"]
        0.3
    """

    total: float
    per_task: dict[str, float]


def weight_disentanglement_error(
    model: nn.Module,
    base: StateLike,
    vectors: Sequence[Tensors] | Mapping[str, Tensors],
    tasks: Tasks,
    *,
    scale: float | None = None,
    single_scale: float | None = None,
) -> Disentanglement:
    r"""How often the sum of all task vectors predicts something else than the task's own vector alone.

    .. math:: \xi = \sum_{i=1}^{N} P_{x \sim \mathcal{S}_i}\Bigl[
              \arg\max f(x; \theta_0 + \lambda_i \tau_i) \ne
              \arg\max f\bigl(x; \theta_0 + \lambda_N \textstyle\sum_j \tau_j\bigr)\Bigr]

    Labels play no part. The paper's eq. 8 prints the indicator of two outputs without saying that it is 1 where they
    differ.

    Args:
        model: its parameters are not used and not touched: one encoder, or a complete model.
        base: :math:`\theta_0`: a module (such as `model`), a state dict or the path of a checkpoint.
        vectors: N >= 2 task vectors, in the order of `tasks` or a mapping of the same names.
        tasks: name -> (head, batches), or name -> batches for a complete model; batches are inputs, or (inputs,
            targets), of which the labels play no part.
        scale: :math:`\lambda_N` of the sum; None: `rmtllmf.taskvec.heuristic_scale` of N.
        single_scale: :math:`\lambda_i` of each task's own vector; None: as `scale`.

    Returns:
        A `Disentanglement`.

    Raises:
        InputError: fewer than two tasks, another number of vectors, a task without inputs, a scale that is not finite.
        StateMismatchError: base and vectors do not fit the model. NonFiniteError: NaN among the logits.

    Source: R-MTLLMF, eq. 7 and 8; Ortiz-Jimenez et al., "Task arithmetic in the tangent space", 2023, eq. 6.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> base = {"weight": torch.zeros(2, 2)}
        >>> vectors = [{"weight": torch.eye(2)}, {"weight": -2 * torch.eye(2)}]
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> weight_disentanglement_error(model, base, vectors, {"a": batches, "b": batches}).per_task
        {'a': 1.0, 'b': 0.0}
    """
    check_model(model)
    named = named_tasks(tasks, "tasks")
    if len(named) < 2:
        raise InputError(f"tasks: expected at least two, since one task has nobody to interfere with; got {len(named)}")
    joint_scale = heuristic_scale(len(named)) if scale is None else finite_number(scale, "scale")
    own_scale = joint_scale if single_scale is None else finite_number(single_scale, "single_scale")
    origin, taus = checked_vectors(model, base, vectors, list(named))

    joint = WithState(model, moved_by(origin, [joint_scale] * len(taus), taus))
    shares = {}
    with mode(False, model, *(task.head for task in named.values())):
        for (name, task), tau in zip(named.items(), taus, strict=True):
            alone = WithState(model, moved_by(origin, [own_scale], [tau]))
            differ = count = 0
            for inputs in inputs_of(task.batches, f"tasks[{name!r}]", device_of(model)):
                first = alone.predictions(task.head, inputs, f"tasks[{name!r}]")
                second = joint.predictions(task.head, inputs, f"tasks[{name!r}]")
                differ += int((first != second).sum())
                count += len(first)
            if count == 0:
                raise InputError(f"tasks[{name!r}]: expected at least one input, got only empty batches")
            shares[name] = differ / count
    return Disentanglement(sum(shares.values()), shares)


def checked_vectors(
    model: nn.Module, base: StateLike, vectors: Sequence[Tensors] | Mapping[str, Tensors], names: list[str]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The base as a state of the model, and a fitting vector for each name."""
    taus = _in_order(vectors, names)
    origin = state_of(model, base, "base")
    checked = as_vectors(taus, "vectors")
    bendable = {key: tensor for key, tensor in origin.items() if is_bendable(key, tensor.dtype)}
    check_keys(checked[0], bendable, "vectors", "the floating-point entries of base")
    check_shapes(checked[0], bendable, "vectors", "base")
    return origin, checked


def _in_order(vectors: Sequence[Tensors] | Mapping[str, Tensors], names: list[str]) -> list[Tensors]:
    if isinstance(vectors, Mapping):
        check_keys(vectors, names, "vectors", "tasks")
        return [vectors[name] for name in names]
    if not isinstance(vectors, Sequence):
        raise TypeError(f"vectors: expected a sequence or a mapping of task vectors, got {type(vectors).__name__}")
    if len(vectors) != len(names):
        raise InputError(f"vectors: expected one for each of the {len(names)} tasks, got {len(vectors)}")
    return list(vectors)


def moved_by(origin: Tensors, scales: Sequence[float], taus: Sequence[Tensors]) -> dict[str, Tensor]:
    """``origin + sum(scale * tau)``, in float32 at least, back in the dtype of `origin`."""
    moved = map_tied(_add(scales), taus[0], origin, *taus)
    return {**origin, **moved}


def _add(scales: Sequence[float]) -> Callable[..., Tensor]:
    def add(start: Tensor, *steps: Tensor) -> Tensor:
        total = start.to(torch.promote_types(start.dtype, torch.float32), copy=True)
        for scale, step in zip(scales, steps, strict=True):
            if scale:
                total.add_(step.detach().to(start.device), alpha=scale)
        return total.to(start.dtype)

    return add
