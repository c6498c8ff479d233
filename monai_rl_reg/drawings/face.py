"""A drawn face."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator

from monai_rl_reg.drawings.sheet import Array, Sheet, between, curve, grid, hsv

SKINS = np.array([(255, 226, 205), (243, 199, 163), (224, 172, 125), (190, 130, 88), (140, 88, 58), (92, 58, 42)]) / 255
HAIRS = np.array([(28, 22, 20), (66, 40, 24), (120, 76, 40), (214, 172, 96), (150, 60, 28), (190, 188, 186)]) / 255


def face(random: Generator, size: int) -> Array:
    """One face, (size, size, 3): everything lies on the axis x = 0.5 or twice, left and right of it."""
    u = random.uniform
    tone = u(0, len(SKINS) - 1)
    skin = np.array([np.interp(tone, range(len(SKINS)), SKINS[:, c]) for c in range(3)])
    hair = np.clip(HAIRS[random.integers(len(HAIRS))] * u(0.8, 1.2) + u(-0.03, 0.03, 3), 0, 1)
    clothes = hsv(u(), u(0.2, 0.9), u(0.3, 0.9))
    across, down, middle = u(0.225, 0.265), u(0.31, 0.35), u(0.5, 0.53)
    x, y = grid(size)

    slope = u(0, 2 * math.pi)
    share = 0.5 + (x - 0.5) * math.cos(slope) + (y - 0.5) * math.sin(slope)
    sheet = Sheet(size, between(hsv(u(), u(0.1, 0.7), u(0.3, 1)), hsv(u(), u(0.1, 0.7), u(0.3, 1)), share))
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
        rim = curve(np.array([-0.98, 0, 0.98]) * across * 0.9 + 0.5, middle + np.array([0.08, 0.17, 0.08]))
        chin = np.stack([0.5 + across * 0.9 * np.cos(np.linspace(0, math.pi, 24))] * 2, axis=1)
        chin[:, 1] = middle + 0.08 + (down - 0.075) * np.sin(np.linspace(0, math.pi, 24))
        sheet.polygon(np.concatenate([rim, chin]), 0.3 * skin + 0.7 * hair)
    blush, strength = np.array([0.9, 0.35, 0.3]), u(0.03, 0.2)
    for side in (-1, 1):
        sheet.ellipse(0.5 + side * 0.14, middle + 0.1, 0.05, 0.04, (1 - strength) * skin + strength * blush)

    apart, level, wide, high = u(0.1, 0.12), middle - u(0.03, 0.05), u(0.042, 0.055), u(0.02, 0.034)
    iris, gaze = hsv(random.choice([0.07, 0.07, 0.3, 0.57]), u(0.4, 0.8), u(0.25, 0.65)), u(-0.012, 0.012)
    brow, arch = hair * 0.7 if not bald else skin * 0.45, u(0, 0.025)
    for side in (-1, 1):
        eye = 0.5 + side * apart
        sheet.ellipse(eye, level - 0.006, wide * 1.12, high * 1.25, skin * 0.62)
        sheet.ellipse(eye, level, wide, high, np.array([0.97, 0.97, 0.96]))
        sheet.ellipse(eye + gaze, level, high * 0.85, high * 0.9, iris)
        sheet.ellipse(eye + gaze, level, high * 0.42, high * 0.45, np.zeros(3))
        sheet.ellipse(eye + gaze - 0.008, level - 0.008, 0.006, 0.006, np.ones(3))
        raised = level - high - 0.03 - np.array([0, arch, -0.008])
        sheet.line(curve(eye + side * np.array([-1, 0.2, 1.2]) * wide, raised), 0.016, brow)
    tip, broad = middle + u(0.08, 0.1), u(0.025, 0.04)
    for side in (-1, 1):
        sheet.line(
            curve(0.5 + side * np.array([0.35, 0.55, 1]) * broad, tip - np.array([0.11, 0.05, 0.01])),
            0.008,
            skin * 0.86,
        )
        sheet.ellipse(0.5 + side * broad * 0.6, tip + 0.005, broad * 0.5, 0.014, skin * 0.78)
    sheet.ellipse(0.5, tip - 0.005, broad * 0.75, 0.02, np.minimum(skin * 1.06, 1))

    lips = 0.55 * skin + 0.45 * hsv(0.98, u(0.5, 0.9), u(0.5, 0.8))
    mouth, half, smile = middle + u(0.175, 0.195), u(0.06, 0.1), u(-0.012, 0.035)
    corners = 0.5 + np.array([-1, 0, 1]) * half
    upper = curve(corners, mouth + np.array([-smile, smile * 0.4, -smile]))
    lower = curve(corners, mouth + np.array([-smile, smile + u(0.01, 0.045), -smile]))
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
            sheet.line(curve(points[:, 0], points[:, 1]), 0.005, np.clip(hair * u(0.7, 1.4), 0, 1))
    if u() < 0.2:
        frame = hsv(u(), u(0, 0.8), u(0.05, 0.4))
        for side in (-1, 1):
            turn = np.linspace(0, 2 * math.pi, 40)
            ring = np.stack([0.5 + side * apart + 0.075 * np.cos(turn), level + 0.055 * np.sin(turn)], axis=1)
            sheet.line(ring, 0.011, frame)
        sheet.line(curve(np.array([-1, 0, 1]) * (apart - 0.075) + 0.5, level - np.array([0, 0.01, 0])), 0.011, frame)

    picture = sheet.pixels()
    aside, tilt = u(-1, 1), u(0.1, 0.6)  # light from one side and above, strongest on the head
    right, below = (x - 0.5) / (across * 1.6), (y - middle) / (down * 1.6)
    near = np.exp(-(right**2) - below**2)
    shade = 0.75 + near * (0.28 + 0.4 * aside * right - 0.5 * tilt * below)
    tint = 1 + u(-0.06, 0.06, 3)
    return np.clip(picture * shade[..., None] * tint + random.normal(0, 0.008, picture.shape), 0, 1)
