"""Every kind of picture that PIL opens becomes colours from 0 to 1, and a bad one one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_pictures import Image, colours, saved, sentence, smooth
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.pictures import (
    SUFFIXES,
    read_picture,
    to_bytes,
    write_picture,
)


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".pgm"])
def test_colours_come_back_from_every_format(suffix: str, tmp_path: Path) -> None:
    lossy = suffix in (".jpg", ".jpeg", ".webp", ".gif")
    picture = smooth() if lossy else colours()
    write_picture(tmp_path / f"picture{suffix}", picture)
    read = read_picture(tmp_path / f"picture{suffix}")
    assert (read.shape, read.dtype, read.is_contiguous()) == (picture.shape, torch.float32, True)
    torch.testing.assert_close(read, picture, rtol=0, atol=0.15 if lossy else 1e-6)
    assert (read - picture).abs().mean() < (0.02 if lossy else 1e-6)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".gif", ".pgm"])
def test_grey_comes_back_as_three_equal_channels(suffix: str, tmp_path: Path) -> None:
    grey = colours()[:1]
    write_picture(tmp_path / f"grey{suffix}", grey)
    assert torch.allclose(read_picture(tmp_path / f"grey{suffix}"), grey.expand(3, -1, -1))


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    write_picture(tmp_path / "picture.png", colours())
    path = (tmp_path / "picture.png").rename(tmp_path / "picture.jpg")
    assert torch.allclose(read_picture(path), colours())


def test_black_and_white_in_one_bit(tmp_path: Path) -> None:
    pixels = np.array([[0, 255, 255], [255, 0, 0]], dtype=np.uint8)
    read = read_picture(saved(tmp_path / "one.png", pixels, "1"))
    assert torch.equal(read, torch.tensor(pixels / 255, dtype=torch.float32).expand(3, -1, -1))


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    assert image.mode == "P"
    expected = torch.tensor([[[255, 0], [10, 0]], [[0, 255], [20, 255]], [[0, 0], [30, 0]]]) / 255
    for name in ("palette.png", "palette.gif"):
        assert torch.allclose(read_picture(saved(tmp_path / name, image)), expected)


def test_ink_becomes_colour(tmp_path: Path) -> None:
    ink = Image.fromarray(to_bytes(colours())).convert("CMYK")
    assert torch.allclose(read_picture(saved(tmp_path / "ink.tif", ink)), colours(), atol=1.5 / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_what_is_transparent_is_laid_on_white(mode: str, suffix: str, tmp_path: Path) -> None:
    if (mode, suffix) == ("LA", ".webp"):
        mode = "RGBA"  # all that this format has
    picture, alpha = colours(), torch.linspace(0, 1, 48).view(1, 6, 8)
    if mode == "LA":
        picture = picture[:1]
    path = saved(
        tmp_path / f"alpha{suffix}",
        Image.fromarray(to_bytes(torch.cat([picture, alpha])), mode),
        **({"lossless": True, "exact": True} if suffix == ".webp" else {}),
    )
    expected = (alpha * picture + (1 - alpha)).expand(3, -1, -1)
    assert torch.allclose(read_picture(path), expected, atol=1.5 / 255)


@pytest.mark.parametrize(
    ("mode", "transparent"), [("RGB", (10, 20, 30)), ("L", 10), ("P", 0)], ids=["colour", "grey", "palette"]
)
def test_a_transparent_colour_is_white(mode: str, transparent: Any, tmp_path: Path) -> None:
    image = Image.new(mode, (2, 1), (10, 20, 30) if mode == "RGB" else 10)
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), {"RGB": (40, 50, 60), "L": 40, "P": 1}[mode])
    read = read_picture(saved(tmp_path / "key.png", image, transparency=transparent))
    assert read[:, 0, 0].tolist() == [1, 1, 1]
    assert read[:, 0, 1].tolist() == pytest.approx([40 / 255] * 3 if mode == "L" else [40 / 255, 50 / 255, 60 / 255])


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [
        ("grey.png", np.uint16, 65535),
        ("grey.tif", np.uint16, 65535),
        ("grey32.tif", np.int32, 65535),
        ("grey.tiff", np.float32, 1),
    ],
)
def test_deep_greys_keep_their_steps(name: str, kind: type, most: int, tmp_path: Path) -> None:
    values = np.array([[0, 0.25, 0.5], [0.5 + 3 / 65535, 0.75, 1]]) * most
    values = values.astype(kind)
    read = read_picture(saved(tmp_path / name, values))
    expected = torch.from_numpy(values.astype(np.float32) / most).expand(3, -1, -1)
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-7)
    assert read[0, 1, 0] != read[0, 0, 2], "not clipped to 8 bits"


ORIENTATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    1: lambda p: p,
    2: lambda p: p.flip(2),
    3: lambda p: p.rot90(2, (1, 2)),
    4: lambda p: p.flip(1),
    5: lambda p: p.mT,
    6: lambda p: p.rot90(-1, (1, 2)),  # the camera was turned to the left: to the right again
    7: lambda p: p.mT.rot90(2, (1, 2)),
    8: lambda p: p.rot90(1, (1, 2)),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_orientation_of_the_camera_is_applied(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(to_bytes(colours()))
    expected = ORIENTATIONS[orientation](colours())
    assert torch.allclose(read_picture(saved(tmp_path / "turned.png", image, exif=exif)), expected)
    turned = read_picture(saved(tmp_path / "turned.jpg", Image.fromarray(to_bytes(smooth())), exif=exif, quality=95))
    assert (turned - ORIENTATIONS[orientation](smooth())).abs().mean() < 0.02


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_the_first_picture_of_several_is_taken(suffix: str, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue")]
    settings = {"lossless": True} if suffix == ".webp" else {}
    path = saved(tmp_path / f"several{suffix}", pictures[0], save_all=True, append_images=pictures[1:], **settings)
    with Image.open(path) as file:
        assert file.n_frames == 3
    assert torch.equal(read_picture(path), torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 3, 4))


# Bad files


@pytest.mark.parametrize("content", [b"", b"no picture at all\n", b"\x89PNG\r\n\x1a\n", b"P6\n0 0\n255\n"])
def test_what_is_no_picture(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_picture(path, what="photograph")
    start = f"photograph {path}: expected a picture that can be read, found {len(content)} bytes that cannot ("
    assert sentence(error).startswith(start)


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".jpeg"])
def test_a_file_that_ends_too_early(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"half{suffix}"
    write_picture(path, torch.rand(3, 40, 40))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError) as error:
        read_picture(path)
    assert sentence(error).startswith(f"picture {path}: expected a picture that can be read, found ")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_picture(tmp_path / "none.png")
    assert sentence(error) == f"picture {tmp_path / 'none.png'}: expected a file, found none"
    with pytest.raises(InputError, match=r": expected a file, found a folder$"):
        read_picture(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "kind", "said"),
    [
        (0, 255, np.float32, "from 0 to 1 in a picture of mode F, found 0 to 255"),
        (-0.5, 1, np.float32, "from 0 to 1 in a picture of mode F, found -0.5 to 1"),
        (0, np.nan, np.float32, "from 0 to 1 in a picture of mode F, found nan to nan"),
        (0, np.inf, np.float32, "from 0 to 1 in a picture of mode F, found 0 to inf"),
        (0, 131070, np.int32, "from 0 to 65535 in a picture of mode I, found 0 to 131070"),
        (-65535, 1, np.int32, "from 0 to 65535 in a picture of mode I, found -65535 to 1"),
    ],
)
def test_values_outside_their_range(low: float, high: float, kind: type, said: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "values.tif", np.array([[low, high]], dtype=kind))
    with pytest.raises(InputError) as error:
        read_picture(path)
    assert sentence(error) == f"picture {path}: expected values {said}"


def test_a_picture_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "large.png", colours())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(InputError, match="DecompressionBombError") as error:
        read_picture(tmp_path / "large.png")
    sentence(error)


def test_without_pillow_the_command_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    for act in (lambda: read_picture(tmp_path / "a.png"), lambda: write_picture(tmp_path / "a.png", colours())):
        with pytest.raises(InputError, match=r'pip install -e "\.\[images\]"') as error:
            act()
        assert sentence(error).startswith("module PIL.Image: expected it to be installed")
