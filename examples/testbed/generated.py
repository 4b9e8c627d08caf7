"""Tasks computed point by point: spectrograms, cellular automata and gratings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .common import SIZE, Labels, Split, both


def _viridis(values: NDArray) -> NDArray:
    """A dark-violet to green to yellow colour scale for values in 0..1."""
    knots = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float)
    where = values.clip(0, 1) * 4
    low = np.minimum(where.astype(int), 3)
    share = (where - low)[..., None]
    return knots[low] * (1 - share) + knots[low + 1] * share


SOUNDS = ("rising", "falling", "steady", "chord", "vibrato", "clicks", "arch", "dip", "hiss", "steps")


def _spectra(labels: Labels, rng: np.random.Generator) -> NDArray:
    n = len(labels)
    time = np.linspace(0, 1, SIZE)[None, None, :]
    freq = np.linspace(0, 1, SIZE)[None, :, None]
    u = lambda a, b: rng.uniform(a, b, (n, 1, 1))  # noqa: E731
    wide, centre, depth, speed, phase = u(0.02, 0.045), u(0.3, 0.7), u(0.2, 0.5), u(2.0, 5.0), u(0, 6.28)
    tracks = np.stack(
        [
            np.broadcast_to(t, (n, 1, SIZE))
            for t in (
                centre + depth * (time - 0.5),
                centre - depth * (time - 0.5),
                centre + 0 * time,
                centre + 0 * time,
                centre + 0.25 * depth * np.sin(6.28 * speed * time + phase),
                centre + 0 * time,
                centre + 0.5 * depth - 1.6 * depth * (2 * time - 1) ** 2 * 0.5,
                centre - 0.5 * depth + 1.6 * depth * (2 * time - 1) ** 2 * 0.5,
                centre + 0 * time,
                centre + depth * (np.floor(time * speed) / speed - 0.5),
            )
        ],
        1,
    )[np.arange(n), labels]
    line = np.exp(-((freq - tracks) ** 2) / (2 * wide**2))
    chord = line + np.exp(-((freq - tracks - 0.22) ** 2) / (2 * wide**2)) * 0.8
    band = np.exp(-((freq - tracks) ** 2) / (2 * (3.5 * wide) ** 2)) * rng.uniform(0, 1.3, (n, SIZE, SIZE))
    gate = (np.sin(6.28 * speed * time + phase) > 0.2) * np.exp(-((freq - tracks) ** 2) / (2 * 0.25**2))
    pick = labels[:, None, None]
    value = np.where(pick == 3, chord, np.where(pick == 8, band, np.where(pick == 5, gate, line)))
    value = value * u(0.35, 0.8) + rng.gamma(1.2, 0.14, (n, SIZE, SIZE)) + u(0, 0.15) * (1 - freq)
    return _viridis(value[:, ::-1])


def spectra(rng: np.random.Generator) -> Split:
    """Ten kinds of sound drawn as a noisy spectrogram in a violet-to-yellow colour scale."""
    return both(_spectra, 10, 250, 80, rng)


WOLFRAM = (18, 22, 30, 45, 54, 60, 73, 106, 110, 126, 150, 26)
RULES = tuple(f"rule {number}" for number in WOLFRAM)


def _automata(labels: Labels, rng: np.random.Generator) -> NDArray:
    n, skip = len(labels), 30
    table = np.array([[(rule >> k) & 1 for k in range(8)] for rule in WOLFRAM])[labels]
    row = (rng.random((n, 96)) < 0.5).astype(int)
    images = np.empty((n, SIZE, SIZE), int)
    for step in range(skip + SIZE):
        if step >= skip:
            images[:, step - skip] = row[:, :SIZE]
        row = np.take_along_axis(table, 4 * np.roll(row, 1, 1) + 2 * row + np.roll(row, -1, 1), 1)
    flip = rng.random(images.shape) < 0.03
    cells = np.where(flip, 1 - images, images)[..., None]
    on = np.array([240, 130, 20]) + rng.normal(0, 12, (n, 1, 1, 3))
    off = np.array([15, 30, 110]) + rng.normal(0, 12, (n, 1, 1, 3))
    return cells * on + (1 - cells) * off


def automata(rng: np.random.Generator) -> Split:
    """Space-time pictures of twelve elementary cellular automata, orange cells on navy, a few cells flipped."""
    return both(_automata, len(RULES), 220, 70, rng)


DIRECTIONS = 6
WAVES = tuple(f"{spacing} {30 * turn} degrees" for spacing in ("wide", "narrow") for turn in range(DIRECTIONS))


def _waves(labels: Labels, rng: np.random.Generator) -> NDArray:
    n = len(labels)
    axis = np.arange(SIZE) - 13.5
    turn, kind = labels % DIRECTIONS, labels // DIRECTIONS
    angle = (turn * 30 + rng.normal(0, 5, n)) * np.pi / 180
    freq = np.where(kind == 0, rng.uniform(0.08, 0.12, n), rng.uniform(0.17, 0.22, n))
    w = 2 * np.pi * freq
    ramp = (
        axis[None, None, :] * (np.cos(angle) * w)[:, None, None]
        + axis[None, :, None] * (np.sin(angle) * w)[:, None, None]
    )
    value = np.sin(ramp + rng.uniform(0, 6.28, (n, 1, 1))) * rng.uniform(0.35, 0.8, (n, 1, 1)) + rng.normal(
        0, 0.5, ramp.shape
    )
    return np.array([200, 120, 170]) + value[..., None] * np.array([35, 70, 50])


def gratings(rng: np.random.Generator) -> Split:
    """Twelve gratings, six directions times two spacings, pink and noisy."""
    return both(_waves, len(WAVES), 220, 70, rng)
