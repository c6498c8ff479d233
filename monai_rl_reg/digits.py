"""Pictures of digits, pairs of different classes among them, and the morphing of one into the other as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from monai_rl_reg.errors import InputError
from monai_rl_reg.files import replacing
from monai_rl_reg.inferer import StepwiseInferer
from monai_rl_reg.pictures import import_extra, list_pictures, read_picture, strip, write_picture
from monai_rl_reg.warping import Warp

SIZE = 28
"""Height and width of every picture here: those of MNIST."""
INK_LEVELS = (0.0, 0.5)
"""Ink is what is brighter than a level: the whole stroke, and its core without the soft edge."""
ENLARGE = 4
"""Width in the strip of steps of what is one pixel in the digits."""


@dataclass(frozen=True)
class Digits:
    """Pictures with their classes.

    Attributes:
        images: (N, 28, 28) uint8, bright ink on a dark ground.
        classes: (N,) long.
        names: what each is called in tables.
        source: where they come from, for messages.
    """

    images: Tensor
    classes: Tensor
    names: Sequence[str]
    source: str

    def part(self, rows: slice) -> Digits:
        """Return a part of them."""
        return Digits(self.images[rows], self.classes[rows], self.names[rows], self.source)


def read_digits(source: str | Path | None = None) -> Digits:
    """Read the digits of an MNIST-style ``.npz`` file or of a folder; without a source, those inside scikit-learn.

    Args:
        source: a ``.npz`` file with ``images`` (N, 28, 28) uint8 and ``labels`` (N,), or a folder with one folder of
            pictures per class.

    Raises:
        InputError: if there is no such file or folder, or its content is not as above.
    """
    if not source:
        return _scikit_learn_digits()
    path = Path(source)
    return _read_folder(path) if path.is_dir() else _read_npz(path)


def split_digits(dataset_dir: str | Path | None = None) -> dict[str, Digits]:
    """Return ``training`` and ``validation``: five sixths of the digits and the rest, 50 and 10 thousand of MNIST's.

    Args:
        dataset_dir: as in :func:`read_digits`.

    Raises:
        InputError: besides :func:`read_digits`'s, if a part has digits of one class only.
    """
    digits = read_digits(dataset_dir)
    count = len(digits.images) - max(2, len(digits.images) // 6)
    parts = {"training": digits.part(slice(None, count)), "validation": digits.part(slice(count, None))}
    for name, part in parts.items():
        found = len(part.classes.unique())
        if found < 2:
            raise InputError(
                f"digits {digits.source}: expected at least two classes for {name}, found {found} among "
                f"{len(part.images)} of {len(digits.images)} pictures"
            )
    return parts


class DigitPairs(Dataset[dict[str, Any]]):
    """Pairs of digits of different classes: ``image`` (2, 28, 28) in [0, 1], fixed and moving, ``label`` and ``name``.

    ``label`` counts the levels of :data:`INK_LEVELS` that a pixel exceeds: nested labels, 1 the soft edge of a stroke
    and 2 its core.

    Args:
        digits: what to pair.
        count: number of pairs, always the same ones. None pairs each digit with one that is drawn anew every time.
        seed: of the choice of these ``count`` pairs.
    """

    def __init__(self, digits: Digits, count: int | None = None, *, seed: int = 0) -> None:
        self.digits = digits
        self.pairs: list[tuple[int, int]] | None = None
        if count is not None:
            random = torch.Generator().manual_seed(seed)
            chosen = torch.randint(len(digits.images), (count,), generator=random).tolist()
            self.pairs = [(i, self._partner(i, random)) for i in chosen]

    def __len__(self) -> int:
        return len(self.digits.images) if self.pairs is None else len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i, j = (index, self._partner(index)) if self.pairs is None else self.pairs[index]
        image = torch.stack([scale(self.digits.images[k]) for k in (i, j)])
        names = [f"{self.digits.names[k]} ({int(self.digits.classes[k])})" for k in (j, i)]
        return {"image": image, "label": ink_masks(image[None]).sum(0), "name": " to ".join(names)}

    def _partner(self, index: int, random: torch.Generator | None = None) -> int:
        while True:
            other = int(torch.randint(len(self.digits.images), (), generator=random))
            if self.digits.classes[other] != self.digits.classes[index]:
                return other


def one_pair(fixed: str | Path | None = None, moving: str | Path | None = None) -> list[dict[str, Any]]:
    """Return the pair to morph as the only item of a data set; without files, two digits of scikit-learn's.

    Raises:
        InputError: if only one file is given, or one is not a picture with ink on a ground.
    """
    if not fixed and not moving:
        digits = read_digits()
        print("No pair given: morphing a 3 of scikit-learn's digits into a 0")
        classes = digits.classes.tolist()
        pair = [scale(digits.images[classes.index(digit)]) for digit in (0, 3)]
    elif fixed and moving:
        pair = [scale(read_digit(path)) for path in (fixed, moving)]
    else:
        raise InputError(f"morphing: expected a fixed and a moving picture, found fixed={fixed}, moving={moving}")
    return [{"image": torch.stack(pair)}]


def read_digit(path: str | Path) -> Tensor:
    """Read a picture of a digit as (28, 28) uint8, bright ink on a dark ground.

    A picture with a bright edge is taken for ink on paper and inverted, and what is no brighter than the edge and its
    noise becomes 0; one of another size is padded to a square and
    resampled.

    Raises:
        InputError: besides :func:`~monai_rl_reg.pictures.read_picture`'s, if it has the same value everywhere.
    """
    picture = read_picture(path).mean(0)
    if picture.min() == picture.max():
        raise InputError(f"picture {path}: expected ink on a ground, found the value {picture.min():g} everywhere")
    edge = torch.cat([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    if edge.median() > (picture.min() + picture.max()) / 2:
        picture, edge = 1 - picture, 1 - edge
    ground = edge.median() + 5 * (edge - edge.median()).abs().mean()  # no paper is exactly white, and all ink is > 0
    if 0 < ground < picture.max():
        picture = ((picture - ground) / (picture.max() - ground)).clamp(min=0)
    if picture.shape != (SIZE, SIZE):
        rows, columns = (max(picture.shape) - n for n in picture.shape)
        pads = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
        square = F.pad(picture, pads, value=float(picture.min()))[None, None]
        picture = F.interpolate(square, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0, 0]
    return (255 * picture).round().to(torch.uint8)


def scale(image: Tensor) -> Tensor:
    """Return a picture (28, 28) uint8 as fp32 with its brightest pixel at 1."""
    return image.float() / max(int(image.max()), 1)


def ink_masks(image: Tensor) -> Tensor:
    """Return the ink of an image (1, *spatial) at each of :data:`INK_LEVELS` as channels (2, *spatial), 0 and 1."""
    return torch.cat([(image > level).float() for level in INK_LEVELS])


class MorphWriter:
    """Write ``moved.png``, ``displacement.npy`` and ``steps.png`` of a morphed pair.

    The displacement is (2, 28, 28) in pixels, rows before columns: ``moved(x) = moving(x + u(x))``. The strip shows
    the moving digit, the moved one after some of the steps, and the fixed digit.

    Args:
        output_dir: where the files go.
        inferer: the evaluator's, with ``keep_history``.
        shown: the steps in the strip, beside the last one.
    """

    def __init__(
        self, output_dir: str, inferer: StepwiseInferer, *, shown: Sequence[int] = (0, 1, 2, 3, 5, 8, 12)
    ) -> None:
        self.output_dir = Path(output_dir)
        self.inferer = inferer
        self.shown = shown
        self.warp = Warp("bilinear", "border")

    def attach(self, engine: Engine) -> None:
        """Follow this evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        outputs: Any = engine.state.output
        fixed, moving = convert_to_tensor(outputs[0]["image"], track_meta=False)[:, None]
        history = self.inferer.history
        steps = [i for i in self.shown if i < len(history) - 1] + [len(history) - 1]
        moved = [self.warp(moving[None], history[i][:1].to(moving))[0] for i in steps]
        captions = [*(f"{i} step{'s' if i != 1 else ''}" for i in steps), "fixed"]
        large = [x.repeat_interleave(ENLARGE, 1).repeat_interleave(ENLARGE, 2) for x in [*moved, fixed]]
        write_picture(self.output_dir / "moved.png", moved[-1])
        write_picture(self.output_dir / "steps.png", strip(large, captions))
        with replacing(self.output_dir / "displacement.npy") as temporary:
            np.save(temporary, history[-1][0].cpu().numpy())
        print(f"Wrote moved.png, displacement.npy and steps.png to {self.output_dir.resolve()}")


