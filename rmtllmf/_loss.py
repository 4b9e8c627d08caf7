"""The loss of logits and targets, and what is wrong where cross entropy cannot take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ._call import token_hint
from .errors import InputError, ShapeError

__all__ = ["check_classes", "loss_of"]


def loss_of(
    loss: Callable[[Any, Any], Any], logits: Any, targets: Any, argument: str, *, look_at_values: bool = True
) -> Any:
    """``loss(logits, targets)``; before cross entropy is asked, shapes and classes are looked at.

    On a GPU a class that does not exist would be found later and elsewhere, and the process be lost with it.
    """
    if loss is cross_entropy or isinstance(loss, nn.CrossEntropyLoss):
        _check_shapes(logits, targets, argument)
        if look_at_values and not targets.is_floating_point():
            classes = logits.shape[min(1, logits.ndim - 1)]
            check_classes(targets, classes, argument, ignored=getattr(loss, "ignore_index", -100))
    return loss(logits, targets)


def check_classes(targets: Tensor, count: int, argument: str, *, ignored: int | None = None) -> None:
    """Raise unless all targets but the ignored ones are classes from 0 to `count` - 1."""
    if not targets.numel():
        return
    found = targets if ignored is None else torch.where(targets == ignored, 0, targets)
    low, high = torch.stack(torch.aminmax(found)).tolist()  # one transfer from a GPU
    if low < 0 or high >= count:
        raise InputError(
            f"{argument}: expected class indices from 0 to {count - 1}, one for each column of the logits, got "
            f"{low} to {high}; is this the right head?"
        )


def _check_shapes(logits: Any, targets: Any, argument: str) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{argument}: expected logits as a tensor (B, K), got {type(logits).__name__}; a head makes them of the "
            "model's output"
        )
    if not isinstance(targets, Tensor):
        raise TypeError(f"{argument}: expected targets as a tensor of class indices, got {type(targets).__name__}")
    shape, found = tuple(logits.shape), tuple(targets.shape)
    probabilities = targets.is_floating_point()
    if not shape or found == (shape if probabilities else shape[:1] * (len(shape) > 1) + shape[2:]):
        return
    if probabilities:
        raise ShapeError(
            f"{argument}: expected class indices, or probabilities of the shape of the logits, {shape}, got "
            f"{targets.dtype} of shape {found}; for another loss than cross entropy pass loss="
        )
    hint = token_hint(logits)
    if found == shape[:2]:
        hint += (
            ", or train on all tokens with a loss of your own that shifts by one, loss=lambda logits, labels: "
            "cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())"
        )
    expected = "(B,) for logits (B, K)"
    raise ShapeError(f"{argument}: expected targets {expected}, got targets {found} for logits {shape}{hint}")
