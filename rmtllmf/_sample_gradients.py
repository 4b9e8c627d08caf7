"""Gradients of single samples, many at a time, of a model that stays untouched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ._call import WithState, state_of
from ._loss import loss_of
from ._state import StateLike, Tensors
from ._tasks import Head, Task, device_of, logits_of, pairs
from .errors import InputError, NonFiniteError, ShapeError

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Found = TypeVar("Found")

ENTRIES = 1 << 28  # of gradients held at once: 1 GiB in float32


def parameters_of(model: nn.Module, state: StateLike | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The floating-point parameters of a model by their first names, and all else in its state.

    With `state` the values are those; they must fit the model, and entries that are tied in it be equal.
    """
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if not any(p.numel() for p in parameters.values()):
        raise InputError("model: expected floating-point parameters, found none")
    buffers: dict[str, Tensor] = dict(model.named_buffers())
    others: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name not in parameters}
    if state is not None:
        given = state_of(model, state, "state")
        WithState(model, given)  # raises where ties are broken
        parameters = {name: given[name] for name in parameters}
        buffers |= {name: given[name] for name in buffers if name in given}
        others = {name: given[name] for name in others}
    return {name: p.detach() for name, p in parameters.items()}, {**buffers, **others}


def under_all_names(model: nn.Module, found: Mapping[str, Found]) -> dict[str, Found]:
    """`found` for the first names of parameters, under all names of those that are tied."""
    names = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: found[names[id(p)]] for name, p in every if names[id(p)] in found}


class SampleGradients:
    """The gradients of a loss by the parameters, for every sample of a batch.

    Many at a time (``torch.func.vmap`` of ``torch.func.grad``); sample by sample where these transformations refuse the
    model, or where the gradients of two samples take more than `ENTRIES`. The model should be in evaluation mode.

    Args:
        model: called with `parameters` and copies of `rest` in place of its own.
        parameters: name -> tensor to differentiate by.
        loss: of the logits and targets of a batch of one sample, one number.
        rest: buffers and what else is no parameter; None: the model's buffers.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, Tensor], loss: Loss, rest: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model, self.parameters, self.loss = model, parameters, loss
        self.rest = dict(model.named_buffers()) if rest is None else dict(rest)
        self.chunk = ENTRIES // sum(p.numel() for p in parameters.values())
        self.together = self.chunk > 1

    def of(
        self, head: Head | None, batch: tuple[Any, Any], summed: Callable[[Iterator[Tensors]], Found], argument: str
    ) -> tuple[int, Found]:
        r"""The number of samples, and what `summed` makes of their gradients.

        It is given mappings of name -> (samples, \*shape) for some samples each; a name of which the loss of a sample
        does not depend may be missing. Called again, from the start, if the transformations failed.
        """
        tensors: list[Tensor] = []
        _each(lambda tensor: tensors.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) != 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensors"
            raise ShapeError(f"{argument}: expected tensors with one sample in each row, got shapes {shapes}")
        (samples,) = sizes

        def value(parameters: dict[str, Tensor], *rows: Tensor) -> Tensor:
            left = iter(rows)
            inputs, targets = _each(lambda _: next(left).unsqueeze(0), batch)
            return self._value(head, parameters, inputs, targets, argument)

        if self.together:
            try:
                return samples, summed(self._vmapped(value, tensors, samples))
            except Exception:  # whatever it is: if it is not the transformation's, the loop raises it again
                self.together = False
        return samples, summed(self._looped(value, tensors, samples))

    def logits(self, head: Head | None, inputs: Any, parameters: dict[str, Tensor] | None = None) -> Any:
        """What the loss is given."""
        state = {**{name: tensor.clone() for name, tensor in self.rest.items()}, **(parameters or self.parameters)}
        return logits_of(lambda *args, **kwargs: functional_call(self.model, state, args, kwargs), head, inputs)

    def _vmapped(self, value: Callable[..., Tensor], tensors: list[Tensor], samples: int) -> Iterator[Tensors]:
        gradients = vmap(grad(value), in_dims=(None, *[0] * len(tensors)))
        for start in range(0, samples, self.chunk):
            with warnings.catch_warnings(), torch.no_grad():  # no graph beyond that of `grad` itself
                warnings.filterwarnings("ignore", message="There is a performance drop")
                found = gradients(self.parameters, *(tensor[start : start + self.chunk] for tensor in tensors))
            yield found

    def _looped(self, value: Callable[..., Tensor], tensors: list[Tensor], samples: int) -> Iterator[Tensors]:
        leaves = {key: p.detach().requires_grad_() for key, p in self.parameters.items()}  # the same memory
        for i in range(samples):
            with torch.enable_grad():
                number = value(leaves, *(tensor[i] for tensor in tensors))
            found: Iterable[Tensor | None] = [None] * len(leaves)
            if number.requires_grad:
                found = torch.autograd.grad(number, list(leaves.values()), allow_unused=True)
            yield {key: g.unsqueeze(0) for key, g in zip(leaves, found, strict=True) if g is not None}

    def _value(self, head: Head | None, parameters: dict[str, Tensor], inputs: Any, targets: Any, where: str) -> Tensor:
        logits = self.logits(head, inputs, parameters)
        # what looks at values cannot be vectorised
        number = loss_of(self.loss, logits, targets, where, look_at_values=not self.together)
        if not isinstance(number, Tensor):
            raise TypeError(f"loss: expected a tensor, got {type(number).__name__}")
        if number.numel() != 1:
            raise ShapeError(f"loss: expected one number, got shape {tuple(number.shape)}; reduce it with a mean")
        return number.reshape(())


def summed_over_samples(
    gradients: SampleGradients,
    task: Task,
    function: Callable[[Tensor], Tensor],
    argument: str,
    *,
    batches: Iterable[tuple[Any, Any]] | None = None,
) -> tuple[dict[str, Tensor], int]:
    r"""Name -> ``function(gradients).sum(0)`` in the shape of the parameter, and the number of samples.

    Args:
        gradients: of which the parameters give names, shapes and dtypes; the sums are in float32 at least.
        task: head and data.
        function: of the gradients of some samples, (samples, \*shape).
        argument: what errors call the data.
        batches: (inputs, targets) in place of the task's own.
    """
    totals = {
        key: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for key, p in gradients.parameters.items()
    }

    def summed(found: Iterator[Tensors]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for part in found:
            for key, g in part.items():
                total = function(g.to(totals[key].dtype)).sum(0)
                sums[key] = sums[key].add_(total) if key in sums else total
        return sums

    count = 0
    for batch in pairs(task.batches, argument, device_of(gradients.model)) if batches is None else batches:
        samples, sums = gradients.of(task.head, batch, summed, argument)
        for key, total in sums.items():
            totals[key] += total
        count += samples
    if not count:
        raise InputError(f"{argument}: expected at least one sample, got batches of none")
    for key, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteError(f"the gradient of {key!r} is not finite for the samples of {argument}")
    return totals, count


def _each(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with the function's results for its tensors, but for single numbers."""
    if isinstance(value, Tensor):
        return function(value) if value.ndim else value
    if isinstance(value, Mapping):
        return {key: _each(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(function, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_each(function, item) for item in value)
    return value
