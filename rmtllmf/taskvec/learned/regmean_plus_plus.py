"""RegMean++: RegMean block by block, on the inputs that the blocks get in the merged model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import Unpack

from ..._call import WithState, check_model, state_of
from ..._sample_gradients import under_all_names
from ..._state import StateLike, Tensors, is_bendable, quoted
from ..._tasks import Task, Tasks, as_tasks, device_of, forward, inputs_of, mode
from ...errors import InputError, ShapeError, StateMismatchError
from .._engine import Fusion
from .._options import FusionOptions
from ..rules.regmean import Fits, Unseen, checked_grams
from ..vector import TaskVector
from .input_grams import watched

__all__ = ["regmean_plus_plus"]


def regmean_plus_plus(
    vectors: Iterable[Tensors],
    model: nn.Module,
    tasks: Tasks,
    alpha: float = 0.95,
    *,
    base: StateLike | None = None,
    layers: Sequence[str] | None = None,
    unseen: Unseen = "average",
    scale: float = 1.0,
    **options: Unpack[FusionOptions],
) -> TaskVector:
    r"""The fused update of RegMean++: `regmean`, with the inputs that layers have in the merged model.

    .. math:: \tau^{(l)} = \operatorname{RegMean}\big( \tau_1^{(l)}, \dots, \tau_N^{(l)};\; G_1^{(l)}, \dots, G_N^{(l)}
              \big), \qquad G_q^{(l)} \text{ from } f_q^{(l)} \circ f^{(l-1)} \circ \dots \circ f^{(1)} (x), \quad x \in
              \mathcal{S}_q

    Blocks l of the model are merged in the order in which they are called. For each, every task's inputs go through
    what has been merged (f) and then through the block of that task's fine-tuned model (:math:`f_q`), in which the Gram
    matrices are found, as by `input_grams`. So later layers are fitted to the features that they will get, in place of
    those of the fine-tuned models. What is outside the blocks (embeddings, the first and the last layers) is averaged
    beforehand, and so is what has no Gram matrices.

    Args:
        vectors: N mappings of name -> tensor with the same keys and shapes, of names that `model` has. Not written to.
        model: one encoder for all tasks, or a complete model. Never written to; in evaluation mode meanwhile.
        tasks: N of them in the order of the vectors: name -> (head, batches) or batches. Labels and heads are not
            looked at. The authors take 256 inputs a task.
        alpha: as for `regmean`; .95, as in the authors' code.
        base: :math:`\theta_0`: a module, a state dict or the path of a checkpoint; None: the weights of `model`.
        layers: names of the blocks in the order in which they are called, such as ``["fc1", "fc2"]``. None: the
            children of the list or sequence of two or more modules of one class that has the most parameters, as the
            blocks of a transformer are.
        unseen, scale, options: as for `regmean`.

    Returns:
        The update, a `TaskVector`, as exact as that of `regmean`.

    Raises:
        InputError: `layers` that name nothing, share parameters, or are not called; none found. ShapeError: not as many
        tasks as vectors. StateMismatchError: the vectors have names or shapes that the model lacks. Otherwise as
        `regmean` and `input_grams`.

    Note:
        Memory: the base and the merged model, and the inputs of one block for all batches of all tasks. If blocks do
        not simply follow each other (something happens to their outputs first), the model is called from its start
        again for each of them, and `tasks` must hold batches that can be read again.

    Source: Nguyen, Huu-Tien, Suzuki and Nguyen, "RegMean++: enhancing effectiveness and generalization of regression
    mean for model merging", 2025, section 4. The authors' code, and FusionBench, leave what follows the blocks of CLIP
    as it is in the base; here it is averaged: name it in ``skip`` for theirs.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
        >>> names = {"0.weight": (2, 2), "1.weight": (1, 2)}
        >>> vectors = [{name: torch.full(shape, step) for name, shape in names.items()} for step in (0.5, -0.5)]
        >>> batches = [torch.tensor([[1.0, 0.0], [2.0, 1.0]])]
        >>> update = regmean_plus_plus(vectors, model, {"a": batches, "b": batches}, layers=["0", "1"])
        >>> update["0.weight"].abs().max() < 1e-6  # equal inputs: the average
        tensor(True)
    """
    check_model(model)
    fusion = Fusion(vectors, options)
    fits = Fits(fusion, alpha, unseen, scale)
    named = as_tasks(tasks, "tasks")
    if len(named) != fusion.count:
        raise ShapeError(f"tasks: expected {fusion.count}, one for each vector, got {len(named)}")
    blocks = _blocks(model, layers)
    merging = _Merging(fusion, fits, model, state_of(model, model if base is None else base, "base"))
    with torch.no_grad(), mode(False, model):
        inputs = _Inputs(model, blocks, named)
        inside = {name for block in blocks for name in merging.state if name.startswith(f"{block}.")}
        merging.average([key for key in fusion.keys if key not in inside])
        for index, (name, block) in enumerate(blocks.items()):
            calls = inputs.before(index, merging.state)
            merging.merge(name, block, calls)
    return fusion.by_matrix(
        lambda key, _: merging.updates[key], fits.average, keys=list(merging.updates), weighted=False
    )


class Call(NamedTuple):
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Merging:
    """The merged model as far as it has got.

    Attributes:
        state: name -> tensor of the merged model; of the base where nothing has been merged yet.
        updates: what has been fitted, in the dtype of the calculation.
    """

    def __init__(self, fusion: Fusion, fits: Fits, model: nn.Module, base: dict[str, Tensor]) -> None:
        self.fusion, self.fits, self.base, self.state = fusion, fits, base, dict(base)
        self.updates: dict[str, Tensor] = {}
        unknown = {*fusion.keys, *fusion.alias} - set(base)
        if unknown:
            raise StateMismatchError(f"model lacks {quoted(unknown)}, which the vectors change")
        self.names = {key: [key] for key in fusion.keys}
        for name, key in fusion.alias.items():
            self.names[key].append(name)
        for key, names in self.names.items():
            for name in names:
                shape, expected = tuple(base[name].shape), fusion.specs[key].shape
                if shape != expected:
                    raise StateMismatchError(f"model[{name!r}] has shape {shape}; the vectors have {expected}")

    def average(self, keys: Iterable[str]) -> None:
        """Move these to their average."""
        for key in keys:
            parts = self._parts(key)
            shares = self.fits.shares[key]
            mean = sum((part * share for part, share in zip(parts, shares, strict=True)), torch.zeros_like(parts[0]))
            self._move(key, mean * self.fits.factor)

    def merge(self, name: str, block: nn.Module, calls: Sequence[Sequence[Call]]) -> None:
        """Fit a block to what it does in each task's model, for the calls that it gets in the merged one."""
        prefix = f"{name}."
        grams = []
        for index, (source, own) in enumerate(zip(self.fusion.sources, calls, strict=True)):
            state = _state_of_block(block, prefix, self.base)
            for local, tensor in state.items():
                if prefix + local in source.specs and is_bendable(local, tensor.dtype):
                    step = source.whole(prefix + local).to(tensor.device)
                    state[local] = (tensor + step).to(tensor.dtype)
            with watched(block) as products:
                for args, kwargs in own:
                    functional_call(block, state, args, kwargs)
            means = under_all_names(block, products.means(f"task {index}")) if products.sums else {}
            grams.append({prefix + local: gram for local, gram in means.items()})
        keys = [key for key, names in self.names.items() if any(each.startswith(prefix) for each in names)]
        found = {key: gram for key, gram in checked_grams(self.fusion, grams, expected=False).items() if key in keys}
        self.average(key for key in keys if key not in found)
        for key, gram in found.items():
            if self.fusion.specs[key].size:
                self.updates[key] = self.fits.of(key, self._parts(key), gram)
                self._move(key, self.updates[key])

    def _parts(self, key: str) -> list[Tensor]:
        fusion = self.fusion
        return [source.whole(key, fusion.compute[key], fusion.specs[key].device) for source in fusion.sources]

    def _move(self, key: str, update: Tensor) -> None:
        for name in self.names[key]:
            tensor = self.base[name]
            self.state[name] = (tensor + update.to(tensor.device)).to(tensor.dtype)


