"""A drawn facade and its label map."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from monai_rl_reg.drawings.sheet import Array, Sheet, between, grid, hsv, smooth_noise

Colour = tuple[int, int, int]

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


def facade(random: Generator, size: int) -> Array:
    """One facade and its label map side by side, (size, 2 size, 3)."""
    u = random.uniform
    x, y = grid(size)
    clouds = 0.5 + 0.35 * smooth_noise(random, size, 5) - 0.3 * y
    photo = Sheet(size, between(hsv(u(0.55, 0.6), u(0.25, 0.6), u(0.7, 0.95)), np.full(3, u(0.85, 1)), clouds))
    labels = Sheet(size, _label_colour("background"))

    def part(kind: str, left: float, top: float, right: float, bottom: float, colour: Array) -> None:
        photo.box(left, top, right, bottom, colour)
        labels.box(left, top, right, bottom, _label_colour(kind))

    wall = hsv(u(0.02, 0.13), u(0.1, 0.55), u(0.5, 0.92))
    stone = 0.5 * wall + 0.5 * np.full(3, u(0.75, 0.95))
    wood = hsv(u(0.03, 0.1) if u() < 0.6 else u(0.3, 0.6), u(0.3, 0.7), u(0.2, 0.5))
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
        edge, glass = 0.008, hsv(u(0.55, 0.62), u(0.15, 0.45), u(0.12, 0.4))
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
                for slat in np.arange(upper + 0.01, drawn, 0.014).tolist():
                    photo.box(middle - half, slat, middle + half, slat + 0.004, frame * 0.68)
            if floor == railed:
                part("balcony", middle - half * 1.3, lower - 0.06, middle + half * 1.3, lower + 0.012, wall * 0.35)
                for bar in np.arange(middle - half * 1.3 + 0.008, middle + half * 1.3 - 0.008, 0.016).tolist():
                    photo.box(bar, lower - 0.052, bar + 0.008, lower, wall * 0.85)
                shadow(middle - half * 1.3, lower + 0.012, middle + half * 1.3, 0.012)
            elif with_sills:
                part("sill", middle - half * 1.15, lower, middle + half * 1.15, lower + 0.016, stone)
                shadow(middle - half * 1.15, lower + 0.016, middle + half * 1.15, 0.008)

    entrance, shops = int(random.integers(columns)), u() < 0.5
    part("molding", left, ground - 0.012, right, ground + 0.012, stone * 0.9)
    shadow(left, ground + 0.012, right, 0.01)
    awning = hsv(u(), u(0.4, 0.8), u(0.4, 0.8))
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
            for stripe in np.arange(middle - bay * 0.42, middle + bay * 0.4, 0.04).tolist():
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
    light = u(0.85, 1.05) + slope * (x - 0.5) + u(-0.15, 0.15) * (y - 0.5) + 0.04 * smooth_noise(random, size, 7)
    picture = photo.pixels() * light[..., None] + random.normal(0, 0.02, (size, size, 3))
    return np.concatenate([np.clip(picture, 0, 1), labels.pixels(smooth=False)], axis=1)


def _label_colour(kind: str) -> Array:
    return np.array(LABELS[kind]) / 255


def _masonry(random: Generator, photo: Sheet, box: tuple[float, float, float, float], wall: Array) -> None:
    """Draw bricks, blocks or plaster over a wall."""
    left, top, right, bottom = box
    high, wide, spread = ((0.022, 0.05, 0.09), (0.055, 0.12, 0.05), (0.03, 0.03, 0.025))[random.integers(3)]
    joint = 0.0 if high == wide else 0.005  # of mortar: there the wall shows
    for row, upper in enumerate(np.arange(top, bottom, high).tolist()):
        for start in np.arange(left - wide * (0.5 * (row % 2)), right, wide).tolist():
            colour = wall * (1 + random.uniform(-spread, spread))
            photo.box(
                max(start, left), upper, min(start + wide, right) - joint, min(upper + high, bottom) - joint, colour
            )
