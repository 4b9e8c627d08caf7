"""The pictures the base is pre-trained on: about 1,200 generated classes, no class of the eight tasks among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .common import SIZE, font

Array = NDArray[np.float64]
Pool = tuple[NDArray[np.uint8], NDArray[np.int64]]
GLYPH_RANGES = (
    (0x3B1, 0x3CA),
    (0x431, 0x450),
    (0x531, 0x557),
    (0x561, 0x587),
    (0x10D0, 0x10F1),
    (0x2190, 0x21FF),
    (0x2200, 0x22F0),
    (0x25A0, 0x2600),
    (0x2600, 0x26A0),
    (0x2701, 0x2770),
    (0x2794, 0x27BF),
)
GLYPH_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf")


def smooth_noise(rng: np.random.Generator, cells: int, channels: int = 1) -> Array:
    """Smooth noise of about unit size, ``SIZE`` x ``SIZE`` x channels."""
    coarse = rng.normal(0, 1, (cells, cells, channels))
    out = np.empty((SIZE, SIZE, channels))
    for c in range(channels):
        out[..., c] = np.asarray(
            Image.fromarray(coarse[..., c].astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        )
    return out


def two_colours(rng: np.random.Generator) -> tuple[Array, Array]:
    """Two colours that differ enough to be told apart."""
    while True:
        a, b = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
        if np.abs(a - b).sum() > 200:
            return a, b


def ground(rng: np.random.Generator, colour: Array, photos: list[NDArray]) -> Array:
    """A background of one of five kinds around one colour."""
    kind = rng.integers(6)
    flat = np.broadcast_to(colour, (SIZE, SIZE, 3))
    if kind <= 1:
        return flat
    if kind == 2:
        return flat + rng.normal(0, rng.uniform(5, 25), (SIZE, SIZE, 3))
    if kind == 3:
        return flat + 20 * smooth_noise(rng, int(rng.integers(2, 9)), 3)
    if kind == 4:
        ramp = np.linspace(-1, 1, SIZE)
        return flat + (ramp[:, None] * rng.normal(0, 25) + ramp[None] * rng.normal(0, 25))[..., None]
    photo = photos[rng.integers(len(photos))]
    y, x = rng.integers(0, photo.shape[0] - 60), rng.integers(0, photo.shape[1] - 60)
    crop = np.asarray(Image.fromarray(photo[y : y + 60, x : x + 60]).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return 0.6 * colour + 0.4 * crop


def paint(mask: Array, rng: np.random.Generator, photos: list[NDArray]) -> Array:
    """A mask (0..1) in one colour over a background of another."""
    if rng.random() < 0.2:
        fore, back = np.full(3, 255.0), np.zeros(3)
        fore, back = (fore, back) if rng.random() < 0.5 else (back, fore)
    else:
        fore, back = two_colours(rng)
    return ground(rng, back, photos) * (1 - mask[..., None]) + fore * mask[..., None]


def shrink(canvas: Image.Image, rng: np.random.Generator, turn: float = 14.0, move: int = 7) -> Array:
    """Turn, move and shrink a 56 x 56 canvas to a mask."""
    canvas = canvas.rotate(
        float(rng.uniform(-turn, turn)),
        Image.Resampling.BILINEAR,
        translate=(int(rng.integers(-move, move + 1)), int(rng.integers(-move, move + 1))),
    )
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255.0


def strokes(classes: int, each: int, rng: np.random.Generator, photos: list[NDArray]) -> list[Array]:
    """Invented characters: two or three bent strokes."""
    out = []
    t = np.linspace(0, 1, 12)[:, None]
    for _ in range(classes):
        points = rng.uniform(-22, 22, (int(rng.integers(1, 4)), 4, 2))
        for _ in range(each):
            moved = points + rng.normal(0, 2.2, points.shape)
            scale = rng.uniform(0.75, 1.2, 2)
            canvas = Image.new("L", (56, 56), 0)
            draw = ImageDraw.Draw(canvas)
            width = int(rng.integers(2, 8))
            for p in moved:
                curve = (1 - t) ** 3 * p[0] + 3 * (1 - t) ** 2 * t * p[1] + 3 * (1 - t) * t**2 * p[2] + t**3 * p[3]
                draw.line(
                    [(28 + x * scale[0], 28 + y * scale[1]) for x, y in curve],
                    fill=255,
                    width=width,
                    joint="curve",
                )
            out.append(paint(shrink(canvas, rng), rng, photos))
    return out


def glyphs(classes: int, each: int, rng: np.random.Generator, photos: list[NDArray]) -> list[Array]:
    """Foreign letters and symbols of the shipped fonts; no Latin capital, no digit."""
    codes = [c for low, high in GLYPH_RANGES for c in range(low, high) if c not in (0x3BF, 0x43E, 0x585)]
    face = font(GLYPH_FONTS[0], 24)
    empty = bytes(face.getmask("\uffff"))
    codes = [c for c in codes if bytes(face.getmask(chr(c))) != empty]
    codes = [codes[i] for i in rng.permutation(len(codes))[:classes]]
    out = []
    for code in codes:
        for _ in range(each):
            canvas = Image.new("L", (56, 56), 0)
            face = font(GLYPH_FONTS[rng.integers(len(GLYPH_FONTS))], int(rng.integers(34, 56)))
            ImageDraw.Draw(canvas).text((28, 28), chr(code), fill=255, font=face, anchor="mm")
            out.append(paint(shrink(canvas, rng), rng, photos))
    return out


def textures(classes: int, each: int, rng: np.random.Generator, photos: list[NDArray]) -> list[Array]:
    """Filtered noise: every class has its own power spectrum, squashing and colours."""
    out = []
    fy, fx = np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None]
    radius, angle = np.hypot(fy, fx) + 1e-3, np.arctan2(fy, fx)
    for k in range(classes):
        slope, ring, sharp = rng.uniform(0, 2.5), rng.uniform(0.02, 0.4), rng.uniform(0.02, 0.2)
        turn, focus, order = rng.uniform(0, np.pi), rng.choice([0.0, 1.0, 3.0, 8.0]), rng.choice([1, 2])
        kind = rng.integers(4)
        one, two = two_colours(rng)
        for _ in range(each):
            phase = turn + rng.normal(0, 0.12)
            power = (
                radius**-slope
                * (0.05 + np.exp(-(((radius - ring) / sharp) ** 2)))
                * np.exp(focus * (np.cos(2 * order * (angle - phase)) - 1))
            )
            field = np.fft.ifft2(np.fft.fft2(rng.normal(0, 1, (SIZE, SIZE))) * power).real
            field = (field - field.mean()) / (field.std() + 1e-9)
            field = (np.tanh(field), np.sign(field), np.abs(field) - 0.8, np.where(field > 0.9, 1.5, -0.5))[kind]
            if k % 2:
                one, two = two_colours(rng)
            share = (0.5 + 0.4 * field * rng.uniform(0.5, 1.2)).clip(0, 1)[..., None]
            out.append(one * share + two * (1 - share))
    return out


def mappings(classes: int, each: int, rng: np.random.Generator, photos: list[NDArray]) -> list[Array]:
    """Random functions of the coordinates (a small network), turned, moved and zoomed."""
    out = []
    axis = np.linspace(-1, 1, SIZE)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    for k in range(classes):
        gain = rng.uniform(1.2, 3.5)
        a, b, c = rng.normal(0, gain, (3, 12)), rng.normal(0, gain / 3, (12, 12)), rng.normal(0, 0.7, (12, 3))
        for _ in range(each):
            w = rng.uniform(-0.35, 0.35)
            zoom = rng.uniform(0.75, 1.2)
            turn = np.array([[np.cos(w), -np.sin(w)], [np.sin(w), np.cos(w)]]) * zoom
            where = grid @ turn + rng.uniform(-0.25, 0.25, 2)
            full = np.concatenate([where, np.linalg.norm(where, axis=1, keepdims=True)], 1)
            hidden = np.sin(full @ (a + rng.normal(0, 0.06, a.shape)))
            hidden = np.tanh(hidden @ (b + rng.normal(0, 0.03, b.shape)))
            colour = np.tanh(hidden @ c).reshape(SIZE, SIZE, 3)
            if k % 2:
                colour = colour[..., rng.permutation(3)] * rng.choice([-1, 1], 3)
            out.append(128 + 120 * colour + rng.normal(0, rng.choice([0.0, 6.0, 14.0]), colour.shape))
    return out


def life(classes: int, each: int, rng: np.random.Generator, photos: list[NDArray]) -> list[Array]:
    """Two-dimensional automata with random birth and survival numbers, after a few steps."""
    out = []
    while len(out) < classes * each:
        rule = rng.random((2, 9)) < rng.uniform(0.3, 0.6)
        steps, size, start = int(rng.integers(2, 9)), int(rng.integers(1, 3)), rng.uniform(0.1, 0.6)
        side = SIZE // size + 1
        cells = (rng.random((each, side, side)) < start).astype(int)
        for _ in range(steps):
            around = sum(np.roll(cells, (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)) - cells
            cells = rule[cells, around].astype(int)
        if not 0.08 < cells.mean() < 0.92:
            continue
        big = cells.repeat(size, 1).repeat(size, 2)[:, :SIZE, :SIZE]
        out += [paint(b.astype(float), rng, photos) for b in big]
    return out


def layouts(classes: int, each: int, rng: np.random.Generator, photos: list[NDArray]) -> list[Array]:
    """Arrangements of two to five coloured polygons, discs and bars, each class with its own plan."""
    out = []
    for k in range(classes):
        parts = int(rng.integers(2, 6))
        centres, sizes = rng.uniform(12, 44, (parts, 2)), rng.uniform(5, 15, parts)
        sides, turns = rng.choice([2, 3, 4, 5, 20], parts), rng.uniform(0, 6.28, parts)
        colours = rng.uniform(0, 255, (parts, 3))
        for _ in range(each):
            if k % 2:
                colours = rng.uniform(0, 255, (parts, 3))
            canvas = Image.fromarray(ground(rng, rng.uniform(0, 255, 3), photos).clip(0, 255).astype(np.uint8)).resize(
                (56, 56)
            )
            draw = ImageDraw.Draw(canvas)
            w, move = rng.normal(0, 0.15), rng.normal(0, 3, 2)
            turn = np.array([[np.cos(w), -np.sin(w)], [np.sin(w), np.cos(w)]]) * rng.uniform(0.8, 1.2)
            for p in range(parts):
                x, y = (centres[p] - 28) @ turn + 28 + move + rng.normal(0, 1, 2)
                r, a = sizes[p] * rng.uniform(0.85, 1.15), turns[p] + w
                fill = tuple(int(v) for v in colours[p])
                if sides[p] == 2:
                    dx, dy = r * 1.4 * np.cos(a), r * 1.4 * np.sin(a)
                    draw.line((x - dx, y - dy, x + dx, y + dy), fill=fill, width=max(2, int(r / 2)))
                else:
                    corners = a + np.arange(sides[p]) * 2 * np.pi / sides[p]
                    draw.polygon([(x + r * np.cos(q), y + r * np.sin(q)) for q in corners], fill=fill)
            out.append(np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX)).astype(float))
    return out


def scenes(each: int, rng: np.random.Generator, photos: list[NDArray]) -> tuple[list[Array], int]:
    """Regions of photographs that no task uses: the class is the region."""
    out, classes = [], 0
    for photo in photos:
        rows, cols = max(1, photo.shape[0] // 130), max(1, photo.shape[1] // 130)
        for row in range(rows):
            for col in range(cols):
                y0, x0 = row * photo.shape[0] // rows, col * photo.shape[1] // cols
                region = photo[y0 : y0 + photo.shape[0] // rows, x0 : x0 + photo.shape[1] // cols]
                if region.std() < 18:
                    continue
                classes += 1
                for _ in range(each):
                    side = int(rng.integers(50, min(region.shape[:2]) - 20))
                    y, x = rng.integers(0, region.shape[0] - side), rng.integers(0, region.shape[1] - side)
                    crop = Image.fromarray(region[y : y + side, x : x + side]).resize(
                        (SIZE, SIZE), Image.Resampling.BOX
                    )
                    image = np.asarray(crop).astype(float)
                    if rng.random() < 0.3:
                        image = np.repeat(image.mean(2, keepdims=True), 3, 2)
                    image = (image - 128) * rng.uniform(0.6, 1.4) + 128 + rng.normal(0, 20, 3)
                    out.append(image[:, ::-1] if rng.random() < 0.5 else image)
    return out, classes


def spare_photographs() -> list[NDArray[np.uint8]]:
    """The shipped photographs that no task uses."""
    from skimage import data

    found = [getattr(data, n)() for n in ("astronaut", "camera", "rocket", "retina", "moon", "cell", "clock", "page")]
    left, _, _ = data.stereo_motorcycle()
    out = []
    for photo in [*found, left]:
        photo = np.asarray(photo)
        photo = np.repeat(photo[..., None], 3, 2) if photo.ndim == 2 else photo[..., :3]
        out.append(photo[::2, ::2] if photo.shape[0] > 900 else photo)
    return out


def make_pool(rng: np.random.Generator, *, each: int = 80, size: float = 1.0) -> Pool:
    """All families together: images and class numbers."""
    photos = spare_photographs()
    images: list[Array] = []
    labels: list[NDArray] = []
    total = 0
    plan = ((strokes, 260), (glyphs, 300), (textures, 160), (mappings, 160), (life, 60), (layouts, 160))
    for family, classes in plan:
        classes = max(2, int(classes * size))
        made = family(classes, each, rng, photos)
        images += [np.asarray(m).clip(0, 255).astype(np.uint8) for m in made]
        labels.append(total + np.arange(len(made)) // each)
        total += len(made) // each
    made, classes = scenes(each, rng, photos)
    images += [m.clip(0, 255).astype(np.uint8) for m in made]
    labels.append(total + np.arange(len(made)) // each)
    return np.stack(images), np.concatenate(labels).astype(np.int64)
