"""Tasks drawn object by object: road signs and land seen from above."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .common import SIZE, Labels, Split, both

RIMS = {"red": (200, 30, 30), "blue": (30, 70, 190), "green": (20, 130, 60), "yellow": (215, 165, 25)}
SIGNS = tuple(f"{rim}-{mark}" for rim in RIMS for mark in ("bar", "arrow", "cross", "dots"))


def _polygon(sides: int, radius: float, turn: float) -> list[tuple[float, float]]:
    angles = turn + np.arange(sides) * 2 * np.pi / sides
    return [(56 + radius * np.cos(a), 56 + radius * np.sin(a)) for a in angles]


def _signs(labels: Labels, rng: np.random.Generator) -> NDArray:
    n = len(labels)
    images = np.empty((n, SIZE, SIZE, 3))
    for i, label in enumerate(labels):
        rim, mark = divmod(int(label), 4)
        shape = int(rng.integers(4))
        sky = rng.uniform(90, 200) * np.array([0.85, 0.95, 1.1])
        canvas = Image.new("RGB", (112, 112), tuple(int(v) for v in sky.clip(0, 255)))
        draw = ImageDraw.Draw(canvas)
        for _ in range(6):
            x, y = rng.uniform(-20, 112, 2)
            tone = tuple(int(v) for v in rng.uniform(60, 190, 3))
            draw.rectangle((x, y, x + rng.uniform(10, 50), y + rng.uniform(10, 50)), fill=tone)
        sides, turn = ((40, 0.0), (3, -np.pi / 2), (4, 0.0), (8, np.pi / 8))[shape]
        big = rng.uniform(38, 50) * (1.1 if shape in (1, 2) else 0.95)
        turn += rng.uniform(-0.15, 0.15)
        colour = tuple(int(v) for v in (list(RIMS.values())[rim] + rng.uniform(-25, 25, 3)).clip(0, 255))
        draw.polygon(_polygon(sides, big, turn), fill=colour)
        draw.polygon(_polygon(sides, big * 0.76, turn), fill=(240, 240, 235))
        s, cx, cy = big * (0.26 if shape == 1 else 0.34), 56.0, 56.0 + (2 if shape == 1 else 0)
        ink, w = (20, 20, 30), int(big * 0.15)
        if mark == 0:
            draw.rectangle((cx - s, cy - w / 1.6, cx + s, cy + w / 1.6), fill=ink)
        elif mark == 1:
            draw.line((cx, cy + s, cx, cy - s), fill=ink, width=w)
            draw.polygon([(cx - s, cy - s * 0.1), (cx + s, cy - s * 0.1), (cx, cy - s * 1.2)], fill=ink)
        elif mark == 2:
            draw.line((cx - s, cy - s, cx + s, cy + s), fill=ink, width=w)
            draw.line((cx + s, cy - s, cx - s, cy + s), fill=ink, width=w)
        else:
            for dx in (-0.7, 0.7):
                draw.ellipse((cx + dx * s - w, cy - w, cx + dx * s + w, cy + w), fill=ink)
        small = canvas.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR)
        left, top = rng.integers(-8, 9, 2)
        small = small.transform(
            (112, 112), Image.Transform.AFFINE, (1, 0, int(left), 0, 1, int(top)), fillcolor=(120, 130, 140)
        )
        images[i] = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BOX)) * rng.uniform(0.55, 1.1) + rng.normal(
            0, 7, (SIZE, SIZE, 3)
        )
    return images


def signs(rng: np.random.Generator) -> Split:
    """Sixteen road signs: four colours of the rim times four marks, in four outlines, before a cluttered street."""
    return both(_signs, 16, 150, 45, rng)


LAND = ("fields", "river", "road", "blocks", "forest", "lake", "orchard", "dunes", "crossing", "pivot")


def _land(labels: Labels, rng: np.random.Generator) -> NDArray:
    n = len(labels)
    images = np.empty((n, SIZE, SIZE, 3))
    yy, xx = np.mgrid[:SIZE, :SIZE].astype(float)
    for i, label in enumerate(labels):
        seeds = rng.uniform(0, SIZE, (int(rng.integers(4, 7)), 2))
        near = ((yy[..., None] - seeds[:, 0]) ** 2 + (xx[..., None] - seeds[:, 1]) ** 2).argmin(-1)
        soil = np.array([120, 115, 70]) + rng.normal(0, 18, (len(seeds), 3))
        image = soil[near]
        a = rng.uniform(0, np.pi)
        along, across = (
            np.cos(a) * (xx - 14) + np.sin(a) * (yy - 14),
            -np.sin(a) * (xx - 14) + np.cos(a) * (yy - 14),
        )
        shift = rng.uniform(-5, 5)
        mask, colour = np.zeros((SIZE, SIZE)), np.zeros(3)
        if label == 1:
            bend = shift + rng.uniform(2, 4) * np.sin(along * rng.uniform(0.25, 0.4) + rng.uniform(0, 6.28))
            mask, colour = (np.abs(across - bend) < rng.uniform(1.2, 2.2)) * 1.0, np.array([60, 80, 90])
        elif label == 2:
            mask, colour = (np.abs(across - shift) < rng.uniform(0.9, 1.6)) * 1.0, np.array([165, 160, 150])
        elif label == 3:
            step = rng.uniform(5, 7)
            mask = ((along + shift) % step > 2) & ((across + shift) % step > 2)
            mask, colour = mask * 1.0, np.array([170, 150, 140])
        elif label == 4:
            mask, colour = (rng.random((SIZE, SIZE)) < 0.55) * 1.0, np.array([60, 85, 45])
        elif label == 5:
            squash = rng.uniform(0.6, 1.6)
            mask = ((along + shift) ** 2 * squash + across**2 / squash < rng.uniform(5, 8) ** 2) * 1.0
            colour = np.array([60, 80, 90])
        elif label == 6:
            step = rng.uniform(4, 6)
            mask = (((along + shift) % step - step / 2) ** 2 + ((across + shift) % step - step / 2) ** 2 < 2.5) * 1.0
            colour = np.array([60, 85, 45])
        elif label == 7:
            mask = 0.5 + 0.5 * np.sin(across * rng.uniform(0.7, 1.1) + 1.2 * np.sin(along * 0.3 + shift))
            colour = np.array([185, 160, 105])
        elif label == 8:
            mask = ((np.abs(across - shift) < 1.2) | (np.abs(along + shift / 2) < 1.2)) * 1.0
            colour = np.array([165, 160, 150])
        elif label == 9:
            cy, cx, r = rng.uniform(9, 19), rng.uniform(9, 19), rng.uniform(6, 9)
            mask, colour = ((yy - cy) ** 2 + (xx - cx) ** 2 < r * r) * 1.0, np.array([90, 130, 60])
        image = image * (1 - mask[..., None]) + (colour + rng.normal(0, 12, 3)) * mask[..., None]
        images[i] = image * rng.uniform(0.8, 1.15) + rng.normal(0, 9, image.shape)
    return images


def land(rng: np.random.Generator) -> Split:
    """Ten kinds of land seen from above, in earth colours."""
    return both(_land, 10, 250, 80, rng)
