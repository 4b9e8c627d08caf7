"""Models in, one model out: a rule applied to models in memory, without ever holding their task vectors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from .._state import StateLike, Tensors, as_state, check_keys, identity
from ..errors import InputError, StateMismatchError
from ._agreement import check_model, check_vector, left_alone
from ._kinship import warn_unless_related
from ._options import checked_dtype
from ._sinks import Applied, Memory, Sink
from ._sources import Base, Difference, Source, Stored, source_of
from .aligned import without
from .rules.arithmetic import task_arithmetic
from .vector import TaskVector

__all__ = ["fuse"]

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def rule_given_once(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Says what to do about an option of the rule that is called ``rule``, too, as `dare` has one."""
    place = list(inspect.signature(function).parameters).index("rule")

    @functools.wraps(function)
    def checked(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if len(args) > place and "rule" in kwargs:
            outer, inner = (name_of(rule) for rule in (args[place], kwargs["rule"]))
            raise TypeError(
                f"rule: given twice; {outer} gets a rule of its own by binding it: functools.partial({outer}, "
                f"rule={inner})"
            )
        return function(*args, **kwargs)

    return checked


def name_of(rule: object) -> str:
    """What an error calls a rule."""
    while isinstance(rule, functools.partial):
        rule = rule.func
    return str(getattr(rule, "__name__", type(rule).__name__))


@rule_given_once
def fuse(
    base: StateLike,
    finetuned: Iterable[StateLike],
    rule: Callable[..., Tensors] = task_arithmetic,
    *,
    out: MutableMapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    skip: str | Iterable[str] = (),
    mixed_dtypes: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    r"""Fuse fine-tuned models into one multi-task model.

    .. math:: \theta = \theta_0 + \mathrm{rule}(\theta_1 - \theta_0, \dots, \theta_N - \theta_0)

    The same, bit for bit, as ``rule([TaskVector.between(base, model) for model in finetuned]).apply_to(base)``, but the
    task vectors are made piece by piece and never held: memory is that of the models and the result. (With
    ``compute_dtype=torch.float64`` more exact than that: nothing is rounded before the result.)

    Args:
        base: the pre-trained model: a module, a state dict or the path of a checkpoint (a ``.safetensors`` file, an
            index of shards, or a folder with one of them). Not written to.
        finetuned: N of them with the same keys, shapes and dtypes; or task vectors: a `TaskVector`, or what
            `adapter_vector` or `aligned` gives.
        rule: a rule of this package, or any function of a list of task vectors that returns the update.
        out: a state dict with the names, shapes and dtypes of the result, to be written to and returned: for fusing
            again and again without fresh memory. Must share none with the models.
        dtype: of the fused entries; by default the base's.
        skip: names or glob patterns of what stays as in the base, matched against the names of all models. What it
            names may have another shape or dtype in a fine-tuned model, may be missing there, or be there alone: a
            head of its own, a longer vocabulary.
        mixed_dtypes: let models have other floating dtypes than the base, as after training a bfloat16 model in
            float32. The differences are taken in the wider of the two, and in float32 at least.
        options: of the rule, such as ``density=0.2``, and those of `FusionOptions`. An option of the rule that is
            called as one of these is bound to it: ``functools.partial(dare, rule=ties)``.

    Returns:
        A state dict with the names of `base`; what is not fused (integer and boolean buffers, running statistics,
        ``skip``) is copied from it. Nothing shares memory with `base`; what is tied there stays tied, and changes under
        all its names if one of them is fused. Gradients do not flow.

    Raises:
        StateMismatchError: a missing, extra or reshaped key, or another dtype; names that are tied in `base` and would
        change differently. InputError: task vectors that require gradients; a pattern of `skip` that matches nothing; a
        path of something else than a model. NonFiniteError: NaN or infinity that is not the same in base and model.
        Otherwise as the rule.

    Warns:
        RmtllmfWarning: models whose matrices have nothing in common with the base's, as far as pieces of some of them
        tell, which costs no pass over the data: most likely it is not the base that they were fine-tuned from. Models
        with fewer than eight matrices of a thousand entries are not looked at, and no DTensors.

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
    given = [_source(model, f"finetuned[{index}]") for index, model in enumerate(listed(finetuned))]
    models = [source for source, is_model in given if is_model]
    ready = [source for source, is_model in given if not is_model]
    apart, rest = left_alone(shared.source, models, ready, skip, mixed=mixed_dtypes)
    for model in models:
        check_model(model, shared.source, apart, mixed=mixed_dtypes)
    for vector in ready:
        check_vector(vector, shared.source, apart)
    vectors = [
        Difference(shared, source, source.label, apart) if is_model else without(source, apart)
        for source, is_model in given
    ]
    warn_unless_related(shared.source, models, apart)
    if out is not None:
        if not isinstance(out, Mapping):
            raise TypeError(f"out: expected a mapping of name -> tensor, got {type(out).__name__}")
        check_keys(out, state, "out", "base")
    options |= {"skip": rest} if rest else {}
    fused = run(rule, vectors, Applied(shared, Memory(out, state), checked_dtype(dtype)), options)
    return _completed(fused, state, out)


def run(rule: Callable[..., Tensors], vectors: list[Source], sink: Sink, options: Mapping[str, Any]) -> Any:
    """Let a rule of this package write to `sink`; any other function is given task vectors, and its update written."""
    if not callable(rule):
        raise TypeError(f"rule: expected a function task vectors -> update, got {type(rule).__name__}")
    if is_ours(rule) and _takes_out(rule):
        return rule(vectors, out=sink, **options)
    options = dict(options)
    skip = frozenset(options.pop("skip", ()))  # a function of the caller's need not know it
    update = rule([TaskVector({k: v for k, v in vector.items() if k not in skip}) for vector in vectors], **options)
    if not isinstance(update, Mapping):
        raise TypeError(f"rule: expected it to return a mapping of name -> tensor, got {type(update).__name__}")
    found = source_of(update, "the rule's result")
    for key, spec in found.specs.items():
        if key not in vectors[0].specs or key in skip:
            raise StateMismatchError(f"the rule's result has the unexpected {key!r}; the task vectors lack it")
        if spec.shape != vectors[0].specs[key].shape:
            raise StateMismatchError(
                f"the rule's result has the shape {spec.shape} for {key!r}; the task vectors have "
                f"{vectors[0].specs[key].shape}"
            )
    return task_arithmetic([found], 1.0, out=cast(Any, sink))


def is_ours(rule: Callable[..., Any]) -> bool:
    """Whether it is a rule of this package, options bound or not."""
    while isinstance(rule, functools.partial):
        rule = rule.func
    name = getattr(rule, "__qualname__", "<")
    return str(getattr(rule, "__module__", "")).startswith(f"{__package__}.") and "<" not in name


def _takes_out(rule: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(rule).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "out" or (p.kind == p.VAR_KEYWORD and p.name == "options") for p in parameters)


def listed(finetuned: object) -> list[Any]:
    """The models, at least one."""
    if isinstance(finetuned, Mapping | str | bytes | Tensor | nn.Module) or not isinstance(finetuned, Iterable):
        raise TypeError(f"finetuned: expected a sequence of models, got a single {type(finetuned).__name__}")
    models = list(finetuned)
    if not models:
        raise InputError("finetuned: expected at least one model, got none")
    return models


def _source(model: Any, label: str) -> tuple[Source, bool]:
    """What was given, and whether it is a model; else it is a task vector."""
    if isinstance(model, Source | TaskVector):
        return source_of(model, label), False
    return Stored(as_state(model, label), label), True


def _completed(fused: Tensors, state: Tensors, out: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The fused entries, and copies of the base's for the rest, in the order of the base."""
    moved: dict[Hashable, str] = {}  # memory of the base -> the first name under which it changes
    model = {}
    for key in state:
        if key in fused:
            twin = moved.setdefault(identity(state[key]), key)
            if fused[twin] is not fused[key] and not torch.equal(fused[twin], fused[key]):
                raise StateMismatchError(
                    f"{twin!r} and {key!r} are tied in base, but would change differently; skip one of them"
                )
            model[key] = fused[twin]
    copies: dict[Hashable, Tensor] = {memory: model[key] for memory, key in moved.items()}
    for key in state:
        if key in fused:
            continue
        memory = identity(state[key])
        if out is not None:
            out[key].detach().copy_(copies.get(memory, state[key].detach()))
        elif memory not in copies:
            copies[memory] = state[key].detach().clone()
        if out is None:
            model[key] = copies[memory]
    return {key: model[key] if out is None else out[key] for key in state}
