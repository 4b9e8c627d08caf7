"""AdaMerging: coefficients for which the fused model is sure of its predictions, from unlabelled inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal, get_args

from torch import nn
from typing_extensions import Unpack

from ..._call import WithState
from ..._state import StateLike, Tensors
from ..._tasks import Tasks
from ...errors import InputError
from .._options import FusionOptions, Weights, checked_options
from .._sources import sources_of
from ..rules.ties import ties
from ..vector import TaskVector
from ._interpolated import Interpolated, endless, mean_entropy, prepared
from ._schedule import Schedule
from .weights import LearnedWeights, fused_by

__all__ = ["adamerging", "adamerging_coefficients"]

By = Literal["layer", "task"]


def adamerging_coefficients(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    *,
    base: StateLike | None = None,
    by: By = "layer",
    start: float = 0.3,
    steps: int = 500,
    lr: float = 1e-3,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    weights: Weights | None = None,
    skip: str | Iterable[str] = (),
    progress: bool = False,
) -> LearnedWeights:
    r"""The coefficients of AdaMerging.

    .. math:: \min_\lambda \sum_i \mathbb{E}_x\, H\bigl(h_i(f(x; \theta(\lambda)))\bigr), \qquad
              \theta_l(\lambda) = \theta_{0,l} + \sum_q \lambda_{q,l} \tau_{q,l}, \qquad
              H(z) = -\sum_k p_k \log p_k, \quad p = \operatorname{softmax} z

    by Adam, one batch of every task a step; batches are started again when they end. No labels are used: entropy
    stands in for the loss. Everything is in evaluation mode.

    In memory are, beside model and vectors, one set of the parameters that change, and its gradient, for any number of
    vectors and tasks. A step costs a pass forward and backward for every task, one sum and one inner product a vector.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes. Not written to.
        model: one encoder for all tasks, or a complete model. Not written to.
        tasks: name -> (head, batches), with logits ``head(model(inputs))``; or the batches of a complete model. Batches
            are inputs or (inputs, targets), of which the targets are not looked at, no more than the key "labels" of
            mappings. The paper uses the test inputs, 16 a batch. The order of the tasks need not be that of the
            vectors.
        base: :math:`\theta_0`: a module, a state dict or the path of a checkpoint; None: the weights of `model`.
        by: "layer": a coefficient for every tensor of every vector, or "task": one for every vector.
        start: every coefficient before the first step.
        steps: of Adam. The authors' code takes 500.
        lr: of Adam, with betas (0.9, 0.999) and no weight decay.
        bounds: where coefficients may be; put back after every step. None: anywhere.
        weights: of the vectors, as in `FusionOptions`: :math:`w \tau` takes the place of :math:`\tau`.
        skip: names that stay as in the base, as in `FusionOptions`.
        progress: show a progress bar.

    Returns:
        `LearnedWeights`: :math:`\lambda_{q,l} w_{q,l}` by name, and the tasks' mean entropy before each step, in nats.

    Raises:
        InputError: no batches, an iterator that is used up or shared, an argument out of range, a loss that does not
            depend on what the vectors change. StateMismatchError: vectors, base and model do not fit, or the vectors
            change two names of a tied tensor differently. NonFiniteError: NaN or infinity in a vector or a loss.
            ShapeError: logits that are no (..., K). TypeError: no module, batches that are none.

    Source: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", 2024. The authors' code clamps
        the coefficients to [0, 1] inside of the model, where one that has left has no gradient to come back with; here
        it is put on the bound. FusionBench does not clamp by default.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> base = {"weight": torch.eye(2)}
        >>> surer, less_sure = {"weight": torch.eye(2)}, {"weight": -torch.eye(2)}
        >>> found = adamerging_coefficients([surer, less_sure], model, [torch.eye(2)], base=base, steps=20, lr=0.01)
        >>> [round(c, 2) for c in found.weights["weight"]]
        [0.5, 0.1]
    """
    if by not in get_args(By):
        raise InputError(f"by: expected 'layer' or 'task', got {by!r}")
    schedule = Schedule.of(start, steps, lr, bounds)
    at = Interpolated(vectors, model, base, FusionOptions(weights=weights, skip=skip))
    given = prepared(tasks)
    streams = {where: endless(task, where, at.device) for where, task in given.items()}

    def objective(call: WithState) -> float:
        return mean_entropy(call, at.parameters, given, streams)

    bar = "AdaMerging" if progress else None
    return schedule.run(at, model, given.values(), objective, shared=by == "task", bar=bar)


def adamerging(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    *,
    base: StateLike | None = None,
    by: By = "layer",
    density: float | None = None,
    start: float = 0.3,
    steps: int = 500,
    lr: float = 1e-3,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of AdaMerging and AdaMerging++.

    .. math:: \tau_l = \sum_q \lambda_{q,l} \tau_{q,l}

    with the :math:`\lambda` of `adamerging_coefficients`. With a `density` this is AdaMerging++: each vector is first
    replaced by what `ties` keeps of it, its largest entries where their sign is the elected one. These take the memory
    of the vectors once more.

    Args:
        vectors, model, tasks, base, by, start, steps, lr, bounds: as for `adamerging_coefficients`.
        density: None: AdaMerging. A share in (0, 1], of the paper .2: AdaMerging++.
        options: as for every rule, see `FusionOptions`.

    Returns:
        The update, a `TaskVector`.

    Raises:
        As `adamerging_coefficients`; for a density that is no share InputError.

    Source: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", 2024. Where trimmed entries
        elect no sign the update is 0; the authors' code takes the sign of the majority of all entries.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> base = {"weight": torch.eye(2)}
        >>> vectors = [{"weight": torch.eye(2)}, {"weight": -torch.eye(2)}]
        >>> update = adamerging(vectors, model, [torch.eye(2)], base=base, steps=20, lr=0.01)
        >>> update.apply_to(base)["weight"].round(decimals=1)
        tensor([[1.4000, 0.0000],
                [0.0000, 1.4000]])
    """
    options = checked_options(options)
    given: Sequence[Tensors] = sources_of(vectors, "vectors")
    if density is not None:
        given = survivors(given, density, options)
        options.pop("skip", None)
    learn = partial(
        adamerging_coefficients,
        model=model,
        tasks=tasks,
        base=base,
        by=by,
        start=start,
        steps=steps,
        lr=lr,
        bounds=bounds,
    )
    return fused_by(learn, given, options)


def survivors(vectors: Sequence[Tensors], density: float, options: FusionOptions) -> list[Tensors]:
    """What TIES keeps of each vector: their sum is TIES with the combination "sum"."""
    kept: list[Tensors] = []
    for index in range(len(vectors)):
        only = [float(index == other) for other in range(len(vectors))]
        limited = FusionOptions(skip=options.get("skip", ()), compute_dtype=options.get("compute_dtype"), weights=only)
        kept.append(ties(vectors, density, combine="sum", voters="trimmed", **limited))
    return kept