def _read_npz(path: Path) -> Digits:
    if not path.is_file():
        raise InputError(f"digits {path}: expected a .npz file or a folder, found none")
    try:
        with np.load(path) as file:
            found = {key: file[key] for key in file.files}
    except Exception as error:  # numpy and zipfile raise many kinds
        raise InputError(f"digits {path}: expected a .npz file of numpy, found a file that is not one") from error
    if not {"images", "labels"} <= found.keys():
        raise InputError(f"digits {path}: expected arrays images and labels, found {', '.join(found) or 'none'}")
    images, labels = found["images"], found["labels"]
    if images.shape[1:] != (SIZE, SIZE) or images.dtype != np.uint8:
        raise InputError(
            f"digits {path}: expected images (N, {SIZE}, {SIZE}) uint8, found {images.shape} {images.dtype}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(
            f"digits {path}: expected {len(images)} whole numbers as labels, found {labels.shape} {labels.dtype}"
        )
    classes = torch.from_numpy(labels.astype(np.int64))
    return Digits(torch.from_numpy(images), classes, _numbered(len(images)), str(path))


def _read_folder(path: Path) -> Digits:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    if len(folders) < 2:
        raise InputError(f"digits {path}: expected a folder of pictures for each class, found {len(folders)} folders")
    found = [(i, number, file) for number, folder in enumerate(folders) for i, file in enumerate(list_pictures(folder))]
    found.sort()  # one of each class in turn, so that the last sixth has all classes too
    return Digits(
        torch.stack([read_digit(file) for _, _, file in found]),
        torch.tensor([number for _, number, _ in found]),
        [f"{file.parent.name}/{file.name}" for _, _, file in found],
        str(path),
    )


def _scikit_learn_digits() -> Digits:
    data = import_extra("sklearn.datasets").load_digits()
    small = F.pad(torch.from_numpy(data.images).float() / 16, [1] * 4)  # 8 x 8, filled to the edge
    large = F.interpolate(small[:, None], size=(SIZE, SIZE), mode="bicubic", align_corners=False)[:, 0]
    # Interpolating blurs: without steeper edges half of every picture would count as ink.
    images = (255 * ((large - 0.25) / 0.6).clamp(0, 1)).to(torch.uint8)
    return Digits(images, torch.from_numpy(data.target).long(), _numbered(len(images)), "of scikit-learn")


def _numbered(count: int) -> list[str]:
    return [f"{i:05d}" for i in range(count)]
