"""Pictures: every kind that PIL opens becomes colours from 0 to 1, bad ones one sentence, and folders are split."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.pictures import (
    CAPTION,
    GAP,
    SUFFIXES,
    LoadPictured,
    SplitSideBySided,
    list_pictures,
    read_picture,
    split_pictures,
    strip,
    to_bytes,
    write_picture,
)

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


# Reading


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


# Transforms


def test_loaded_pictures_and_their_files(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    write_picture(path, colours())
    given = {"image": path, "name": "picture"}
    loaded = LoadPictured("image")(given)
    assert given == {"image": path, "name": "picture"}, "what was given stays"
    assert set(loaded) == {"image", "name", "image_file"}
    assert (loaded["image_file"], loaded["name"]) == (str(path), "picture")
    assert torch.allclose(loaded["image"], colours())


def test_missing_keys_are_left_out_only_when_allowed(tmp_path: Path) -> None:
    write_picture(tmp_path / "picture.png", colours())
    given = {"image": str(tmp_path / "picture.png")}
    loaded = LoadPictured(["image", "label"], allow_missing_keys=True)(given)
    assert set(loaded) == {"image", "image_file"}
    with pytest.raises(KeyError, match="label"):
        LoadPictured(["image", "label"])(given)


def test_messages_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^label .*none\.png: expected a file, found none$"):
        LoadPictured("label")({"label": tmp_path / "none.png"})


@pytest.mark.parametrize("side", ["right", "left"])
def test_side_by_side_pictures_are_split(side: str) -> None:
    left, right = colours(6, 8).split(4, dim=2)
    data = SplitSideBySided(label_side=side)({"image": colours(6, 8), "name": "a"})
    photo, label = (left, right) if side == "right" else (right, left)
    assert set(data) == {"image", "label", "name"}
    assert torch.equal(data["label"], photo)
    assert torch.equal(data["image"], label), "by default what the network gets is the label map"
    assert data["image"].is_contiguous()
    assert data["label"].is_contiguous()


def test_the_halves_go_where_one_says() -> None:
    given = {"both": colours(6, 8)}
    data = SplitSideBySided("photo", "map", key="both")(given)
    assert set(data) == {"photo", "map"}
    assert torch.equal(torch.cat([data["photo"], data["map"]], dim=2), given["both"])


def test_pictures_that_are_not_side_by_side(tmp_path: Path) -> None:
    write_picture(tmp_path / "odd.png", colours(6, 7))
    loaded = LoadPictured("image")({"image": tmp_path / "odd.png"})
    with pytest.raises(InputError) as error:
        SplitSideBySided()(loaded)
    message = sentence(error)
    assert message.startswith(f"picture {tmp_path / 'odd.png'}: expected a photograph and a label map side by side")
    assert message.endswith("found 7 pixels")
    with pytest.raises(InputError, match=r"^label_side: expected left or right, found 'above'$"):
        SplitSideBySided(label_side="above")


# Folders


def test_pictures_are_listed_in_natural_order(tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", "10.png", "2.PNG", "a10b2.jpg", "a2b10.jpg", "a2b9.jpg", "B1.webp", "1.tiff")
    touch(folder, "notes.txt", ".hidden.png", "png", "weights.pt")
    touch(folder / "inner.png", "3.png")
    listed = [path.name for path in list_pictures(folder)]
    assert listed == ["1.tiff", "2.PNG", "10.png", "a2b9.jpg", "a2b10.jpg", "a10b2.jpg", "B1.webp"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_listed(suffix: str, tmp_path: Path) -> None:
    assert [p.suffix for p in list_pictures(touch(tmp_path / "set", f"a{suffix}"))] == [suffix]


def test_folders_without_pictures(tmp_path: Path) -> None:
    touch(tmp_path / "set", "notes.txt")
    for place, found in (("set", "found none"), ("none", "found none"), ("set/notes.txt", "found a file")):
        for act in (list_pictures, lambda folder: split_pictures(folder, default=no_default, hold_back=1)):
            with pytest.raises(InputError) as error:
                act(tmp_path / place)
            message = sentence(error)
            assert message.startswith(f"dataset {tmp_path / place}: expected ")
            assert message.endswith(found)


@pytest.mark.parametrize(
    ("hold_back", "held_out"), [(0, 0), (1, 1), (3, 3), (11, 11), (0.001, 1), (0.25, 3), (0.3, 4), (0.9, 11)]
)
def test_the_last_pictures_are_held_back(hold_back: float, held_out: int, tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", *(f"{i}.png" for i in range(1, 13)))
    splits = split_pictures(folder, default=no_default, hold_back=hold_back)
    assert set(splits) == {"training", "validation"}
    assert names(splits["training"]) == [str(i) for i in range(1, 13 - held_out)]
    assert names(splits["validation"]) == [str(i) for i in range(13 - held_out, 13)]
    for row in splits["training"] + splits["validation"]:
        assert row == {"image": str(folder / f"{row['name']}.png"), "name": row["name"]}


def test_shares_are_exact(tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", *(f"{i}.png" for i in range(100)))
    for percent in (7, 14, 28, 29, 55, 57, 58):
        splits = split_pictures(folder, default=no_default, hold_back=percent / 100)
        assert len(splits["validation"]) == percent


def test_a_limit_takes_the_first_ones_and_leaves_validation(tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", *(f"{i}.png" for i in range(8)))
    for limit, trained in ((1, 1), (3, 3), (6, 6), (50, 6), (None, 6)):
        splits = split_pictures(folder, default=no_default, hold_back=2, limit=limit)
        assert names(splits["training"]) == ["0", "1", "2", "3", "4", "5"][:trained]
        assert names(splits["validation"]) == ["6", "7"]


def test_without_data_the_default_is_made_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def default() -> Path:
        calls.append("made")
        return touch(tmp_path / "drawn", "0.png", "1.png", "2.png")

    splits = split_pictures(None, default=default, hold_back=1)
    assert calls == ["made"]
    assert capsys.readouterr().out == f"No data given: using the 3 pictures in {tmp_path / 'drawn'}\n"
    assert (names(splits["training"]), names(splits["validation"])) == (["0", "1"], ["2"])
    split_pictures(str(tmp_path / "drawn"), default=no_default, hold_back=1)
    assert capsys.readouterr().out == ""


def test_names_are_stems_but_unique(tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", "a.png", "a.jpg", "a.png.jpg", "b.png", "c.d.png")
    splits = split_pictures(folder, default=no_default, hold_back=0)
    given = {Path(row["image"]).name: row["name"] for row in splits["training"]}
    assert len(set(given.values())) == 5
    assert given == {"a.png": "a.png", "a.jpg": "a.jpg", "a.png.jpg": "a.png.jpg", "b.png": "b", "c.d.png": "c.d"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hold_back": 4}, "more pictures than the 4 to hold back for validation, found 4"),
        ({"hold_back": 9}, "more pictures than the 9 to hold back for validation, found 4"),
        ({"hold_back": 0.99}, "more pictures than the 4 to hold back for validation, found 4"),
        ({"hold_back": -1}, "0, a share or a number of pictures, found -1"),
        ({"hold_back": -0.1}, "0, a share or a number of pictures, found -0.1"),
        ({"hold_back": float("nan")}, "0, a share or a number of pictures, found nan"),
        ({"hold_back": 1, "limit": 0}, "at least 1 picture to train on, found 0"),
        ({"hold_back": 1, "limit": -1}, "at least 1 picture to train on, found -1"),
    ],
)
def test_nothing_left_to_train_on(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", *(f"{i}.png" for i in range(4)))
    with pytest.raises(InputError) as error:
        split_pictures(folder, default=no_default, **settings)
    assert sentence(error).endswith(f": expected {said}")


# Writing


def test_bytes_are_rounded_and_clipped() -> None:
    values = torch.tensor([-1, 0, 0.4 / 255, 0.6 / 255, 1, 2, float("inf"), float("-inf")]).view(1, 1, 8)
    assert to_bytes(values)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255, 0]
    assert to_bytes(colours().double().requires_grad_()).shape == (6, 8, 3)


def test_what_is_outside_is_clipped(tmp_path: Path) -> None:
    write_picture(tmp_path / "wide.png", 3 * colours() - 1)
    read = read_picture(tmp_path / "wide.png")
    torch.testing.assert_close(read, (3 * colours() - 1).clamp(0, 1), rtol=0, atol=0.51 / 255)


def test_folders_are_made_and_old_pictures_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "inner" / "picture.png"
    for picture in (torch.zeros(3, 4, 4), torch.ones(3, 4, 4)):
        write_picture(path, picture)
        assert torch.equal(read_picture(path), picture)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_leaves_nothing_new(
    error: BaseException, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture.png"
    if old is not None:
        path.write_bytes(old)

    def save(_: Any, target: Path, **settings: object) -> None:
        Path(target).write_bytes(b"half of")
        raise error

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)) as raised:
        write_picture(path, colours())
    if isinstance(error, OSError):
        assert sentence(raised) == f"output {path}: expected room to write it, found: No space left on device"
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert left == ({} if old is None else {"picture.png": old})


@pytest.mark.parametrize("name", ["picture.txt", "picture", "picture.nii.gz"])
def test_suffixes_that_are_not_a_pictures(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        write_picture(tmp_path / name, colours())
    assert sentence(error).startswith(f"output {tmp_path / name}: expected one of the suffixes .png, .jpg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "width"), [("long.webp", 16384), ("long.gif", 65536)])
def test_pictures_too_large_for_their_format(name: str, width: int, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        write_picture(tmp_path / name, torch.zeros(3, 1, width))
    said = f"output {tmp_path / name}: expected a size that the format can hold, found {width} x 1 pixels ("
    assert sentence(error).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a folder that can be written to") as error:
        write_picture(tmp_path / "file" / "picture.png", colours())
    sentence(error)


# Strips


def test_a_strip_shows_its_pictures_with_white_between() -> None:
    pictures = [0.5 * colours(6, 8), 0.5 * colours(6, 5), 0.5 * colours(6, 3)[:1]]
    row = strip([pictures[0].requires_grad_(), *pictures[1:]])
    assert row.shape == (3, 6, 8 + 5 + 3 + 2 * GAP)
    assert not row.requires_grad
    first, gap, second, other_gap, third = row.split([8, GAP, 5, GAP, 3], dim=2)
    for cell, picture in zip((first, second, third), pictures, strict=True):
        assert torch.equal(cell, picture.detach().expand(3, -1, -1))
    assert torch.equal(gap, torch.ones(3, 6, GAP))
    assert torch.equal(other_gap, torch.ones(3, 6, GAP))
    assert torch.equal(strip([colours()]), colours()), "alone it has no gap"


def test_captions_stand_above_the_pictures() -> None:
    pictures = [torch.zeros(3, 10, 40), torch.zeros(1, 10, 40)]
    row = strip(pictures, ["before", "after, in words that are cut off"])
    assert row.shape == (3, CAPTION + 10, 80 + GAP)
    assert row.min() >= 0
    assert row.max() <= 1
    captions = row[:, :CAPTION]
    left, right = captions[:, :, :40], captions[:, :, -40:]
    for caption in (left, right):
        assert caption.min() < 0.2, "written in black"
        assert 0.6 < caption.mean() < 1, "on white"
        assert torch.equal(caption[0], caption[1]), "grey"
    assert not torch.equal(left, right)
    assert torch.equal(captions[:, :, 40:-40], torch.ones(3, CAPTION, GAP))
    assert torch.equal(row[:, CAPTION:, :40], pictures[0])
    assert torch.equal(strip(pictures, ["", ""])[:, :CAPTION], torch.ones(3, CAPTION, 80 + GAP))


def test_every_picture_needs_its_caption() -> None:
    with pytest.raises(ValueError, match="zip"):
        strip([colours(), colours()], ["only one"])
