"""What the files that make images share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

SIZE = 28

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Split = tuple[Images, Labels, Images, Labels]  # training images and labels, test images and labels


def resize(image: Images, size: int = SIZE) -> Images:
    """Shrink or enlarge an 8-bit image to ``size`` x ``size`` pixels."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that matplotlib ships."""
    import matplotlib as mpl

    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def both(
    make: Callable[[Labels, np.random.Generator], NDArray[np.float64]],
    classes: int,
    train: int,
    test: int,
    rng: np.random.Generator,
) -> Split:
    """A training and a test set with so many images of every class, in random order, drawn by ``make``."""
    out: list[NDArray] = []
    for each in (train, test):
        labels = rng.permutation(np.repeat(np.arange(classes), each)).astype(np.int64)
        out += [eight_bit(make(labels, rng)), labels]
    return out[0], out[1], out[2], out[3]


def eight_bit(images: NDArray[np.floating]) -> Images:
    """Cut to 0..255 and round down."""
    return images.clip(0, 255).astype(np.uint8)


def poor_camera(images: Images, noise: float, rng: np.random.Generator) -> Images:
    """Random contrast (within 15 %), and Gaussian noise of this standard deviation on every pixel and colour."""
    contrast = rng.uniform(0.85, 1.15, (len(images), 1, 1, 1))
    grain = rng.standard_normal(images.shape, dtype=np.float32)
    return eight_bit((images - np.float32(128)) * contrast.astype(np.float32) + 128 + np.float32(noise) * grain)
