"""Accuracy of a model, and accuracies of many tasks in units of what each task reaches on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._call import check_model, logit_matrix
from .._loss import check_classes
from .._state import check_keys, finite_number
from .._tasks import Batches, Head, as_tasks, device_of, logits_of, mode, pairs
from ..errors import InputError, ShapeError

__all__ = ["accuracy", "normalized_accuracy"]


def accuracy(model: nn.Module, batches: Batches, *, head: Head | None = None) -> float:
    r"""The share of samples whose largest logit is the right class.

    .. math:: \frac{1}{M} \sum_{m=1}^{M} 1\bigl[\arg\max_k h_k(f(x_m)) = y_m\bigr]

    Every sample counts the same, whatever the sizes of the batches. Model and head are in evaluation mode meanwhile,
    and each sub-module's mode is put back afterwards.

    Args:
        model: an encoder, or a complete classifier if `head` is None.
        batches: iterable of (inputs, targets), or of mappings with the key "labels" and the rest as inputs; targets are
            (B,) class indices. Moved to the model's device.
        head: turns the encoder's output into logits (B, K).

    Returns:
        A number from 0 to 1.

    Raises:
        InputError: no batch. ShapeError: logits or targets of another shape. NonFiniteError: NaN among the logits.
        TypeError: batches that are no pairs, targets that are no integers.

    Source: R-MTLLMF, section IV.

    Example:
        >>> import torch
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 0])), (torch.eye(3)[:1], torch.tensor([0]))]
        >>> accuracy(torch.nn.Identity(), batches)
        0.75
    """
    check_model(model)
    if isinstance(batches, Mapping):
        raise TypeError("batches: expected an iterable of (inputs, targets), got a mapping; call once a task")
    as_tasks(batches, "batches")
    correct = count = 0
    with torch.no_grad(), mode(False, model, head):
        for inputs, targets in pairs(batches, "batches", device_of(model)):
            logits = logit_matrix(logits_of(model, head, inputs), "model")
            predicted = logits.argmax(-1)
            correct += int((predicted == _classes(targets, predicted, logits.shape[1]).to(predicted.device)).sum())
            count += len(predicted)
    if count == 0:
        raise InputError("batches: expected at least one sample, got only empty batches")
    return correct / count


def _classes(targets: Any, predicted: Tensor, count: int) -> Tensor:
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"batches: expected targets as a tensor of class indices, got {kind}")
    if targets.shape != predicted.shape:
        raise ShapeError(f"batches: expected targets of shape {tuple(predicted.shape)}, got {tuple(targets.shape)}")
    if count < 2:
        raise ShapeError("model: expected logits of at least two classes, got one column")
    check_classes(targets, count, "batches")
    return targets


def normalized_accuracy(
    accuracies: Mapping[str, float] | Sequence[float], references: Mapping[str, float] | Sequence[float]
) -> float:
    r"""The mean over the tasks of the accuracy in units of the task's own reference.

    .. math:: \frac{1}{N} \sum_{i=1}^{N} \frac{a_i}{r_i}

    The mean of the ratios, not the ratio of the means. It can exceed 1.

    Args:
        accuracies: of the fused model, a task each: a mapping by task or a sequence.
        references: of the individually fine-tuned models: a mapping of the same tasks, or a sequence as long.

    Raises:
        InputError: no tasks, other tasks, a reference that is not positive, an accuracy that is negative or no finite
            number.
        TypeError: a mapping beside a sequence, or no numbers.

    Source: R-MTLLMF, section IV; Ilharco et al., 2023, section 4.2.

    Example:
        >>> normalized_accuracy({"mnist": 0.5, "svhn": 0.9}, {"mnist": 1.0, "svhn": 0.9})
        0.75
    """
    _check_kind(accuracies, "accuracies")
    _check_kind(references, "references")
    if isinstance(accuracies, Mapping) and isinstance(references, Mapping):
        check_keys(accuracies, references, "accuracies", "references")
        both = [(f"[{task!r}]", accuracies[task], references[task]) for task in accuracies]
    elif isinstance(accuracies, Mapping) or isinstance(references, Mapping):
        raise TypeError("accuracies, references: expected two mappings or two sequences, got one of each")
    else:
        if len(accuracies) != len(references):
            raise ShapeError(f"accuracies: expected as many as references, {len(references)}, got {len(accuracies)}")
        both = [(f"[{i}]", value, other) for i, (value, other) in enumerate(zip(accuracies, references, strict=True))]
    if not both:
        raise InputError("accuracies: expected at least one task, got none")
    ratios = []
    for where, value, reference in both:
        number = finite_number(value, f"accuracies{where}")
        if number < 0:
            raise InputError(f"accuracies{where}: expected a number >= 0, got {number}")
        ratios.append(number / finite_number(reference, f"references{where}", positive=True))
    return math.fsum(ratios) / len(ratios)


def _check_kind(values: object, argument: str) -> None:
    if isinstance(values, str) or not isinstance(values, Mapping | Sequence):
        raise TypeError(f"{argument}: expected a mapping of task -> number or a sequence, got {type(values).__name__}")
