"""What every drawing is made with: a sheet to draw shapes on, colours and coordinates."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from monai_rl_reg.pictures import import_extra, to_bytes

Array = NDArray[np.float64]

FINE = 4
"""Pictures are drawn this many times larger, and averaged down, so that edges are smooth."""


class Sheet:
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


def hsv(hue: float, saturation: float, value: float) -> Array:
    """Return a colour (3,) from 0 to 1."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def grid(size: int) -> tuple[Array, Array]:
    """Coordinates x and y of the pixels' centres, (size, size) each, from 0 to 1."""
    line = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(line, line)
    return x, y


def between(low: Array, high: Array, share: Array) -> Array:
    """Colours (..., 3) from ``low`` where the share (...) is 0 to ``high`` where it is 1."""
    return low + (high - low) * np.clip(share, 0, 1)[..., None]


def curve(xs: Array, ys: Array, count: int = 24) -> Array:
    """Points (count, 2) on the parabola through three points."""
    t = np.linspace(0, 1, count)[:, None]
    a, b, c = np.stack([xs, ys], axis=1)
    return a * (1 - t) * (1 - 2 * t) + 4 * b * t * (1 - t) + c * t * (2 * t - 1)


def smooth_noise(random: Generator, size: int, cells: int) -> Array:
    """Noise (size, size) of about standard deviation 1 that changes over 1 / cells of the side."""
    coarse = torch.from_numpy(random.normal(size=(1, 1, cells, cells)))
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    return np.asarray(fine[0, 0])
