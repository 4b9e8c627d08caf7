"""Frank-Wolfe merging: steps from where the model is towards the fine-tuned model that the gradient points to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import Unpack

from ..._call import WithState
from ..._loss import loss_of
from ..._state import StateLike, Tensors, finite_number, whole_number, wide
from ..._tasks import Task, Tasks, mode
from ...errors import InputError
from .._options import FusionOptions, Weights, checked_options
from .._sources import sources_of
from ..rules.arithmetic import heuristic_scale
from ..vector import TaskVector
from ._interpolated import Interpolated, descend, entropy, kept, prepared, rows_of, shown
from .weights import LearnedWeights, fused_by

__all__ = ["frank_wolfe", "frank_wolfe_coefficients"]

By = Literal["layer", "task"]
Oracle = Literal["inner product", "cosine"]
Loss: TypeAlias = Callable[[Any, Any], Tensor]


def frank_wolfe_coefficients(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    *,
    base: StateLike | None = None,
    by: By = "layer",
    start: float | None = None,
    steps: int = 10,
    step_size: float = 1.0,
    loss: Loss | None = cross_entropy,
    oracle: Oracle = "inner product",
    weights: Weights | None = None,
    skip: str | Iterable[str] = (),
    progress: bool = False,
) -> LearnedWeights:
    r"""The coefficients of Frank-Wolfe merging.

    .. math:: \min_{\theta \in \operatorname{conv} S} L(\theta): \quad
              s_t = \arg\min_{s \in S} \langle \nabla L(\theta_t), s \rangle, \quad
              \theta_{t+1} = (1 - \gamma_t) \theta_t + \gamma_t s_t, \quad \gamma_t = \frac{2 \eta}{t + 2}

    where S are the fine-tuned models :math:`\theta_0 + \tau_q`, and the model at the start,
    :math:`\theta_0 + \lambda \sum_q \tau_q`. L is the mean loss over the tasks. With :math:`\eta = 1` the first step
    goes all the way. A model that no gradient points to never enters, however many there are of its kind.

    The batches are gone through once, moved to the model's device and kept; every step sees all of them. Everything is
    in evaluation mode. In memory are, beside model and vectors, one set of the parameters that change, and its
    gradient.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        model: one encoder for all tasks, or a complete model. Not written to.
        tasks: name -> (head, batches), with logits ``head(model(inputs))``; or the batches of a complete model. Batches
            are (inputs, targets), or mappings with the key "labels". A few samples will do: the paper takes about a
            hundred of every task.
        base: :math:`\theta_0`: a module, a state dict or the path of a checkpoint; None: the weights of `model`.
        by: "layer": every tensor goes its own way, its coefficients are its own; or "task": all go the same.
        start: :math:`\lambda`; None: `heuristic_scale` of N. 0 is the base model.
        steps: each takes one pass of all batches, forward and backward.
        step_size: :math:`\eta`, in (0, 1].
        loss: of logits and targets, the mean over a batch; None: the entropy of the logits, which needs no targets, so
            that batches may be inputs only.
        oracle: "inner product", as in the formula; or "cosine": of the gradient and the model, tensor by tensor, added
            up over the tensors where they go together (the authors' code, FusionBench).
        weights, skip, progress: as for `adamerging_coefficients`.

    Returns:
        `LearnedWeights`, with the loss and the Frank-Wolfe gap :math:`\langle \nabla L(\theta_t), \theta_t - s_t
        \rangle` before each step. Where L is convex, no point of the hull (tensor by tensor, if these go their own way)
        has a loss that is smaller than at :math:`\theta_t` by more than that.

    Raises:
        InputError: no batches, or an iterator that is used up, an argument out of range. StateMismatchError: vectors,
            base and model do not fit. NonFiniteError: NaN or infinity in a vector or a loss. ShapeError: a loss that is
            not one number. TypeError: no module, no function, batches that are no pairs.

    Source: Chen et al., "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization", 2025; the variant with one
        model a step ("hard"), merged by task arithmetic. The step sizes are those of the authors' code.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> base, vectors = {"weight": torch.zeros(1, 1)}, [{"weight": torch.tensor([[w]])} for w in (1.0, 3.0)]
        >>> batches = [(torch.ones(1, 1), torch.tensor([[2.0]]))]
        >>> loss = torch.nn.functional.mse_loss
        >>> found = frank_wolfe_coefficients(vectors, model, batches, base=base, steps=200, loss=loss)
        >>> round(sum(w * v["weight"].item() for w, v in zip(found.weights["weight"], vectors)), 1)
        2.0
    """
    for argument, value, choices in (("by", by, By), ("oracle", oracle, Oracle)):
        if value not in get_args(choices):
            raise InputError(f"{argument}: expected one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")
    count, eta = whole_number(steps, "steps", at_least=0), finite_number(step_size, "step_size", positive=True)
    if eta > 1:
        raise InputError(f"step_size: expected a number in (0, 1], got {eta:g}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected a function of logits and targets or None, got {type(loss).__name__}")
    at = Interpolated(vectors, model, base, FusionOptions(weights=weights, skip=skip))
    first = heuristic_scale(at.count) if start is None else finite_number(start, "start")
    given = prepared(tasks)
    batches = {where: kept(task, where, at.device, labelled=loss is not None) for where, task in given.items()}
    corners = torch.cat(
        [torch.eye(at.count, dtype=torch.float64), torch.full((1, at.count), first, dtype=torch.float64)]
    )
    chosen = corners[-1].repeat(len(at.layers), 1)
    seek = _Oracle(at, corners, cosine=oracle == "cosine", together=by == "task")
    losses, gaps = [], []
    with torch.enable_grad(), mode(False, model, *(task.head for task in given.values())):
        for step in shown(count, "Frank-Wolfe" if progress else None):
            losses.append(_mean_loss(at.at(chosen), at.parameters, given, batches, loss))
            target, slopes = seek()
            gaps.append(float((slopes * (chosen - target)).sum()))
            chosen = chosen + 2 * eta / (step + 2) * (target - chosen)
    return LearnedWeights(MappingProxyType(at.weights(chosen)), tuple(losses), tuple(gaps))


def frank_wolfe(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    *,
    base: StateLike | None = None,
    by: By = "layer",
    start: float | None = None,
    steps: int = 10,
    step_size: float = 1.0,
    loss: Loss | None = cross_entropy,
    oracle: Oracle = "inner product",
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of Frank-Wolfe merging.

    .. math:: \tau_l = \sum_q \lambda_{q,l} \tau_{q,l}, \qquad \lambda \geq 0

    with the :math:`\lambda` of `frank_wolfe_coefficients`: it leads from the base model to a point among the fine-tuned
    models.

    Args:
        vectors, model, tasks, base, by, start, steps, step_size, loss, oracle: as for `frank_wolfe_coefficients`.
        options: as for every rule, see `FusionOptions`.

    Returns:
        The update, a `TaskVector`.

    Raises:
        As `frank_wolfe_coefficients`.

    Source: Chen et al., "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization", 2025.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> vectors, base = [{"weight": torch.eye(2)}, {"weight": -torch.eye(2)}], {"weight": torch.zeros(2, 2)}
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> frank_wolfe(vectors, model, batches, base=base, steps=1).apply_to(base)
        {'weight': tensor([[1., 0.],
                [0., 1.]])}
    """
    options = checked_options(options)
    given = sources_of(vectors, "vectors")
    learn = partial(
        frank_wolfe_coefficients,
        model=model,
        tasks=tasks,
        base=base,
        by=by,
        start=start,
        steps=steps,
        step_size=step_size,
        loss=loss,
        oracle=oracle,
    )
    return fused_by(learn, given, options)


class _Oracle:
    """The corner with the least product with the gradient, as coefficients (L, N), and the slopes."""

    def __init__(self, at: Interpolated, corners: Tensor, *, cosine: bool, together: bool) -> None:
        self.at, self.corners, self.together = at, corners, together
        self.norms: Tensor | None = None
        if cosine:
            columns = []
            for corner in corners:
                at.at(corner.repeat(len(at.layers), 1))
                columns.append(torch.stack([_norm(parameter) for parameter in at.parameters]))
            self.norms = torch.stack(columns, dim=1)

    def __call__(self) -> tuple[Tensor, Tensor]:
        slopes = self.at.slopes()
        scores = slopes @ self.corners.mT  # (L, corners)
        if self.norms is not None:
            products, lengths = [], []
            for layer, parameter in zip(self.at.layers, self.at.parameters, strict=True):
                gradient = wide(torch.zeros_like(layer.base) if parameter.grad is None else parameter.grad)
                products.append(torch.dot(gradient.reshape(-1), wide(layer.base).reshape(-1)).to("cpu", torch.float64))
                lengths.append(_norm(gradient))
            scores = scores + torch.stack(products)[:, None]
            sizes = torch.stack(lengths)[:, None] * self.norms
            scores = torch.where(sizes > 0, scores / sizes, 0.0)
        if self.together:
            return self.corners[scores.sum(0).argmin()].expand(len(slopes), -1), slopes
        return self.corners[scores.argmin(-1)], slopes


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(wide(tensor.detach())).to("cpu", torch.float64)


def _mean_loss(
    call: WithState,
    parameters: list[Tensor],
    tasks: dict[str, Task],
    batches: dict[str, list[tuple[Any, Any, float]]],
    loss: Loss | None,
) -> float:
    """Over all batches of every task; its gradient is added to the parameters'."""
    total = 0.0
    for where, task in tasks.items():
        for inputs, targets, share in batches[where]:

            def down(logits: Tensor, where: str = where, targets: Any = targets, share: float = share) -> float:
                value = entropy(logits) if loss is None else loss_of(loss, logits, targets, where)
                return share * descend(value, share / len(tasks), parameters, where)

            head = rows_of(task.head) if loss is None else task.head
            total += call.inside(down, inputs, where, head=head)
    return total / len(tasks)
