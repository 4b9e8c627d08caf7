"""The paper's resilient fusion: fuse what was received, restore the embeddings, realign the rest."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, ValuesView

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._state import (
    StateLike,
    Tensors,
    as_state,
    as_vectors,
    check_dtypes,
    check_keys,
    check_shapes,
    identity,
    is_bendable,
    quoted,
    select_names,
)
from .._tasks import Tasks
from ..errors import InputError, StateMismatchError
from ..taskvec import TaskVector, task_arithmetic
from .keys import embedding_keys
from .realign import Loss, MakeOptimizer, Realignment, prepare
from .restore import restore

__all__ = ["resilient_fusion"]


def resilient_fusion(
    model: nn.Module,
    base: StateLike,
    received: Iterable[Tensors],
    tasks_or_batches: Tasks,
    *,
    rule: Callable[[list[TaskVector]], Tensors] = task_arithmetic,
    frozen: str | Iterable[str] | None = None,
    steps: int = 100,
    trainable: str | Iterable[str] | None = None,
    loss: Loss = cross_entropy,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup: float | None = None,
    optimizer: MakeOptimizer | None = None,
    progress: bool = False,
) -> Realignment:
    r"""R-MTLLMF: fuse the received task vectors, restore the frozen parameters, realign the rest; in place.

    .. math:: \theta = \theta_{\text{base}} + \mathrm{rule}(\hat\tau_1, \dots, \hat\tau_N), \qquad
              \theta_{\mathcal{E}} \leftarrow \theta_{\text{base}, \mathcal{E}}, \qquad
              \min_{\theta_j,\ j \notin \mathcal{E}} \frac{1}{N} \sum_i \ell_i(\theta)

    With ``frozen=()`` and ``steps=0`` it is the unprotected fusion.

    Args:
        model: receives the result; whatever it holds before is overwritten. May be the same object as `base`.
        base: what the task vectors were taken from: a module, a state dict or the path of a checkpoint.
        received: the N task vectors as they came over the channel, mappings of name -> tensor.
        tasks_or_batches: name -> (head, batches), or the batches of a complete model, as for `realign`.
        rule: a list of `TaskVector` -> the fused update, such as any rule of `rmtllmf.taskvec`; to set its options
            pass ``functools.partial(task_arithmetic, scale=0.4)``. What the update does not name stays as in `base`.
        frozen: names or glob patterns of what is restored and not trained; None: `embedding_keys` of the model.
            A tied parameter is meant under any of its names.
        steps: realignment steps, at least 0.
        trainable, loss, lr, weight_decay, warmup, optimizer, progress: as for `realign`.

    Returns:
        The `Realignment`.

    Raises:
        InputError: no embeddings found and `frozen` not given, or an argument that `realign` refuses. All arguments
            but the batches are checked before the model is touched.
        StateMismatchError: model, base and received vectors do not fit together.
        NonFiniteError: a loss that is not finite; the model is left fused and restored, as of the step before.

    Source: R-MTLLMF, section III.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> heard = [{name: torch.randn_like(tensor) for name, tensor in base.items()} for _ in range(2)]
        >>> batches = [(torch.eye(4), torch.tensor([0, 0, 1, 1]))]
        >>> done = resilient_fusion(model, base, heard, batches, frozen="0.*", steps=5)
        >>> done.trained, bool((model[0].weight == base["0.weight"]).all())
        (('1.weight', '1.bias'), True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(rule):
        raise TypeError(f"rule: expected a function task vectors -> update, got {type(rule).__name__}")
    everything = model.state_dict(keep_vars=True)  # the parameters themselves, which tells ties
    current = {name: tensor for name, tensor in everything.items() if isinstance(tensor, Tensor)}
    original = as_state(base, "base")
    check_keys(original, current, "base", "model")
    check_shapes(original, current, "base", "model")
    check_dtypes(original, current, "base", "model")
    vectors = _as_task_vectors(received)
    names = _frozen_names(model, current, frozen)
    plan = prepare(
        model,
        tasks_or_batches,
        steps=steps,
        frozen=names,
        trainable=trainable,
        loss=loss,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        optimizer=optimizer,
        progress=progress,
    )
    update = rule(vectors)
    if not isinstance(update, Mapping):
        raise TypeError(f"rule: expected it to return a mapping of name -> tensor, got {type(update).__name__}")
    if not isinstance(update, TaskVector):
        update = TaskVector(update)
    unknown = set(update) - set(vectors[0])
    if unknown:
        raise StateMismatchError(f"rule's result has the unexpected {quoted(unknown)}, which no received vector names")
    # what is restored anyway need not be fused first; tied names may have been bent each on its own
    rest = [name for name in update if name not in names]
    fused = update.select(rest).apply_to(original) if rest else original
    _write(current, restore(fused, original, names))
    return plan.run()


def _as_task_vectors(received: Iterable[Tensors]) -> list[TaskVector]:
    """What a rule is given: the vectors themselves, or the floating-point entries of other mappings."""
    given = list(received) if isinstance(received, Iterator | ValuesView) else received
    states = as_vectors(given, "received")
    return [
        vector
        if isinstance(vector, TaskVector)
        else TaskVector({name: tensor for name, tensor in state.items() if is_bendable(name, tensor.dtype)})
        for vector, state in zip(given, states, strict=True)
    ]


def load(model: nn.Module, state: StateLike) -> None:
    """Write a state into a model, all of it; an error before anything is written unless it fits."""
    everything = model.state_dict(keep_vars=True)
    current = {name: tensor for name, tensor in everything.items() if isinstance(tensor, Tensor)}
    tensors = as_state(state, "base")
    check_keys(tensors, current, "base", "model")
    check_shapes(tensors, current, "base", "model")
    check_dtypes(tensors, current, "base", "model")
    _write(current, tensors)


def _write(current: Mapping[str, Tensor], state: Tensors) -> None:
    """Into the model's own tensors; what is one tensor there must not be two different ones in `state`."""
    names: dict[Hashable, str] = {}
    for name, tensor in current.items():
        twin = names.setdefault(identity(tensor), name)
        if state[name] is not state[twin] and not torch.equal(state[name], state[twin]):
            raise StateMismatchError(
                f"{twin!r} and {name!r} are one tensor in the model, but fused to two different ones; the base or the "
                "received vectors have lost the tie: freeze it, or leave one of the names out of the vectors"
            )
    with torch.no_grad():
        for name in names.values():
            current[name].copy_(state[name])


def _frozen_names(model: nn.Module, state: Mapping[str, Tensor], frozen: str | Iterable[str] | None) -> list[str]:
    """All names of the frozen entries, those of their ties included: the channel may have bent each on its own."""
    if frozen is None:
        found: Iterable[str] = embedding_keys(model)
        if not found:
            raise InputError(
                "frozen: no embeddings were recognised in the model; name what to protect (names or glob patterns), "
                "or pass frozen=() to protect nothing"
            )
    else:
        found = select_names(state, frozen, "frozen")
    memory = {identity(state[name]) for name in found}
    return [name for name in state if identity(state[name]) in memory]