class _Inputs:
    """What the blocks of the merged model are called with, for every batch of every task."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], tasks: Mapping[str, Task]) -> None:
        self.model, self.blocks, self.tasks = model, blocks, tasks
        self.calls: list[list[Call]] = []
        self.follow = self.looked = False

    def before(self, index: int, state: Mapping[str, Tensor]) -> list[list[Call]]:
        """For each task the calls of a block in the model with this state, in which all before it are merged."""
        if index and self.follow:
            name, previous = list(self.blocks.items())[index - 1]
            own = _state_of_block(previous, f"{name}.", state)
            self.calls = [[_next(previous, own, call) for call in calls] for calls in self.calls]
        else:
            self.calls = list(self._from_the_start(index, state))
        return self.calls

    def _from_the_start(self, index: int, state: Mapping[str, Tensor]) -> Iterator[list[Call]]:
        model, blocks = WithState(self.model, state), list(self.blocks.values())
        for name, task in self.tasks.items():
            argument = f"tasks[{name!r}]" if name else "tasks"
            calls: list[Call] = []
            for inputs in inputs_of(task.batches, argument, device_of(self.model)):
                if index == 0 and not calls and not self.looked:
                    self.looked = True
                    self.follow = _follow_at_all(model, blocks, inputs)
                calls.append(_caught(model, blocks[index], inputs))
            yield calls


class _CaughtError(Exception):
    """Ends a call of the model where nothing more is wanted."""


def _caught(model: WithState, block: nn.Module, inputs: Any) -> Call:
    """What the block is called with first."""
    found: list[Call] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args, kwargs))
        raise _CaughtError

    handle = block.register_forward_pre_hook(look, with_kwargs=True)
    try:
        forward(model, inputs)
    except _CaughtError:
        pass
    finally:
        handle.remove()
    if not found:
        raise InputError("layers: one of them is not called by the model")
    return found[0]


def _follow_at_all(model: WithState, blocks: Sequence[nn.Module], inputs: Any) -> bool:
    """`_follow`, found out with the first sample alone where the model takes it."""
    if isinstance(inputs, Tensor) and inputs.ndim > 1:
        with suppress(Exception):  # such as a batch size that the model has built in; if not, it is raised below
            return _follow(model, blocks, inputs[:1])
    return _follow(model, blocks, inputs)


def _follow(model: WithState, blocks: Sequence[nn.Module], inputs: Any) -> bool:
    """Whether every block but the first is called with what the one before hands on, and else with the same."""
    seen: list[tuple[nn.Module, Call, Any, int]] = []
    starts: list[tuple[nn.Module, Call, int]] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        starts.append((block, Call(args, kwargs), _version(args)))

    def after(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = _first(output)
        seen.append((block, Call(args, kwargs), first, _version((first,))))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        forward(model, inputs)
    if [block for block, *_ in starts] != list(blocks):
        missing = sum(block not in [started for started, *_ in starts] for block in blocks)
        if missing:
            raise InputError(f"layers: {missing} of {len(blocks)} are not called by the model")
        raise InputError("layers: expected names in the order in which the model calls them, each once")
    for (_, call, output, made), (_, following, given) in zip(seen, starts[1:], strict=False):
        same = len(call.args) == len(following.args) and call.kwargs.keys() == following.kwargs.keys()
        if not same or not following.args or following.args[0] is not output or made != given:
            return False
        rest = zip(
            [*call.args[1:], *call.kwargs.values()], [*following.args[1:], *following.kwargs.values()], strict=True
        )
        if not all(a is b or (isinstance(a, bool | int | float | str) and a == b) for a, b in rest):
            return False
    return True


def _version(args: tuple[Any, ...]) -> int:
    """Changes when the first of them is written to."""
    tracked = args and isinstance(args[0], Tensor) and not args[0].is_inference()
    return args[0]._version if tracked else -1


def _first(output: Any) -> Any:
    """What a block hands on to the next one: the first of what it returns."""
    return output[0] if isinstance(output, tuple) and output else output


def _next(block: nn.Module, state: Mapping[str, Tensor], call: Call) -> Call:
    output = functional_call(block, dict(state), call.args, call.kwargs)
    return Call((_first(output), *call.args[1:]), call.kwargs)


def _state_of_block(block: nn.Module, prefix: str, state: Tensors) -> dict[str, Tensor]:
    """What the model's state has for a block, by the first names that the block has for it."""
    own = [name for name, _ in [*block.named_parameters(), *block.named_buffers()]]
    return {name: state[prefix + name] for name in own if prefix + name in state}


def _blocks(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """Name -> block, in the order given or found."""
    modules = dict(model.named_modules())
    if layers is None:
        lists = {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.ModuleList | nn.Sequential)
            and len(module) > 1
            and len({type(child) for child in module}) == 1
        }
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
        if not any(sizes.values()):
            raise InputError("layers: found no list of blocks of one class in the model; name them")
        longest = max(sizes, key=lambda name: sizes[name])
        prefix = f"{longest}." if longest else ""
        names = [prefix + name for name, _ in lists[longest].named_children()]
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        if not names:
            raise InputError("layers: expected at least one name, got none")
        unknown = [name for name in names if name not in modules or not name]
        if unknown:
            raise InputError(f"layers: the model has no {quoted(unknown)}")
    blocks = {name: modules[name] for name in names}
    owners: dict[int, str] = {}
    for name, block in blocks.items():
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), name) != name:
                raise InputError(f"layers: {owners[id(parameter)]!r} and {name!r} share parameters")
    return blocks
