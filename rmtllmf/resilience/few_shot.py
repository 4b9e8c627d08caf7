"""A few labelled samples of every class, the same for the same seed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from .._random import Seed, generator, seed_number
from .._state import whole_number
from .._tasks import describe
from ..errors import InputError

__all__ = ["few_shot"]


def few_shot(dataset: Dataset[Any], shots: int = 10, *, seed: Seed) -> Subset[Any]:
    r"""`shots` samples of every class, drawn without replacement.

    .. math:: \mathcal{S} = \bigcup_c \mathcal{S}_c, \qquad \mathcal{S}_c \subset \{i : y_i = c\}, \qquad
              |\mathcal{S}_c| = \text{shots}

    What is drawn of a class depends on the seed, the class and its samples only: another class more changes nothing.

    Args:
        dataset: a map-style dataset of (input, label), or of mappings with the key "labels" or "label" as in Hugging
            Face's datasets, with one label each, a whole number or a string. Labels are read
            without loading inputs from a ``TensorDataset`` (its last tensor), from ``targets`` or ``labels``
            (torchvision's datasets, ``ImageFolder``), and through ``Subset`` and ``ConcatDataset``; any other dataset
            is gone through once.
        shots: samples of every class, at least 1.
        seed: an int or a ``torch.Generator``.

    Returns:
        A ``torch.utils.data.Subset`` in the order of `dataset`; shuffle it in the DataLoader.

    Raises:
        InputError: `shots` below 1, no sample at all, or classes with fewer than `shots` samples (they are named).
        TypeError: no map-style dataset, or labels that are no classes.

    Source: R-MTLLMF, section IV (10 samples a class).

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> labels = torch.arange(60) % 3
        >>> chosen = few_shot(TensorDataset(torch.randn(60, 4), labels), shots=2, seed=0)
        >>> sorted(int(label) for _, label in chosen)
        [0, 0, 1, 1, 2, 2]
    """
    shots = whole_number(shots, "shots", at_least=1)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(f"dataset: expected a map-style dataset with a length, got {type(dataset).__name__}")
    members: dict[int | str, list[int]] = {}
    label_at = _label_reader(dataset)
    for index in range(len(dataset)):
        members.setdefault(_as_class(label_at(index)), []).append(index)
    if not members:
        raise InputError("dataset: expected at least one sample, got an empty dataset")
    short = {label: len(found) for label, found in members.items() if len(found) < shots}
    if short:
        listed = ", ".join(f"{label!r} has {count}" for label, count in sorted(short.items(), key=str))
        raise InputError(f"shots: expected at least {shots} samples of every class, but class {listed}")
    number = seed_number(seed)
    chosen: list[int] = []
    for label, found in members.items():
        order = torch.randperm(len(found), generator=generator(number, "few_shot", label))
        chosen += [found[position] for position in order[:shots].tolist()]
    return Subset(dataset, sorted(chosen))


def _label_reader(dataset: Any) -> Callable[[int], Any]:
    """Index -> label, without loading the input where the dataset knows its labels."""
    if isinstance(dataset, Subset):
        inner, indices = _label_reader(dataset.dataset), dataset.indices
        return lambda index: inner(indices[index])
    if isinstance(dataset, ConcatDataset):
        readers, ends = [_label_reader(part) for part in dataset.datasets], dataset.cumulative_sizes

        def read(index: int) -> Any:
            part = bisect_right(ends, index)
            return readers[part](index - (ends[part - 1] if part else 0))

        return read
    if isinstance(dataset, TensorDataset):
        last = dataset.tensors[-1]
        return lambda index: last[index]
    transform = getattr(dataset, "target_transform", None) or (lambda label: label)
    for name in ("targets", "labels"):
        labels: Any = getattr(dataset, name, None)
        # of another length they are something else, such as the names of the classes
        if hasattr(labels, "__len__") and hasattr(labels, "__getitem__") and len(labels) == len(dataset):
            return lambda index: transform(labels[index])
    return lambda index: _second(dataset[index], index)


def _second(sample: Any, index: int) -> Any:
    if isinstance(sample, Mapping):
        for key in ("labels", "label"):
            if key in sample:
                return sample[key]
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        without = "; a mapping needs the key 'labels' or 'label'" * isinstance(sample, Mapping)
        raise TypeError(f"dataset[{index}]: expected a pair (input, label), got {describe(sample)}{without}")
    return sample[1]


def _as_class(label: Any) -> int | str:
    if isinstance(label, Tensor | np.ndarray | np.generic):
        if label.ndim:
            raise TypeError(f"dataset: expected one class a sample, got a label of shape {tuple(label.shape)}")
        label = label.item()
    if isinstance(label, str):
        return str(label)
    if isinstance(label, int):
        return int(label)
    raise TypeError(f"dataset: expected whole numbers or strings as labels, got {describe(label)}")
