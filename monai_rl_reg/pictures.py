"""Two-dimensional pictures: read and write them, split a folder of them, and show several as one."""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.errors import InputError
from monai_rl_reg.files import replacing

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".ppm", ".pgm")
GAP = 2
"""Pixels of white between the pictures of a strip."""
CAPTION = 18
"""Pixels of height of a strip's captions, at least; those of large pictures are a sixteenth of their height."""


ORIENTATION = 0x0112
"""EXIF's tag; from 5 on the picture lies on its side."""


def import_extra(module: str) -> Any:
    """Import a module that only the picture tasks need.

    Raises:
        InputError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f'module {module}: expected it to be installed (pip install -e ".[images]"), found: {error}'
        ) from error


def read_picture(path: str | Path, *, what: str = "picture") -> Tensor:
    """Read a picture of any format that PIL reads, as colours from 0 to 1: (3, H, W) in fp32.

    Grey and palette pictures become colours, transparent pixels are laid on white, of an animation the first picture
    is taken, and the camera's orientation (EXIF) is applied.

    Args:
        path: the file.
        what: how messages call it.

    Raises:
        InputError: if the file is missing, unreadable, or has values outside its range.
    """
    path = Path(path)
    image_module, operations = import_extra("PIL.Image"), import_extra("PIL.ImageOps")
    if not path.is_file():
        raise InputError(f"{what} {path}: expected a file, found {'a folder' if path.is_dir() else 'none'}")
    try:
        with image_module.open(path) as file:
            picture = operations.exif_transpose(file)
        if picture.mode[0] in "IF":  # grey in 16 or 32 bits: PIL's own conversion would clip it to 8
            grey = np.array(picture, dtype=np.float32) / (1 if picture.mode == "F" else 65535)
            pixels = np.stack([grey] * 3)
        else:
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = image_module.alpha_composite(image_module.new("RGBA", picture.size, "white"), picture)
            pixels = np.moveaxis(np.array(picture.convert("RGB"), dtype=np.float32) / 255, -1, 0)
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise InputError(
            f"{what} {path}: expected a picture that can be read, found {path.stat().st_size:,} bytes that cannot "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # floating point or 32 bits; also not a number
        most = 1 if picture.mode == "F" else 65535
        raise InputError(
            f"{what} {path}: expected values from 0 to {most} in a picture of mode {picture.mode}, "
            f"found {most * pixels.min():g} to {most * pixels.max():g}"
        )
    return torch.from_numpy(np.ascontiguousarray(pixels))


class LoadPictured(MapTransform):
    """Read pictures with every check of :func:`read_picture`: (3, H, W) in fp32 from 0 to 1 in place of each path.

    Adds ``<key>_file``, the path, for messages and for naming outputs.

    Args:
        keys: of the paths.
        allow_missing_keys: leave out keys that the dictionary lacks instead of raising KeyError.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dictionary with tensors."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[f"{key}_file"] = str(data[key])
            result[key] = read_picture(data[key], what=str(key))
        return result


class SplitSideBySided(Transform):
    """Split one picture that shows a photograph and its label map side by side: the layout of the CMP facades.

    MONAI's pair comes out: ``image``, the label map that the network gets, and ``label``, the photograph
    that it should give; (C, H, W / 2) each.

    Args:
        label_side: ``right`` or ``left``: the half that is the label map.

    Raises:
        InputError: if ``label_side`` is another word, or (when called) the width is not even.
    """

    def __init__(self, label_side: str = "right") -> None:
        if label_side not in ("left", "right"):
            raise InputError(f"label_side: expected left or right, found {label_side!r}")
        self.label_side = label_side

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dictionary with the two halves."""
        result = dict(data)
        whole = result.pop(Keys.IMAGE)
        if whole.shape[-1] % 2:
            raise InputError(
                f"picture {data.get('image_file', '')}: expected a photograph and a label map side by side, "
                f"thus an even width, found {whole.shape[-1]} pixels"
            )
        left, right = whole.chunk(2, dim=-1)
        photo, label = (left, right) if self.label_side == "right" else (right, left)
        return result | {Keys.LABEL: photo.contiguous(), Keys.IMAGE: label.contiguous()}


def picture_size(path: str | Path) -> tuple[int, int]:
    """Return a picture's height and width as :func:`read_picture` reads it, by its header alone.

    Raises:
        InputError: if the file is no picture.
    """
    try:
        with import_extra("PIL.Image").open(path) as file:
            width, height = file.size
            lying = file.getexif().get(ORIENTATION, 1) >= 5
    except OSError as error:
        raise InputError(f"picture {path}: expected one that can be read, found: {error}") from error
    return (width, height) if lying else (height, width)


def list_pictures(folder: str | Path) -> list[Path]:
    """List the pictures of a folder (not of its subfolders) in natural order: ``2.jpg`` comes before ``10.jpg``.

    Raises:
        InputError: if the folder is missing or has no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"dataset {folder}: expected a folder of pictures, found {'a file' if folder.exists() else 'none'}"
        )
    paths = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file()]
    if not paths:
        raise InputError(f"dataset {folder}: expected pictures ({', '.join(SUFFIXES)}) in this folder, found none")
    return sorted(paths, key=lambda path: (_natural(path.name), path.name))


