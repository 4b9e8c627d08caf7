"""The eight tasks as tensors that the encoder takes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import TensorDataset

from . import drawn, generated, real
from .common import Images, Labels, Split, poor_camera

MEAN, SPREAD = 127.5, 63.75

# what makes the images, the names of the classes, and how noisy the camera is (standard deviation of 256 levels)
_RECIPES: dict[str, tuple[Callable[[np.random.Generator], Split], tuple[str, ...], float]] = {
    "digits": (real.digits, real.DIGITS, 60),
    "textures": (real.textures, real.TEXTURES, 35),
    "letters": (real.letters, real.LETTERS, 50),
    "spectra": (generated.spectra, generated.SOUNDS, 45),
    "automata": (generated.automata, generated.RULES, 60),
    "signs": (drawn.signs, drawn.SIGNS, 0),
    "land": (drawn.land, drawn.LAND, 40),
    "gratings": (generated.gratings, generated.WAVES, 75),
}

TASKS: tuple[str, ...] = tuple(_RECIPES)


@dataclass(frozen=True)
class Task:
    """One classification task: float32 images (N, 3, 28, 28), normalised for the encoder, with int64 labels."""

    name: str
    classes: tuple[str, ...]
    train: TensorDataset
    test: TensorDataset


def normalise(images: Images) -> torch.Tensor:
    """8-bit images (N, height, width, 3) as the encoder wants them: float32, channels first, about -2 to 2."""
    return ((torch.from_numpy(images).permute(0, 3, 1, 2).float() - MEAN) / SPREAD).contiguous()


def _capped(images: Images, labels: Labels, most: int | None) -> tuple[Images, Labels]:
    """At most ``most`` images, the same number of each class as far as there are enough."""
    if most is None or most >= len(labels):
        return images, labels
    kinds = int(labels.max()) + 1
    if most < kinds:
        raise ValueError(f"fewer must be at least the number of classes ({kinds}), got {most}")
    rank = np.empty(len(labels), np.int64)  # how many of the same class come before
    for kind in range(kinds):
        where = np.flatnonzero(labels == kind)
        rank[where] = np.arange(len(where))
    keep = np.sort(np.lexsort((labels, rank))[:most])
    return images[keep], labels[keep]


def load_task(name: str, *, fewer: int | None = None) -> Task:
    """Make one task; always the same images.

    ``fewer`` caps the number of training images and of test images (evenly over the classes), for quick tests.
    """
    if name not in _RECIPES:
        raise ValueError(f"unknown task {name!r}; the eight are {', '.join(TASKS)}")
    make, classes, noise = _RECIPES[name]
    rng = np.random.default_rng([7, zlib.crc32(name.encode())])
    train, train_labels, test, test_labels = make(rng)
    sets = []
    for images, labels in ((train, train_labels), (test, test_labels)):
        images, labels = _capped(poor_camera(images, noise, rng), labels, fewer)
        sets.append(TensorDataset(normalise(images), torch.from_numpy(labels)))
    return Task(name, classes, sets[0], sets[1])
