"""Small sets of pictures for people without data: drawn faces, facades, a style, a clip, and packaged photographs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from monai_rl_reg.drawings.facade import facade
from monai_rl_reg.drawings.face import face
from monai_rl_reg.drawings.painting import painting
from monai_rl_reg.drawings.sheet import FINE, Array
from monai_rl_reg.errors import InputError
from monai_rl_reg.files import made_once
from monai_rl_reg.pictures import import_extra, write_picture

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
        return face(np.random.default_rng([seed, number]), size)

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
        return facade(np.random.default_rng([seed, number]), size)

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

    return made_once(Path(folder) / "packaged", make)


def packaged_style(folder: str | Path, size: int = 384, seed: int = 0) -> Path:
    """Draw a painting, unless it is there: brush strokes along the flow of a night sky, strong in colour.

    Returns:
        the picture, a PNG file in a folder of its own.
    """

    def draw(number: int) -> Array:
        return painting(np.random.default_rng([seed, number]), size)

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

    return made_once(Path(folder) / f"clip_{frames}x{height}x{width}", make)


def _drawn_once(folder: Path, count: int, draw: Callable[[int], Array]) -> Path:
    """Fill the folder with ``count`` pictures (H, W, 3), named by their numbers."""

    def make(inside: Path) -> None:
        for number in range(count):
            write_picture(inside / f"{number:03d}.png", torch.from_numpy(draw(number)).movedim(-1, 0))

    return made_once(folder, make)


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
