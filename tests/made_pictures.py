"""Pictures, folders and sentences for the tests of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_rl_reg.errors import InputError

Image = pytest.importorskip("PIL.Image")


def colours(height: int = 6, width: int = 8) -> Tensor:
    """A picture whose values are whole steps of 8 bits, so that lossless formats keep it exactly."""
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(1)) / 255


def smooth(height: int = 24, width: int = 32) -> Tensor:
    """A picture that lossy formats keep nearly."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y, 0.5 * (1 - x)])


def saved(path: Path, pixels: np.ndarray | Any, mode: str | None = None, **settings: object) -> Path:
    """Write an array, or a picture of PIL, in a mode of PIL."""
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    (image.convert(mode) if mode else image).save(path, **settings)
    return path


def touch(folder: Path, *names: str) -> Path:
    """Make a folder of files that are pictures by their names."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def names(rows: list[dict[str, str]]) -> list[str]:
    return [row["name"] for row in rows]


def no_default() -> Path:
    raise AssertionError("data were given")


def sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    """The message, which has to be one line and to say what was expected and found."""
    message = str(error.value)
    assert "\n" not in message
    assert ": expected " in message
    assert "found" in message.split(": expected ")[1]
    return message
