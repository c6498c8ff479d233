"""Small sets of pictures for people without data: drawn faces, facades, a style, a clip, and packaged photographs."""

from __future__ import annotations

import colorsys
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from monai_rl_reg.errors import InputError
from monai_rl_reg.pictures import import_extra, to_bytes, write_picture

Array = NDArray[np.float64]
Colour = tuple[int, int, int]

FINE = 4
"""Pictures are drawn this many times larger, and averaged down, so that edges are smooth."""

LABELS: dict[str, Colour] = {
    "background": (0, 0, 170),
    "wall": (0, 0, 255),
    "window": (0, 85, 255),
    "door": (0, 170, 255),
    "cornice": (0, 255, 255),
    "sill": (85, 255, 170),
    "balcony": (170, 255, 85),
    "blind": (255, 255, 0),
    "decoration": (255, 170, 0),
    "molding": (255, 85, 0),
    "pillar": (255, 0, 0),
    "shop": (170, 0, 0),
}
"""Colours of a drawn facade's label map: those of the CMP facades."""

PHOTOGRAPHS = {
    "skimage/data": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "rocket.jpg",
        "motorcycle_left.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
        "ihc.png",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
"""Colour pictures inside the installed scikit-image and scikit-learn."""


def draw_faces(folder: str | Path, count: int = 400, size: int = 96, seed: int = 0) -> Path:
    """Draw aligned faces as PNG files, unless they are there: symmetrical, so that a hole can be guessed.

    Args:
        folder: where; the set is made as a whole or not at all, in a folder of its own.
        count: number of faces.
        size: pixels a side.
        seed: of everything random in them.

    Returns:
        the folder of this set.
    """

    def draw(number: int) -> Array:
        return _face(np.random.default_rng([seed, number]), size)

    return _drawn_once(Path(folder) / f"faces_{count}x{size}_seed{seed}", count, draw)


def draw_facades(folder: str | Path, count: int = 200, size: int = 128, seed: int = 0) -> Path:
    """Draw facades as PNG files, unless they are there: on the left a "photograph", on the right its label map.

    Args:
        folder: where; the set is made as a whole or not at all, in a folder of its own.
        count: number of facades.
        size: pixels a side of each half.
        seed: of everything random in them.

    Returns:
        the folder of this set.
    """

    def draw(number: int) -> Array:
        return _facade(np.random.default_rng([seed, number]), size)

    return _drawn_once(Path(folder) / f"facades_{count}x{size}_seed{seed}", count, draw)


def packaged_pictures(folder: str | Path) -> Path:
    """Copy the photographs inside scikit-image and scikit-learn as PNG files, unless they are there.

    At most 512 pixels on the longer side; a file that an installed version lacks is skipped.

    Returns:
        the folder of this set.

    Raises:
        InputError: if neither package is installed, or neither has any of the pictures.
    """

    def make(inside: Path) -> None:
        for path in _packaged_files():
            image = import_extra("PIL.Image").open(path).convert("RGB")
            image.thumbnail((512, 512), import_extra("PIL.Image").Resampling.LANCZOS)
            image.save(inside / f"{path.stem}.png")

    return _made_once(Path(folder) / "packaged", make)


def packaged_style(folder: str | Path, size: int = 384, seed: int = 0) -> Path:
    """Draw a painting, unless it is there: brush strokes along the flow of a night sky, strong in colour.

    Returns:
        the picture, a PNG file in a folder of its own.
    """

    def draw(number: int) -> Array:
        return _painting(np.random.default_rng([seed, number]), size)

    return _drawn_once(Path(folder) / f"style_{size}_seed{seed}", 1, draw) / "000.png"


def draw_clip(folder: str | Path, frames: int = 24, size: tuple[int, int] = (192, 256)) -> Path:
    """Make a clip as PNG frames, unless it is there: a pan and zoom over a packaged picture, and a moving disc.

    Args:
        folder: where; the clip is made as a whole or not at all, in a folder of its own.
        frames: how many.
        size: height and width in pixels.

    Returns:
        the folder of the frames.

    Raises:
        InputError: if neither scikit-image nor scikit-learn is installed.
    """
    height, width = size

    def make(inside: Path) -> None:
        image_module = import_extra("PIL.Image")
        picture = image_module.open(_packaged_files()[0]).convert("RGB")
        for number in range(frames):
            t = number / max(frames - 1, 1)
            view = min(picture.width / width, picture.height / height) * (0.75 - 0.2 * t)
            left, top = (
                (picture.width - view * width) * (0.2 + 0.6 * t),
                (picture.height - view * height) * (0.1 + 0.4 * t),
            )
            box = (left, top, left + view * width, top + view * height)
            frame = picture.resize((width, height), image_module.Resampling.LANCZOS, box=box)
            disc = image_module.new("L", (FINE * width, FINE * height))
            x, y, r = (
                FINE * width * (0.15 + 0.7 * t),
                FINE * height * (0.7 - 0.4 * math.sin(math.pi * t)),
                FINE * height / 9,
            )
            import_extra("PIL.ImageDraw").Draw(disc).ellipse((x - r, y - r, x + r, y + r), fill="white")
            frame.paste((230, 60, 30), mask=disc.resize((width, height), image_module.Resampling.BOX))
            frame.save(inside / f"{number:05d}.png")

    return _made_once(Path(folder) / f"clip_{frames}x{height}x{width}", make)


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder; fill it first if it is not there, under another name until it is complete."""
    folder = Path(os.path.normpath(folder))
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".drawing") as temporary:
            inside = Path(temporary) / folder.name
            inside.mkdir()
            make(inside)
            inside.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise InputError(f"output {folder}: expected room to write pictures, found: {error}") from error
    return folder


def _drawn_once(folder: Path, count: int, draw: Callable[[int], Array]) -> Path:
    """Fill the folder with ``count`` pictures (H, W, 3), named by their numbers."""

    def make(inside: Path) -> None:
        for number in range(count):
            write_picture(inside / f"{number:03d}.png", torch.from_numpy(draw(number)).movedim(-1, 0))

    return _made_once(folder, make)


def _packaged_files() -> list[Path]:
    files: list[Path] = []
    error = InputError(f"packaged pictures: expected any of {PHOTOGRAPHS}, found none")
    for place, names in PHOTOGRAPHS.items():
        package, _, inner = place.partition("/")
        try:
            home = Path(import_extra(package).__file__).parent / inner
        except InputError as missing:
            error = missing
            continue
        files += [home / name for name in names if (home / name).is_file()]
    if not files:
        raise error
    return files


class _Sheet:
    """A square picture that is drawn in coordinates from 0 to 1, x to the right and y down."""

    def __init__(self, size: int, colours: Array) -> None:
        """Start from ``colours``, (3,) or (size, size, 3) from 0 to 1."""
        self.size, self.side = size, FINE * size
        pixels = torch.from_numpy(np.broadcast_to(colours, (size, size, 3)).copy()).movedim(-1, 0)
        enlarged = pixels.repeat_interleave(FINE, 1).repeat_interleave(FINE, 2)
        self.image = import_extra("PIL.Image").fromarray(to_bytes(enlarged))
        self.draw = import_extra("PIL.ImageDraw").Draw(self.image)

    def ellipse(self, x: float, y: float, across: float, down: float, colour: Array) -> None:
        """Fill an ellipse of these half axes around (x, y)."""
        box = np.array([x - across, y - down, x + across, y + down]) * self.side
        self.draw.ellipse(box.tolist(), fill=_rgb(colour))

    def box(self, left: float, top: float, right: float, bottom: float, colour: Array) -> None:
        """Fill a rectangle; nothing where it has no area."""
        box = np.round(np.array([left, top, right, bottom]) * self.side) - [0, 0, 1, 1]
        if box[2] >= box[0] and box[3] >= box[1]:
            self.draw.rectangle(box.tolist(), fill=_rgb(colour))

    def polygon(self, points: Array, colour: Array) -> None:
        """Fill the polygon through points (n, 2)."""
        self.draw.polygon((points * self.side).ravel().tolist(), fill=_rgb(colour))

    def line(self, points: Array, width: float, colour: Array) -> None:
        """Draw a line with round ends through points (n, 2)."""
        points, half = points * self.side, width * self.side / 2
        self.draw.line(points.ravel().tolist(), fill=_rgb(colour), width=max(1, round(2 * half)), joint="curve")
        for x, y in (points[0], points[-1]):
            self.draw.ellipse((x - half, y - half, x + half, y + half), fill=_rgb(colour))

    def pixels(self, *, smooth: bool = True) -> Array:
        """Return the picture, (size, size, 3) from 0 to 1; not smooth, it has only the colours drawn with."""
        method = import_extra("PIL.Image").Resampling
        small = self.image.resize((self.size, self.size), method.BOX if smooth else method.NEAREST)
        return np.asarray(small, dtype=np.float64) / 255


def _rgb(colour: Array) -> tuple[int, ...]:
    return tuple(int(c) for c in np.clip(np.round(255 * np.asarray(colour)), 0, 255))


def _hsv(hue: float, saturation: float, value: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _grid(size: int) -> tuple[Array, Array]:
    """Coordinates x and y of the pixels' centres, (size, size) each, from 0 to 1."""
    line = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(line, line)
    return x, y


def _between(low: Array, high: Array, share: Array) -> Array:
    """Colours (..., 3) from ``low`` where the share (...) is 0 to ``high`` where it is 1."""
    return low + (high - low) * np.clip(share, 0, 1)[..., None]


def _curve(xs: Array, ys: Array, count: int = 24) -> Array:
    """Points (count, 2) on the parabola through three points."""
    t = np.linspace(0, 1, count)[:, None]
    a, b, c = np.stack([xs, ys], axis=1)
    return a * (1 - t) * (1 - 2 * t) + 4 * b * t * (1 - t) + c * t * (2 * t - 1)


SKINS = np.array([(255, 226, 205), (243, 199, 163), (224, 172, 125), (190, 130, 88), (140, 88, 58), (92, 58, 42)]) / 255
HAIRS = np.array([(28, 22, 20), (66, 40, 24), (120, 76, 40), (214, 172, 96), (150, 60, 28), (190, 188, 186)]) / 255


def _face(random: Generator, size: int) -> Array:
    """One face, (size, size, 3): everything lies on the axis x = 0.5 or twice, left and right of it."""
    u = random.uniform
    tone = u(0, len(SKINS) - 1)
    skin = np.array([np.interp(tone, range(len(SKINS)), SKINS[:, c]) for c in range(3)])
    hair = np.clip(HAIRS[random.integers(len(HAIRS))] * u(0.8, 1.2) + u(-0.03, 0.03, 3), 0, 1)
    clothes = _hsv(u(), u(0.2, 0.9), u(0.3, 0.9))
    across, down, middle = u(0.225, 0.265), u(0.31, 0.35), u(0.5, 0.53)
    x, y = _grid(size)

    slope = u(0, 2 * math.pi)
    share = 0.5 + (x - 0.5) * math.cos(slope) + (y - 0.5) * math.sin(slope)
    sheet = _Sheet(size, _between(_hsv(u(), u(0.1, 0.7), u(0.3, 1)), _hsv(u(), u(0.1, 0.7), u(0.3, 1)), share))
    length = random.choice([0.0, 0.0, 0.62, 0.8, 0.98])  # of the hair behind the head, as a height in the picture
    thick = u(0.03, 0.075)
    bald = u() < 0.1
    if length and not bald:
        sheet.ellipse(0.5, middle - 0.06, across + thick, down + thick * 0.6, hair * 0.75)
        sheet.box(0.5 - across - thick, middle - 0.06, 0.5 + across + thick, length, hair * 0.75)
    sheet.ellipse(0.5, 1.13, u(0.4, 0.5), u(0.24, 0.28), clothes)
    neck = u(0.09, 0.13)
    sheet.box(0.5 - neck, middle + 0.2, 0.5 + neck, 0.93, skin * 0.82)
    sheet.ellipse(0.5, 0.93, neck, 0.05, skin * 0.82)
    for side in (-1, 1):
        sheet.ellipse(0.5 + side * across, middle + 0.01, 0.035, 0.065, skin * 0.9)
    sheet.ellipse(0.5, middle - 0.03, across, down - 0.03, skin)
    sheet.ellipse(0.5, middle + 0.09, across * u(0.78, 0.92), down - 0.09, skin)

    beard = u() < 0.2
    if beard:
        rim = _curve(np.array([-0.98, 0, 0.98]) * across * 0.9 + 0.5, middle + np.array([0.08, 0.17, 0.08]))
        chin = np.stack([0.5 + across * 0.9 * np.cos(np.linspace(0, math.pi, 24))] * 2, axis=1)
        chin[:, 1] = middle + 0.08 + (down - 0.075) * np.sin(np.linspace(0, math.pi, 24))
        sheet.polygon(np.concatenate([rim, chin]), 0.3 * skin + 0.7 * hair)
    blush, strength = np.array([0.9, 0.35, 0.3]), u(0.03, 0.2)
    for side in (-1, 1):
        sheet.ellipse(0.5 + side * 0.14, middle + 0.1, 0.05, 0.04, (1 - strength) * skin + strength * blush)

    apart, level, wide, high = u(0.1, 0.12), middle - u(0.03, 0.05), u(0.042, 0.055), u(0.02, 0.034)
    iris, gaze = _hsv(random.choice([0.07, 0.07, 0.3, 0.57]), u(0.4, 0.8), u(0.25, 0.65)), u(-0.012, 0.012)
    brow, arch = hair * 0.7 if not bald else skin * 0.45, u(0, 0.025)
    for side in (-1, 1):
        eye = 0.5 + side * apart
        sheet.ellipse(eye, level - 0.006, wide * 1.12, high * 1.25, skin * 0.62)
        sheet.ellipse(eye, level, wide, high, np.array([0.97, 0.97, 0.96]))
        sheet.ellipse(eye + gaze, level, high * 0.85, high * 0.9, iris)
        sheet.ellipse(eye + gaze, level, high * 0.42, high * 0.45, np.zeros(3))
        sheet.ellipse(eye + gaze - 0.008, level - 0.008, 0.006, 0.006, np.ones(3))
        raised = level - high - 0.03 - np.array([0, arch, -0.008])
        sheet.line(_curve(eye + side * np.array([-1, 0.2, 1.2]) * wide, raised), 0.016, brow)
    tip, broad = middle + u(0.08, 0.1), u(0.025, 0.04)
    for side in (-1, 1):
        sheet.line(
            _curve(0.5 + side * np.array([0.35, 0.55, 1]) * broad, tip - np.array([0.11, 0.05, 0.01])),
            0.008,
            skin * 0.86,
        )
        sheet.ellipse(0.5 + side * broad * 0.6, tip + 0.005, broad * 0.5, 0.014, skin * 0.78)
    sheet.ellipse(0.5, tip - 0.005, broad * 0.75, 0.02, np.minimum(skin * 1.06, 1))

    lips = 0.55 * skin + 0.45 * _hsv(0.98, u(0.5, 0.9), u(0.5, 0.8))
    mouth, half, smile = middle + u(0.175, 0.195), u(0.06, 0.1), u(-0.012, 0.035)
    corners = 0.5 + np.array([-1, 0, 1]) * half
    upper = _curve(corners, mouth + np.array([-smile, smile * 0.4, -smile]))
    lower = _curve(corners, mouth + np.array([-smile, smile + u(0.01, 0.045), -smile]))
    if u() < 0.5:  # open: teeth, then the rim of the lips
        sheet.polygon(np.concatenate([upper, lower[::-1]]), np.array([0.95, 0.94, 0.9]))
    else:
        sheet.polygon(np.concatenate([upper, lower[::-1]]), lips)
    sheet.line(upper, 0.014, lips * 0.85)
    sheet.line(lower, 0.016, lips)

    if not bald:  # from the left temple over the top to the right one, and back along the hairline
        angle = np.linspace(math.pi * 1.03, -math.pi * 0.03, 40)
        outline = np.stack([0.5 + (across + thick * 0.7) * np.cos(angle), np.sin(angle)], axis=1)
        outline[:, 1] = middle - 0.06 - (down - 0.06 + thick) * outline[:, 1]
        parting = 0.5 + random.choice([-0.1, 0, 0, 0.1])
        line = np.linspace(0.5 + across, 0.5 - across, 40)
        forehead = middle - down + u(0.07, 0.15) + u(0.3, 1.2) * np.abs(line - parting) ** 1.5
        side_line = np.clip(np.abs(line - 0.5) / across, 0, 1) ** 12
        forehead = forehead * (1 - side_line) + (middle - 0.03) * side_line
        sheet.polygon(np.concatenate([outline, np.stack([line, forehead], axis=1)]), hair)
        for start in np.linspace(-0.9, 0.9, 12):  # strands
            top = np.array([parting, middle - down - thick * 0.6])
            end = np.array([0.5 + start * across, middle - down + 0.06 + 0.14 * start**2])
            bend = (top + end) / 2 + np.array([0.02 * start, -0.01])
            points = np.stack([top, bend, end])
            sheet.line(_curve(points[:, 0], points[:, 1]), 0.005, np.clip(hair * u(0.7, 1.4), 0, 1))
    if u() < 0.2:
        frame = _hsv(u(), u(0, 0.8), u(0.05, 0.4))
        for side in (-1, 1):
            turn = np.linspace(0, 2 * math.pi, 40)
            ring = np.stack([0.5 + side * apart + 0.075 * np.cos(turn), level + 0.055 * np.sin(turn)], axis=1)
            sheet.line(ring, 0.011, frame)
        sheet.line(_curve(np.array([-1, 0, 1]) * (apart - 0.075) + 0.5, level - np.array([0, 0.01, 0])), 0.011, frame)

    picture = sheet.pixels()
    aside, tilt = u(-1, 1), u(0.1, 0.6)  # light from one side and above, strongest on the head
    right, below = (x - 0.5) / (across * 1.6), (y - middle) / (down * 1.6)
    near = np.exp(-(right**2) - below**2)
    shade = 0.75 + near * (0.28 + 0.4 * aside * right - 0.5 * tilt * below)
    tint = 1 + u(-0.06, 0.06, 3)
    return np.clip(picture * shade[..., None] * tint + random.normal(0, 0.008, picture.shape), 0, 1)


def _smooth_noise(random: Generator, size: int, cells: int) -> Array:
    """Noise (size, size) of about standard deviation 1 that changes over 1 / cells of the side."""
    coarse = torch.from_numpy(random.normal(size=(1, 1, cells, cells)))
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    return np.asarray(fine[0, 0])


def _facade(random: Generator, size: int) -> Array:
    """One facade and its label map side by side, (size, 2 size, 3)."""
    u = random.uniform
    x, y = _grid(size)
    clouds = 0.5 + 0.35 * _smooth_noise(random, size, 5) - 0.3 * y
    photo = _Sheet(size, _between(_hsv(u(0.55, 0.6), u(0.25, 0.6), u(0.7, 0.95)), np.full(3, u(0.85, 1)), clouds))
    labels = _Sheet(size, _label_colour("background"))

    def part(kind: str, left: float, top: float, right: float, bottom: float, colour: Array) -> None:
        photo.box(left, top, right, bottom, colour)
        labels.box(left, top, right, bottom, _label_colour(kind))

    wall = _hsv(u(0.02, 0.13), u(0.1, 0.55), u(0.5, 0.92))
    stone = 0.5 * wall + 0.5 * np.full(3, u(0.75, 0.95))
    wood = _hsv(u(0.03, 0.1) if u() < 0.6 else u(0.3, 0.6), u(0.3, 0.7), u(0.2, 0.5))
    frame = np.full(3, u(0.8, 0.95)) if u() < 0.7 else wood
    left, right, top, street = u(0, 0.09), 1 - u(0, 0.09), u(0.06, 0.18), u(0.91, 0.97)
    photo.box(0, street, 1, 1, np.full(3, u(0.3, 0.5)))
    part("wall", left, top, right, street, wall)
    _masonry(random, photo, (left, top, right, street), wall)

    floors, columns = int(random.integers(3, 6)), int(random.integers(3, 6))
    ground = street - (street - top) * 1.25 / (floors + 0.5)
    storey, bay = (ground - top - 0.05) / (floors - 1), (right - left) / columns
    half, high = bay * u(0.22, 0.36), storey * u(0.5, 0.66)
    with_pillars, with_moldings, with_sills = u(size=3) < (0.4, 0.6, 0.8)
    railed = int(random.integers(0, floors)) if u() < 0.7 else -1
    decorated = int(random.integers(0, floors)) if u() < 0.5 else -1
    shuttered = u(0, 0.5)

    def window(middle: float, upper: float, lower: float, reach: float) -> None:
        part("window", middle - reach, upper, middle + reach, lower, frame)
        edge, glass = 0.008, _hsv(u(0.55, 0.62), u(0.15, 0.45), u(0.12, 0.4))
        photo.box(middle - reach + edge, upper + edge, middle + reach - edge, lower - edge, glass)
        shine = np.array([(-1, 0.1), (0.2, 0.1), (-0.5, 0.9), (-1, 0.9)]) * [reach - edge, lower - upper]
        photo.polygon(shine + np.array([middle, upper]), 0.7 * glass + 0.3 * np.array([0.75, 0.85, 0.95]))
        photo.box(middle - 0.004, upper, middle + 0.004, lower, frame)
        photo.box(
            middle - reach,
            upper + 0.35 * (lower - upper),
            middle + reach,
            upper + 0.35 * (lower - upper) + 0.007,
            frame,
        )

    def shadow(from_left: float, upper: float, to_right: float, depth: float) -> None:
        photo.box(from_left, upper, to_right, upper + depth, wall * 0.6)

    for floor in range(floors - 1):
        ceiling = top + 0.05 + floor * storey
        if with_moldings and floor:
            part("molding", left, ceiling - 0.012, right, ceiling + 0.008, stone * 0.95)
            shadow(left, ceiling + 0.008, right, 0.008)
        for column in range(columns):
            middle = left + (column + 0.5) * bay
            upper = ceiling + 0.6 * (storey - high)
            lower = upper + high
            if floor == decorated:
                part("decoration", middle - half * 1.15, upper - 0.032, middle + half * 1.15, upper - 0.008, stone)
                shadow(middle - half * 1.15, upper - 0.008, middle + half * 1.15, 0.006)
            window(middle, upper, lower, half)
            if u() < shuttered:
                drawn = upper + high * u(0.25, 0.8)
                part("blind", middle - half, upper, middle + half, drawn, frame * 0.9)
                for slat in np.arange(upper + 0.01, drawn, 0.014):
                    photo.box(middle - half, slat, middle + half, slat + 0.004, frame * 0.68)
            if floor == railed:
                part("balcony", middle - half * 1.3, lower - 0.06, middle + half * 1.3, lower + 0.012, wall * 0.35)
                for bar in np.arange(middle - half * 1.3 + 0.008, middle + half * 1.3 - 0.008, 0.016):
                    photo.box(bar, lower - 0.052, bar + 0.008, lower, wall * 0.85)
                shadow(middle - half * 1.3, lower + 0.012, middle + half * 1.3, 0.012)
            elif with_sills:
                part("sill", middle - half * 1.15, lower, middle + half * 1.15, lower + 0.016, stone)
                shadow(middle - half * 1.15, lower + 0.016, middle + half * 1.15, 0.008)

    entrance, shops = int(random.integers(columns)), u() < 0.5
    part("molding", left, ground - 0.012, right, ground + 0.012, stone * 0.9)
    shadow(left, ground + 0.012, right, 0.01)
    awning = _hsv(u(), u(0.4, 0.8), u(0.4, 0.8))
    for column in range(columns):
        middle, upper = left + (column + 0.5) * bay, ground + 0.25 * (street - ground)
        if column == entrance:
            reach = min(half, 0.07)
            part("door", middle - reach, upper, middle + reach, street, wood)
            for side in (-1, 1):
                for level in (0.12, 0.55):
                    panel = upper + level * (street - upper)
                    near, away = sorted((middle + side * reach * 0.15, middle + side * reach * 0.85))
                    photo.box(near, panel, away, panel + 0.33 * (street - upper), wood * 0.7)
        elif shops:
            part("shop", middle - bay * 0.42, upper, middle + bay * 0.42, street - 0.02, np.array([0.16, 0.17, 0.2]))
            photo.box(middle - bay * 0.42, upper, middle + bay * 0.42, upper + 0.035, awning)
            for stripe in np.arange(middle - bay * 0.42, middle + bay * 0.4, 0.04):
                photo.box(stripe, upper, stripe + 0.02, upper + 0.035, np.full(3, 0.9))
        else:
            window(middle, upper, upper + 0.5 * (street - upper), half)
    if with_pillars:
        for column in range(columns + 1):
            at = min(max(left + column * bay, left + 0.016), right - 0.016)
            part("pillar", at - 0.016, top + 0.05, at + 0.016, ground - 0.012, stone * 0.97)
            photo.box(at + 0.01, top + 0.05, at + 0.016, ground - 0.012, stone * 0.7)
    part("cornice", max(left - 0.02, 0), top, min(right + 0.02, 1), top + 0.04, stone)
    photo.box(max(left - 0.02, 0), top + 0.024, min(right + 0.02, 1), top + 0.029, stone * 0.75)
    shadow(left, top + 0.04, right, 0.015)

    slope = u(-0.25, 0.25)
    light = u(0.85, 1.05) + slope * (x - 0.5) + u(-0.15, 0.15) * (y - 0.5) + 0.04 * _smooth_noise(random, size, 7)
    picture = photo.pixels() * light[..., None] + random.normal(0, 0.02, (size, size, 3))
    return np.concatenate([np.clip(picture, 0, 1), labels.pixels(smooth=False)], axis=1)


def _label_colour(kind: str) -> Array:
    return np.array(LABELS[kind]) / 255


def _masonry(random: Generator, photo: _Sheet, box: tuple[float, float, float, float], wall: Array) -> None:
    """Draw bricks, blocks or plaster over a wall."""
    left, top, right, bottom = box
    high, wide, spread = ((0.022, 0.05, 0.09), (0.055, 0.12, 0.05), (0.03, 0.03, 0.025))[random.integers(3)]
    joint = 0.0 if high == wide else 0.005  # of mortar: there the wall shows
    for row, upper in enumerate(np.arange(top, bottom, high)):
        for start in np.arange(left - wide * (0.5 * (row % 2)), right, wide):
            colour = wall * (1 + random.uniform(-spread, spread))
            photo.box(
                max(start, left), upper, min(start + wide, right) - joint, min(upper + high, bottom) - joint, colour
            )


def _painting(random: Generator, size: int) -> Array:
    """A night sky over hills, (size, size, 3), in strokes that follow a smooth vector field."""
    u = random.uniform
    centres = np.stack([u(0.05, 0.95, 9), u(0.05, 0.62, 9)], axis=1)
    radii, strengths = u(0.06, 0.15, 9), random.choice([-1, 1], 9) * u(0.6, 1.4, 9)
    horizon = lambda at: 0.76 + 0.06 * np.sin(7 * at + 1) + 0.03 * np.sin(17 * at)  # noqa: E731

    def flow(points: Array) -> Array:
        """Unit vectors (n, 2) at points (n, 2)."""
        drift = np.stack([np.ones(len(points)), 0.35 * np.sin(9 * points[:, 0])], axis=1) * 0.5
        for centre, radius, strength in zip(centres, radii, strengths, strict=True):
            away = points - centre
            weight = 2.2 * strength * np.exp(-0.5 * (away**2).sum(1) / radius**2) / radius
            drift += weight[:, None] * away[:, ::-1] * [-1, 1]
        return drift / (np.linalg.norm(drift, axis=1, keepdims=True) + 1e-9)

    blues = np.array([(12, 24, 80), (24, 60, 150), (60, 120, 200), (140, 190, 220), (230, 235, 205)]) / 255
    lights = np.array([(255, 250, 200), (255, 215, 70), (245, 160, 40), (150, 170, 120)]) / 255
    greens = np.array([(10, 26, 30), (20, 60, 50), (60, 100, 60), (150, 140, 60)]) / 255

    def colour(point: Array) -> Array:
        nearest = np.linalg.norm(point - centres, axis=1) / radii
        if point[1] > horizon(point[0]):
            palette, value = greens, 0.45 + 0.45 * math.sin(60 * (point[1] - horizon(point[0])))
        elif nearest.min() < 0.75:
            palette, value = lights, nearest.min() / 0.75
        else:
            palette, value = (
                blues,
                0.42 + 0.4 * math.sin(24 * point[1] + 5 * math.cos(5 * point[0]) + 6 * nearest.min()),
            )
        place = np.clip(value + random.normal(0, 0.13), 0, 1) * (len(palette) - 1)
        return np.array([np.interp(place, range(len(palette)), palette[:, c]) for c in range(3)])

    sheet = _Sheet(size, blues[1])
    for width, count in ((0.03, 900), (0.016, 3500), (0.009, 5000)):
        paths = [u(-0.05, 1.05, (count, 2))]
        for _ in range(8):
            paths.append(paths[-1] + flow(paths[-1]) * 0.011)
        for path in np.stack(paths, axis=1):
            paint = colour(path[4])
            sheet.line(path + width * 0.12, width, paint * 0.8)  # the edge of thick paint
            sheet.line(path, width * 0.8, np.minimum(paint * u(0.95, 1.1), 1))
    return sheet.pixels()