def split_pictures(
    dataset_dir: str | Path | None,
    *,
    default: Callable[[], Path],
    hold_back: float,
    limit: int | None = None,
) -> dict[str, list[dict[str, str]]]:
    """Return the pictures of ``training`` and ``validation``, each a list of ``image``, a path, and ``name``.

    Names are file names without suffix, or with it where two files would share one.

    Args:
        dataset_dir: folder of pictures; None takes the folder that ``default`` returns, and prints that.
        default: makes a folder of pictures for people without data.
        hold_back: how many of the last pictures are for validation; below 1, which share of all, at least one.
        limit: most pictures to train on, the first ones; validation does not change with it.

    Raises:
        InputError: if the folder is missing or empty, ``hold_back`` is not above 0, or nothing is left to train on.
    """
    if dataset_dir is None:
        dataset_dir = default()
        print(f"No data given: using the {len(list_pictures(dataset_dir))} pictures in {dataset_dir}")
    paths = list_pictures(dataset_dir)
    if not hold_back > 0:  # what is kept of a training is what validation finds best
        raise InputError(f"hold_back: expected a share or a number of pictures above 0, found {hold_back}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1 picture to train on, found {limit}")
    held_out = int(hold_back) if hold_back >= 1 else math.ceil(hold_back * len(paths) - 1e-9)  # 0.07 * 100 > 7
    if held_out >= len(paths):
        raise InputError(
            f"dataset {dataset_dir}: expected more pictures than the {held_out} to hold back for validation, "
            f"found {len(paths)}"
        )
    shared = Counter(name for path in paths for name in (path.stem, path.name))
    rows = [{"image": str(p), "name": p.stem if shared[p.stem] == 1 else p.name} for p in paths]
    first = len(rows) - held_out
    return {"training": rows[:first][:limit], "validation": rows[first:]}


def write_picture(path: str | Path, picture: Tensor) -> None:
    """Write a picture, in the format that the suffix says; complete or not at all.

    Args:
        path: the file.
        picture: (3, H, W) or (1, H, W), from 0 to 1; what is outside is clipped.

    Raises:
        InputError: if the suffix is not a picture's, or the file cannot be written.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"output {path}: expected one of the suffixes {', '.join(SUFFIXES)}, found none of them")
    pixels = to_bytes(picture)
    image = import_extra("PIL.Image").fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    with replacing(path) as temporary:
        try:
            image.save(temporary, quality=95)
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"output {path}: expected a size that the format can hold, found {image.width} x {image.height} "
                f"pixels ({error})"
            ) from error


def strip(pictures: Sequence[Tensor], captions: Sequence[str] | None = None) -> Tensor:
    """Lay pictures out in a row, with thin white gaps and, where there are any, captions above.

    Args:
        pictures: (3, H, W) or (1, H, W) each, of one height.
        captions: a line for each picture.

    Returns:
        one picture (3, H', W').
    """
    cells = [picture.detach().cpu().float().expand(3, -1, -1) for picture in pictures]
    if captions is not None:
        cells = [
            torch.cat([_caption(text, cell.shape[-1], max(CAPTION, cell.shape[1] // 16)), cell], dim=1)
            for text, cell in zip(captions, cells, strict=True)
        ]
    gap = torch.ones(3, cells[0].shape[1], GAP)
    return torch.cat([part for cell in cells for part in (gap, cell)][1:], dim=2)


def grid(rows: Sequence[Sequence[Tensor]], *, across: int = 4) -> Tensor:
    """Lay rows of pictures out as one picture (3, H', W'): each row a :func:`strip`, ``across`` of them side by side.

    Args:
        rows: (3, H, W) or (1, H, W) each, all of one size, and as many in every row.
        across: rows in one line.
    """
    strips = [F.pad(strip(row), (0, 3 * GAP, 0, GAP), value=1.0) for row in rows]
    strips += [torch.ones_like(strips[0])] * (-len(strips) % min(across, len(strips)))
    lines = [torch.cat(strips[i : i + across], dim=2) for i in range(0, len(strips), across)]
    return torch.cat(lines, dim=1)


def to_bytes(picture: Tensor) -> np.ndarray:
    """Return a picture (C, H, W) from 0 to 1 as (H, W, C) uint8, rounded and clipped."""
    return picture.detach().float().mul(255).round().clamp(0, 255).byte().movedim(0, -1).contiguous().cpu().numpy()


def _caption(text: str, width: int, height: int) -> Tensor:
    """Draw a line of black text on white, (3, height, width); what is too long is cut off."""
    image = import_extra("PIL.Image").new("L", (width, height), "white")
    font = import_extra("PIL.ImageFont").load_default(0.6 * height)
    import_extra("PIL.ImageDraw").Draw(image).text((2, 0.1 * height), text, fill="black", font=font)
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).expand(3, -1, -1)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which numbers count as numbers."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name.lower())]
