"""What metrics and learned rules share: predictions, and calls of a model with other parameters than its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ._state import StateLike, Tensors, as_state, check_keys, check_shapes, identity
from ._tasks import Head, forward, logits_of
from .errors import NonFiniteError, ShapeError, StateMismatchError

__all__ = ["WithState", "check_model", "checked_rows", "logit_matrix", "predictions", "state_of", "token_hint"]


def check_model(model: object) -> None:
    """Raise unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def logit_matrix(logits: Any, argument: str) -> Tensor:
    """`logits` if they are a tensor (B, K) without NaN."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{argument}: expected logits as a tensor (B, K), got {type(logits).__name__}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ShapeError(f"{argument}: expected logits of shape (B, K), got {tuple(logits.shape)}{token_hint(logits)}")
    if bool(logits.isnan().any()):
        raise NonFiniteError(f"{argument}: the logits hold NaN, so that there is no prediction")
    return logits


def token_hint(logits: Tensor) -> str:
    """What to do about logits (B, T, K), one row for each token; for the end of an error."""
    return "; of a language model pick a token, head=lambda output: output.logits[:, -1]" * (logits.ndim == 3)


def checked_rows(logits: Tensor, count: int, argument: str) -> Tensor:
    """`logits` if they are finite, and one row for each of `count` inputs."""
    if logits.shape[0] != count:
        raise ShapeError(
            f"model: expected logits ({count}, K) for {'one input' if count == 1 else f'{count} inputs'}, got "
            f"{tuple(logits.shape)}"
        )
    if not bool(logits.isfinite().all()):
        raise NonFiniteError(f"{argument}: the logits are not finite")
    return logits


def predictions(model: Any, head: Head | None, inputs: Any, argument: str) -> Tensor:
    """(B,) the class with the largest logit."""
    return logit_matrix(logits_of(model, head, inputs), argument).argmax(-1)


def state_of(model: nn.Module, source: StateLike, argument: str) -> dict[str, Tensor]:
    """`source` as a state dict that fits `model`: new tensor objects, detached, on the model's device."""
    own, state = as_state(model, "model"), as_state(source, argument)
    check_keys(state, own, argument, "model")
    check_shapes(state, own, argument, "model")
    return {name: state[name].detach().to(own[name].device) for name in own}


class _Then(nn.Module):
    """``after(model(inputs))`` as one module."""

    def __init__(self, model: nn.Module, after: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.after = after

    def forward(self, inputs: Any) -> Any:
        """See the class."""
        return self.after(forward(self.model, inputs))


class WithState:
    """The model as a function with the parameters and buffers `state` in place of its own, which stay untouched.

    Entries that are tied in the model must be equal in `state`.
    """

    def __init__(self, model: nn.Module, state: Tensors) -> None:
        self.model = model
        memory: dict[Hashable, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                continue
            twin = memory.get(identity(tensor), name)
            if state[name] is not state[twin] and not torch.equal(state[name], state[twin]):
                raise StateMismatchError(
                    f"{twin!r} and {name!r} are one tensor in the model, but not the same in the given parameters"
                )
            memory[identity(tensor)] = name
        self.state = {name: state[name] for name in memory.values()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.state, args, kwargs)

    def replaced(self, state: Tensors) -> WithState:
        """The same with other tensors for some names of `self.state`, unchecked."""
        other = copy(self)
        other.state = {**self.state, **state}
        return other

    def logits(self, inputs: Any, argument: str, *, head: Head | None = None) -> Tensor:
        """(B, K), of a complete model where there is no head."""
        return self.inside(lambda logits: logits, inputs, argument, head=head)

    def inside(self, function: Callable[[Tensor], Any], inputs: Any, argument: str, *, head: Head | None = None) -> Any:
        """``function(logits)`` while the state is in place: a checkpointed backward pass runs the model again."""

        def after(output: Any) -> Any:
            logits = output if head is None else head(output)
            tensor = logits if isinstance(logits, Tensor) else getattr(logits, "logits", logits)
            return function(logit_matrix(tensor, argument))

        state = {f"model.{name}": tensor for name, tensor in self.state.items()}
        return functional_call(_Then(self.model, after), state, (inputs,))

    @torch.no_grad()
    def predictions(self, head: Head | None, inputs: Any, argument: str) -> Tensor:
        """(B,) the class with the largest logit."""
        return predictions(self, head, inputs, argument)
