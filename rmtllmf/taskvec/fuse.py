"""Models in, one model out: a rule applied to models in memory, without ever holding their task vectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._state import StateLike, Tensors, as_state, check_dtypes, check_keys, check_shapes, identity
from ..errors import StateMismatchError
from ._sinks import Applied, Memory, Sink
from ._sources import Base, Difference, Source, Stored
from .arithmetic import task_arithmetic
from .vector import TaskVector

__all__ = ["fuse"]


def fuse(
    base: StateLike,
    finetuned: Iterable[StateLike],
    rule: Callable[..., Tensors] = task_arithmetic,
    *,
    out: MutableMapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    r"""Fuse fine-tuned models into one multi-task model.

    .. math:: \theta = \theta_0 + \mathrm{rule}(\theta_1 - \theta_0, \dots, \theta_N - \theta_0)

    The same, bit for bit, as ``rule([TaskVector.between(base, model) for model in finetuned]).apply_to(base)``, but the
    task vectors are made piece by piece and never held: memory is that of the models and the result.

    Args:
        base: the pre-trained model: a module, a state dict or the path of a safetensors file. Not written to.
        finetuned: N of them with the same keys, shapes and dtypes; or task vectors, where a `TaskVector` is given.
        rule: a rule of this package, or any function of a list of task vectors that returns the update.
        out: a state dict with the names, shapes and dtypes of the result, to be written to and returned: for fusing
            again and again without fresh memory.
        dtype: of the fused entries; by default the base's.
        options: of the rule, such as ``density=0.2``, and those of `FusionOptions`.

    Returns:
        A state dict with the names of `base`; what is not fused (integer and boolean buffers, running statistics,
        ``skip``) is copied from it. Nothing shares memory with `base`.

    Raises:
        StateMismatchError: a missing, extra or reshaped key, or another dtype. NonFiniteError: NaN or infinity that is
        not the same in base and model. Otherwise as the rule.

    Source: Ilharco et al., "Editing models with task arithmetic", 2023; R-MTLLMF, eq. 1 and 6.

    Example:
        >>> import torch
        >>> base = {"w": torch.tensor([10.0]), "steps": torch.tensor(7)}
        >>> tuned = [{"w": torch.tensor([w]), "steps": torch.tensor(9)} for w in (11.0, 13.0)]
        >>> fuse(base, tuned, scale=0.5)
        {'w': tensor([12.]), 'steps': tensor(7)}
    """
    state = as_state(base, "base")
    shared = Base(Stored(state, "base"))
    vectors = [_vector(shared, state, model, f"finetuned[{index}]") for index, model in enumerate(_listed(finetuned))]
    if out is not None:
        check_keys(out, state, "out", "base")
    fused = run(rule, vectors, Applied(shared, Memory(out, more=True), dtype), options)
    return _completed(fused, state, out)


def run(rule: Callable[..., Tensors], vectors: list[Source], sink: Sink, options: Mapping[str, Any]) -> Any:
    """Let `rule` write to `sink`; a function that takes no ``out`` is given task vectors, and its update written."""
    if not callable(rule):
        raise TypeError(f"rule: expected a function task vectors -> update, got {type(rule).__name__}")
    if _takes_out(rule):
        return rule(vectors, out=sink, **options)
    update = rule([TaskVector(vector) for vector in vectors], **options)
    if not isinstance(update, Mapping):
        raise TypeError(f"rule: expected it to return a mapping of name -> tensor, got {type(update).__name__}")
    unknown = set(update) - set(vectors[0]) if vectors else set()
    if unknown:
        raise StateMismatchError(f"rule's result has the unexpected {sorted(unknown)[:5]}")
    return task_arithmetic([update], 1.0, out=cast(Any, sink))


def _takes_out(rule: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(rule).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "out" or (p.kind == p.VAR_KEYWORD and p.name == "options") for p in parameters)


def _listed(finetuned: object) -> list[Any]:
    if isinstance(finetuned, Mapping | str | bytes | Tensor | nn.Module) or not isinstance(finetuned, Iterable):
        raise TypeError(f"finetuned: expected a sequence of models, got a single {type(finetuned).__name__}")
    return list(finetuned)


def _vector(base: Base, state: Tensors, model: Any, label: str) -> Source:
    if isinstance(model, Source):
        return model
    if isinstance(model, TaskVector):
        unknown = set(model) - set(state)
        if unknown:
            raise StateMismatchError(f"{label} names {sorted(unknown)[:5]}, which base lacks")
        check_shapes(model, state, label, "base")
        return Stored(model, label)
    tensors = as_state(model, label)
    check_keys(tensors, state, label, "base")
    check_shapes(tensors, state, label, "base")
    check_dtypes(tensors, state, label, "base")
    return Difference(base, Stored(tensors, label), label)


def _completed(fused: Tensors, state: Tensors, out: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The fused entries, and copies of the base's for the rest, in the order of the base."""
    copies: dict[Hashable, Tensor] = {}
    model = {}
    for key, tensor in state.items():
        if key in fused:
            model[key] = fused[key] if out is None else out[key]
        elif out is not None:
            model[key] = out[key].copy_(tensor)
        else:
            memory = identity(tensor)
            if memory not in copies:
                copies[memory] = tensor.detach().clone()
            model[key] = copies[memory]
    return model
