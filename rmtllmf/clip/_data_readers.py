"""One reader for each of the eight data sets: torchvision's images, labels in the order of the names, and a split."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

from torch.utils.data import ConcatDataset

from ..errors import InputError
from ._data_check import by_class, by_lists, files_exist, renumber, same_classes, same_folders
from .prompts import folders


class Part(NamedTuple):
    """Images `indices` of a torchvision dataset, with their labels."""

    source: Any
    indices: Sequence[int]
    targets: list[int]


# Some of torchvision's datasets say labels and files only in private (_samples, _labels, _image_files); reading that
# spares loading every image for its label.


def eurosat_sizes(count: int) -> tuple[int, int]:
    """80 % for training and 10 % for testing; the rest is for validation, here as for RESISC45."""
    tenth = count // 10
    return count - max(1, 2 * tenth), max(1, tenth)


def resisc45_sizes(count: int) -> tuple[int, int]:
    """60 % for training and 20 % for testing."""
    fifth = count // 5
    return count - max(1, 2 * fifth), max(1, fifth)


def sun397_sizes(count: int) -> tuple[int, int]:
    """50 for training and 50 for testing, as in the official partitions."""
    return min(50, count // 2), min(50, count // 2)


def _whole(source: Any, targets: list[int]) -> Part:
    return Part(source, range(len(targets)), targets)


def _parts(source: Any, targets: list[int], split: tuple[list[int], list[int]]) -> tuple[Part, Part]:
    train, test = (Part(source, indices, [targets[index] for index in indices]) for indices in split)
    return train, test


def _cars(datasets: ModuleType, root: Path, seed: int) -> tuple[Part, Part, str]:
    def plain(names: Sequence[str]) -> list[str]:  # some copies write "C-V" for "C/V"
        return ["".join(filter(str.isalnum, name)).lower() for name in names]

    parts = []
    for split in ("train", "test"):
        source = datasets.StanfordCars(root, split=split)
        files_exist((path for path, _ in source._samples), f"the {split} annotation of Stanford Cars")
        same_classes(plain(source.classes), plain(folders("cars")), "cars_meta.mat")
        labels = (int(label) for _, label in source._samples)
        parts.append(_whole(source, renumber(labels, plain(source.classes), plain(folders("cars")), "cars_meta.mat")))
    return parts[0], parts[1], "official train and test"


def _dtd(datasets: ModuleType, root: Path, seed: int) -> tuple[Part, Part, str]:
    parts = {}
    for split in ("train", "val", "test"):
        where = f"labels/{split}1.txt"
        source = datasets.DTD(root, split=split)
        files_exist(source._image_files, where)
        parts[split] = _whole(source, renumber(source._labels, source.classes, folders("dtd"), where))
    train, val, test = parts["train"], parts["val"], parts["test"]
    both = _whole(ConcatDataset([train.source, val.source]), train.targets + val.targets)
    return both, test, "official no. 1: train and val / test"


def _eurosat(datasets: ModuleType, root: Path, seed: int) -> tuple[Part, Part, str]:
    same_folders(root / "eurosat" / "2750", folders("eurosat"))
    source = datasets.EuroSAT(root)
    names = [Path(path).relative_to(source._data_folder).as_posix() for path, _ in source.samples]
    targets = renumber(source.targets, source.classes, folders("eurosat"), source._data_folder)
    split = by_class(targets, names, eurosat_sizes, seed)
    return *_parts(source, targets, split), f"random by class: 80 % / 10 %, seed {seed}"


def _gtsrb(datasets: ModuleType, root: Path, seed: int) -> tuple[Part, Part, str]:
    same_folders(root / "gtsrb" / "GTSRB" / "Training", folders("gtsrb"))
    parts = []
    for split in ("train", "test"):
        source = datasets.GTSRB(root, split=split)
        files_exist((path for path, _ in source._samples), "GT-final_test.csv")
        labels = (label for _, label in source._samples)
        parts.append(_whole(source, renumber(labels, folders("gtsrb"), folders("gtsrb"), f"GTSRB's {split} part")))
    return parts[0], parts[1], "official train and test"


def _mnist(datasets: ModuleType, root: Path, seed: int) -> tuple[Part, Part, str]:
    if (root / "MNIST" / "processed" / "training.pt").exists():  # torchvision would load it, old releases unpickle it
        raise InputError(
            f"root: expected no 'processed' in {str(root / 'MNIST')!r}, left by an old torchvision; delete it"
        )
    train, test = (datasets.MNIST(root, train=train) for train in (True, False))
    digits = folders("mnist")
    targets = [renumber(source.targets.tolist(), digits, digits, "MNIST/raw") for source in (train, test)]
    return _whole(train, targets[0]), _whole(test, targets[1]), "official train and test"


def _resisc45(datasets: ModuleType, root: Path, seed: int) -> tuple[Part, Part, str]:
    def images(folder: Path) -> tuple[Any, list[int]]:
        same_folders(folder, folders("resisc45"))
        source = datasets.ImageFolder(folder)
        return source, renumber(source.targets, source.classes, folders("resisc45"), str(folder))

    base = root / "resisc45"
    if (base / "train").is_dir() and (base / "test").is_dir():
        return _whole(*images(base / "train")), _whole(*images(base / "test")), "folders train and test"
    if not (base / "NWPU-RESISC45").is_dir():
        base = root
    source, targets = images(base / "NWPU-RESISC45")
    names = [Path(path).name for path, _ in source.samples]  # each begins with that of its class
    places = {name: index for index, name in enumerate(names)}
    lists = by_lists(base / "resisc45-train.txt", base / "resisc45-test.txt", places)
    if lists is not None:
        return *_parts(source, targets, lists), "lists resisc45-train.txt and resisc45-test.txt"
    split = by_class(targets, names, resisc45_sizes, seed)
    return *_parts(source, targets, split), f"random by class: 60 % / 20 %, seed {seed}"


def _sun397(datasets: ModuleType, root: Path, seed: int) -> tuple[Part, Part, str]:
    home, expected = root / "SUN397", folders("sun397")
    listed = [line[3:].strip() for line in (home / "ClassName.txt").read_text().splitlines() if line.strip()]
    same_classes(listed, expected, str(home / "ClassName.txt"))
    found = {
        Path(folder).relative_to(home).as_posix().partition("/")[2]
        for folder, _, files in os.walk(home)
        if any(file.startswith("sun_") and file.endswith(".jpg") for file in files)
    }
    same_classes(found, expected, f"the folders of {str(home)!r}")
    source = datasets.SUN397(root)
    names = [Path(path).relative_to(home).as_posix() for path in source._image_files]
    targets = renumber(source._labels, source.classes, expected, str(home))
    places = {name: index for index, name in enumerate(names)}
    lists = by_lists(home / "Training_01.txt", home / "Testing_01.txt", places)
    if lists is not None:
        return *_parts(source, targets, lists), "official partition 1: Training_01.txt and Testing_01.txt"
    split = by_class(targets, names, sun397_sizes, seed)
    return *_parts(source, targets, split), f"random by class: 50 / 50 images, seed {seed}"


def _svhn(datasets: ModuleType, root: Path, seed: int) -> tuple[Part, Part, str]:
    digits, parts = folders("svhn"), []
    for split in ("train", "test"):
        source = datasets.SVHN(root, split=split)
        parts.append(_whole(source, renumber(source.labels, digits, digits, f"{split}_32x32.mat")))
    return parts[0], parts[1], "official train and test"


Reader: TypeAlias = Callable[[ModuleType, Path, int], tuple[Part, Part, str]]
"""(torchvision.datasets, root, seed) -> (training part, test part, where the split is from)"""

READERS: dict[str, Reader] = {
    "cars": _cars,
    "dtd": _dtd,
    "eurosat": _eurosat,
    "gtsrb": _gtsrb,
    "mnist": _mnist,
    "resisc45": _resisc45,
    "sun397": _sun397,
    "svhn": _svhn,
}
