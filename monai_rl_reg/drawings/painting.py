"""A drawn painting."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator

from monai_rl_reg.drawings.sheet import Array, Sheet


def painting(random: Generator, size: int) -> Array:
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

    sheet = Sheet(size, blues[1])
    for width, count in ((0.03, 900), (0.016, 3500), (0.009, 5000)):
        paths = [u(-0.05, 1.05, (count, 2))]
        for _ in range(8):
            paths.append(paths[-1] + flow(paths[-1]) * 0.011)
        for path in np.stack(paths, axis=1):
            paint = colour(path[4])
            sheet.line(path + width * 0.12, width, paint * 0.8)  # the edge of thick paint
            sheet.line(path, width * 0.8, np.minimum(paint * u(0.95, 1.1), 1))
    return sheet.pixels()
