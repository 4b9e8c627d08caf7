"""A base model plus task vectors, as a function of the vectors' coefficients, and its gradients.

In memory there is one set of parameters, written anew for all coefficients, and their gradient; the vectors are read
one tensor at a time. The model itself stays untouched.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._call import WithState, check_model, state_of
from ..._state import StateLike, Tensors, all_finite, identity, is_bendable, quoted, wide
from ..._tasks import Head, Task, Tasks, as_tasks, device_of, inputs_of, pairs
from ...errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from .._engine import Fusion
from .._options import FusionOptions


class Layer(NamedTuple):
    """One tensor of the model that the vectors change, under all names that they have for it."""

    names: tuple[str, ...]
    place: str  # its name in `WithState.state`
    base: Tensor
    weights: tuple[float, ...]  # those that the caller gave to the vectors


class Interpolated:
    r"""The model at :math:`\theta_l = \theta_{0,l} + \sum_q c_{l,q} w_{l,q} \tau_{q,l}`.

    Attributes:
        count: number of vectors.
        layers: what moves, in the order of the model.
        device: where the model is.
    """

    def __init__(
        self, vectors: Iterable[Tensors], model: nn.Module, base: StateLike | None, options: FusionOptions
    ) -> None:
        check_model(model)
        self.fusion = Fusion(vectors, FusionOptions(weights=options.get("weights"), skip=options.get("skip", ())))
        self.count = self.fusion.count
        self.device = device_of(model)
        state = state_of(model, model if base is None else base, "base")
        self.base = WithState(model, state)
        self.layers = self._layers(model, state)
        for layer in self.layers:
            for source in self.fusion.sources:
                if not all_finite(source.whole(layer.names[0])):
                    raise self.fusion.blame(layer.names[0])
        self.parameters = [torch.empty_like(layer.base).requires_grad_() for layer in self.layers]
        current = model.state_dict(keep_vars=True)
        self._buffers = {name: t for name, t in self.base.state.items() if not isinstance(current[name], nn.Parameter)}
        self._buffers |= {name: t.detach() for name, t in model.named_buffers() if name not in current}

    def _layers(self, model: nn.Module, state: Tensors) -> list[Layer]:
        fusion = self.fusion
        fused = {*fusion.keys, *fusion.alias}
        if fused - set(state):
            raise StateMismatchError(f"model lacks {quoted(fused - set(state))}, which the vectors change")
        for key in fused:
            shape, expected = tuple(state[key].shape), fusion.specs[fusion.alias.get(key, key)].shape
            if shape != expected:
                raise StateMismatchError(f"model[{key!r}] has shape {shape}; {fusion.sources[0].label} has {expected}")
        tied: dict[Hashable, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                tied.setdefault(identity(tensor), []).append(name)
        layers = []
        for names in tied.values():
            moving = [name for name in names if name in fused]
            for name in moving:
                if not is_bendable(name, state[name].dtype):
                    raise StateMismatchError(f"model[{name!r}] is {state[name].dtype}, but the vectors change it")
                self._check_one(moving[0], name)
            if moving:
                place = next(name for name in reversed(names) if name in self.base.state)
                layers.append(Layer(tuple(moving), place, state[place], tuple(fusion.weights(moving[0]))))
        return layers

    def _check_one(self, first: str, name: str) -> None:
        """Raise unless the vectors change both names, which are one tensor in the model, in the same way."""
        if name == first or self.fusion.alias.get(name, name) == self.fusion.alias.get(first, first):
            return
        same = all(torch.equal(source.whole(name), source.whole(first)) for source in self.fusion.sources)
        if not same or self.fusion.weights(name) != self.fusion.weights(first):
            raise StateMismatchError(
                f"{first!r} and {name!r} are one tensor in the model, but the vectors change them differently; skip one"
            )

    @torch.no_grad()
    def at(self, coefficients: Tensor) -> WithState:
        """The model with (L, N) coefficients, whose parameters ask for gradients; until the next call."""
        for layer, parameter, row in zip(self.layers, self.parameters, coefficients.tolist(), strict=True):
            total = wide(parameter.copy_(layer.base))
            for step, a, w in zip(self.steps(layer, total.dtype), row, layer.weights, strict=True):
                if a * w != 0:
                    total.add_(step, alpha=a * w)
            if total is not parameter:
                parameter.copy_(total)
        return self.call()

    def call(self) -> WithState:
        """The model with `parameters` as they are, which ask for gradients, and fresh copies of all buffers."""
        for parameter in self.parameters:
            parameter.grad = None
        moved = {layer.place: parameter for layer, parameter in zip(self.layers, self.parameters, strict=True)}
        return self.base.replaced({name: buffer.clone() for name, buffer in self._buffers.items()} | moved)

    def slopes(self) -> Tensor:
        """(L, N), on the CPU in float64: the derivatives of what was added up in the parameters' gradients."""
        return torch.stack([self.products(index).to("cpu", torch.float64) for index in range(len(self.layers))])

    @torch.no_grad()
    def products(self, index: int) -> Tensor:
        """(N,) the inner products of the gradient of a layer with the vectors, each times its weight."""
        layer, gradient = self.layers[index], self.parameters[index].grad
        if gradient is None:
            return torch.zeros(self.count, device=self.parameters[index].device)
        flat = wide(gradient).reshape(-1)
        steps = zip(self.steps(layer, flat.dtype), layer.weights, strict=True)
        return torch.stack([torch.dot(flat, step.reshape(-1)) * w for step, w in steps])

    def steps(self, layer: Layer, dtype: torch.dtype) -> Iterator[Tensor]:
        """The vectors' tensors of a layer, one by one, where the model is; not to be written to."""
        for source in self.fusion.sources:
            yield source.whole(layer.names[0], dtype, layer.base.device)

    def weights(self, coefficients: Tensor) -> dict[str, tuple[float, ...]]:
        """For each name what its vectors are multiplied by, in the order of the vectors' names."""
        rows: dict[str, tuple[float, ...]] = {}
        for layer, row in zip(self.layers, coefficients.tolist(), strict=True):
            numbers = tuple(a * w for a, w in zip(row, layer.weights, strict=True))
            rows |= dict.fromkeys(layer.names, numbers)
        return {name: rows[name] for name in self.fusion.sources[0].specs if name in rows}


