"""Folders, labels and lists of a data set on disk, held against the names of its classes; and splits made from them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .._random import generator
from ..errors import InputError

Indices = list[int]


def same_classes(found: Iterable[str], expected: Sequence[str], where: str) -> None:
    """An error unless `found` are the classes `expected`: one more or less would shift all labels behind it."""
    seen = set(found)
    missing = [name for name in expected if name not in seen]
    extra = sorted(seen - set(expected))
    if missing or extra:
        reasons = [f"{_some(missing)} missing"] if missing else []
        reasons += [f"{_some(extra)} unexpected"] if extra else []
        raise InputError(f"root: expected the {len(expected)} classes in {where}, but {' and '.join(reasons)}")


def same_folders(folder: Path, expected: Sequence[str]) -> None:
    """`same_classes` for the folders in `folder`."""
    same_classes((entry.name for entry in os.scandir(folder) if entry.is_dir()), expected, str(folder))


def renumber(labels: Iterable[int], found: Sequence[str], expected: Sequence[str], where: str) -> list[int]:
    """Labels that number the classes `found`, in the numbering of `expected`."""
    place = {name: label for label, name in enumerate(expected)}
    unknown = [name for name in found if name not in place]
    if unknown:
        raise InputError(
            f"root: expected the {len(expected)} known classes in {where}, but {_some(unknown)} unexpected"
        )
    numbers = [int(label) for label in labels]
    wrong = [number for number in numbers if not 0 <= number < len(found)]
    if wrong:
        raise InputError(f"root: expected labels of {len(found)} classes in {where}, got {wrong[0]} counted from 0")
    return [place[found[number]] for number in numbers]


def no_empty_class(targets: Sequence[int], classes: Sequence[str], where: str) -> None:
    """An error that names the classes without a sample."""
    counts = Counter(targets)
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty:
        raise InputError(f"root: expected images of all {len(classes)} classes in {where}, got none of {_some(empty)}")


def files_exist(paths: Iterable[str | Path], where: str) -> None:
    """An error if a file that is listed is not there."""
    absent = [str(path) for path in paths if not os.path.exists(path)]
    if absent:
        raise InputError(f"root: {where} names {_some(absent)}, not found")


def by_lists(train: Path, test: Path, places: Mapping[str, int]) -> tuple[Indices, Indices] | None:
    """The split that two lists of files make, in their order; None if there is neither list."""
    if not train.exists() and not test.exists():
        return None
    files_exist((train, test), "a split in two lists")
    parts = []
    for listing in (train, test):
        names = [line.strip().lstrip("/") for line in listing.read_text().splitlines() if line.strip()]
        absent = [name for name in names if name not in places]
        if absent:
            raise InputError(f"root: {listing} names {_some(absent)}, not found")
        parts.append([places[name] for name in names])
    if len({*parts[0], *parts[1]}) < len(parts[0]) + len(parts[1]):
        raise InputError(f"root: expected every image at most once in {train} and {test}, got some twice")
    return parts[0], parts[1]


def by_class(
    targets: Sequence[int], names: Sequence[str], sizes: Callable[[int], tuple[int, int]], seed: int
) -> tuple[Indices, Indices]:
    """A random split of every class, which depends on the seed and the names of its files only.

    `sizes` gives the numbers of images for training and for testing out of those of a class.
    """
    members: dict[int, Indices] = {}
    for index in sorted(range(len(names)), key=names.__getitem__):
        members.setdefault(targets[index], []).append(index)
    train: Indices = []
    test: Indices = []
    for label, found in members.items():
        order = torch.randperm(len(found), generator=generator(seed, "split", label)).tolist()
        for_training, for_testing = sizes(len(found))
        test += [found[place] for place in order[:for_testing]]
        train += [found[place] for place in order[len(order) - for_training :]]
    return sorted(train, key=names.__getitem__), sorted(test, key=names.__getitem__)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
