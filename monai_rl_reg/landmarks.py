"""Landmarks: read from a CSV file, carried from one image to the other, written as a file of the same kind."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.finishing import Correspondence
from monai_rl_reg.geometry import carry, ras_to_lps, reduced, transform_points

SPACES = ("LPS", "RAS")
IMAGES = ("fixed", "moving")


@dataclass(frozen=True)
class Landmarks:
    """Points in world coordinates.

    Attributes:
        points: (d, N), RAS millimetres, double precision.
        names: N of them, empty where a point has none.
        images: in which image's space each point lies, ``fixed`` or ``moving``.
        spaces: in which coordinates each point's row is written, ``LPS`` or ``RAS``.
        name: of the file, for messages.
    """

    points: Tensor
    names: tuple[str, ...]
    images: tuple[str, ...]
    spaces: tuple[str, ...]
    name: str = "landmarks"

    def check(self, fixed: MetaTensor, moving: MetaTensor) -> None:
        """Refuse points of another dimension or more than half a voxel outside their image.

        Raises:
            InputError: naming the file and the first such point.
        """
        d = fixed.ndim - 1
        if len(self.points) != d:
            raise InputError(f"landmarks {self.name}: expected {d} coordinates a point, found {len(self.points)}")
        for role, image in zip(IMAGES, (fixed, moving), strict=True):
            chosen = [i for i, of in enumerate(self.images) if of == role]
            index = transform_points(torch.linalg.inv(reduced(image.affine.double(), d)), self.points[:, chosen])
            size = torch.tensor(image.shape[1:], dtype=torch.float64)[:, None]
            outside = ((index < -0.5) | (index > size - 0.5)).any(0)
            if outside.any():
                i = chosen[int(outside.nonzero()[0])]
                at = ", ".join(f"{x:g}" for x in self._written(i))
                raise InputError(
                    f"landmarks {self.name}: expected points inside the {role} image, found {int(outside.sum())} "
                    f"outside, the first {self.names[i] or f'in row {i + 1}'} at {self.spaces[i]} {at}"
                )

    def carried(self, mapping: Correspondence) -> Landmarks:
        """Return where each point lies in the other image."""
        moved = self.points.clone()
        for role, way in zip(IMAGES, (mapping.forth, mapping.back), strict=True):
            chosen = [i for i, of in enumerate(self.images) if of == role]
            if chosen:
                moved[:, chosen] = way(self.points[:, chosen])
        other = tuple(IMAGES[1 - IMAGES.index(of)] for of in self.images)
        return replace(self, points=moved, images=other)

    def errors(self, mapping: Correspondence) -> dict[str, float]:
        """Return how far the landmarks that both images have lie apart: the target registration error.

        A landmark is in both where one point of the fixed image and one of the moving image have its name. The error is
        the distance in millimetres from where the fixed point is carried to the moving one.

        Returns:
            ``tre_before_mm``, by the initial transform alone, and ``tre_after_mm``, means over the ``tre_landmarks``;
            nothing where there is no such landmark.
        """
        pairs = self._pairs()
        if not pairs:
            return {}
        fixed, moving = (self.points[:, list(chosen)] for chosen in zip(*pairs, strict=True))
        before, after = (
            float((there - moving).norm(dim=0).mean())
            for there in (carry(mapping.initial, fixed), mapping.forth(fixed))
        )
        return {"tre_landmarks": len(pairs), "tre_before_mm": before, "tre_after_mm": after}

    def _pairs(self) -> list[tuple[int, int]]:
        """Which points of the fixed and the moving image have one name, that no other point of theirs has."""
        found: dict[str, tuple[list[int], list[int]]] = {}
        for i, (name, image) in enumerate(zip(self.names, self.images, strict=True)):
            if name:
                found.setdefault(name, ([], []))[IMAGES.index(image)].append(i)
        return [(a[0], b[0]) for a, b in found.values() if len(a) == len(b) == 1]

    def save(self, path: str | Path) -> None:
        """Write a CSV file that :func:`read_landmarks` reads, in the coordinates that each point was given in."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*"xyz"[: len(self.points)], "name", "image", "space"])
            for i, (name, image, space) in enumerate(zip(self.names, self.images, self.spaces, strict=True)):
                writer.writerow([*(f"{x:.6f}" for x in self._written(i)), name, image, space])

    def _written(self, i: int) -> list[float]:
        point = self.points[:, i]
        return (ras_to_lps(point) if self.spaces[i] == "LPS" else point).tolist()


def read_landmarks(path: str | Path) -> Landmarks:
    """Read a CSV file with the columns ``x,y`` and, in 3D, ``z``, in millimetres of world coordinates.

    Further columns: ``name``; ``space``, ``LPS`` (the default, as in ITK) or ``RAS``; ``image``, ``fixed`` (the
    default) or ``moving``. A comment such as ``# space: RAS`` above the column names sets the space of all rows.

    Raises:
        InputError: if the file is missing, lacks a column or rows, or has something else in one.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"landmarks {path}: expected a CSV file, found none")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"landmarks {path}: expected a CSV file of text, found: {error}") from error
    default = "LPS"
    numbered = []
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("#"):
            stated = re.search(r"(?:space|coordinate\s*system)\s*[:=]\s*(\w+)", line, re.IGNORECASE)
            default = _one_of(stated[1].upper(), SPACES, path, number) if stated else default
        elif line.strip():
            numbered.append((number, line))
    columns = [name.strip().lower() for name in next(csv.reader([numbered[0][1]]), [])] if numbered else []
    if "x" not in columns or "y" not in columns:
        raise InputError(f"landmarks {path}: expected the columns x,y[,z], found {', '.join(columns) or 'none'}")
    if len(numbered) < 2:
        raise InputError(f"landmarks {path}: expected at least one row below the column names, found none")
    axes = [axis for axis in "xyz" if axis in columns]
    points, names, images, spaces = [], [], [], []
    for number, line in numbered[1:]:
        row = dict(zip(columns, (cell.strip() for cell in next(csv.reader([line]))), strict=False))
        try:
            point = torch.tensor([float(row[axis]) for axis in axes], dtype=torch.float64)
        except (KeyError, ValueError) as error:
            raise InputError(f"landmarks {path}, line {number}: expected numbers, found {line!r}") from error
        if not torch.isfinite(point).all():
            raise InputError(f"landmarks {path}, line {number}: expected finite numbers, found {line!r}")
        space = _one_of((row.get("space") or default).upper(), SPACES, path, number)
        points.append(ras_to_lps(point) if space == "LPS" else point)
        names.append(row.get("name", ""))
        images.append(_one_of((row.get("image") or "fixed").lower(), IMAGES, path, number))
        spaces.append(space)
    return Landmarks(torch.stack(points, dim=1), tuple(names), tuple(images), tuple(spaces), str(path))


def _one_of(value: str, known: tuple[str, str], path: Path, line: int) -> str:
    if value not in known:
        raise InputError(f"landmarks {path}, line {line}: expected {' or '.join(known)}, found {value}")
    return value