def prepared(tasks: Tasks) -> dict[str, Task]:
    """The tasks under the names that errors have for them; no two may share an iterator."""
    given = as_tasks(tasks, "tasks")
    streams = [task.batches for task in given.values() if isinstance(task.batches, Iterator)]
    if len({id(stream) for stream in streams}) < len(streams):
        raise InputError("tasks: two tasks share one iterator, and would get every other batch of it")
    return {f"tasks[{name!r}]" if name else "tasks": task for name, task in given.items()}


def endless(task: Task, where: str, device: torch.device | None) -> Iterator[Any]:
    """The inputs of a task's batches, again and again."""
    while True:
        yield from inputs_of(task.batches, where, device)


def kept(task: Task, where: str, device: torch.device | None, *, labelled: bool) -> list[tuple[Any, Any, float]]:
    """(inputs, targets, share) of all batches: every sample counts the same, if targets or inputs are tensors."""
    if labelled:
        batches = list(pairs(task.batches, where, device))
    else:
        batches = [(inputs, None) for inputs in inputs_of(task.batches, where, device)]
    counted = [(targets if labelled else inputs) for inputs, targets in batches]
    sizes = [len(rows) if isinstance(rows, Tensor) and rows.ndim else None for rows in counted]
    numbers = [1] * len(sizes) if None in sizes else [size or 0 for size in sizes]
    total = sum(numbers)
    if not total:
        raise InputError(f"{where}: expected at least one sample, got only empty batches")
    return [(*batch, number / total) for batch, number in zip(batches, numbers, strict=True) if number]


def rows_of(head: Head | None) -> Head:
    """The output of the encoder -> logits, one row for each sample (and token, pixel, ...)."""

    def logits(output: Any) -> Any:
        found = output if head is None else head(output)
        found = found if isinstance(found, Tensor) else getattr(found, "logits", found)
        return found.flatten(0, -2) if isinstance(found, Tensor) and found.ndim > 2 else found

    return logits


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy, in nats, of (B, K) logits."""
    z = wide(logits)
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


def mean_entropy(
    call: WithState, parameters: Sequence[Tensor], tasks: Mapping[str, Task], streams: Mapping[str, Iterator[Any]]
) -> float:
    """Of the next batch of every task; the gradient of their sum is added to the parameters'."""
    total = 0.0
    for where, task in tasks.items():

        def down(logits: Tensor, where: str = where) -> float:
            return descend(entropy(logits), 1.0, parameters, where)

        total += call.inside(down, next(streams[where]), where, head=rows_of(task.head))
    return total / len(tasks)


def descend(value: Any, share: float, parameters: Sequence[Tensor], what: str) -> float:
    """Add the gradient of ``share * value`` to the parameters'; the value."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(value).__name__} for {what}")
    if value.numel() != 1:
        raise ShapeError(f"loss: expected one number, got shape {tuple(value.shape)} for {what}; reduce it to a mean")
    number = float(value.detach())
    if not math.isfinite(number):
        raise NonFiniteError(f"loss of {what} is {number}")
    if not value.requires_grad:
        raise InputError(f"loss of {what} does not depend on what the vectors change")
    (share * value).backward(inputs=list(parameters))
    return number


def shown(count: int, what: str | None) -> Iterable[int]:
    """``range(count)``, with a progress bar that says `what`."""
    if what is None:
        return range(count)
    from tqdm.auto import tqdm

    return tqdm(range(count), desc=what, unit=" steps")
