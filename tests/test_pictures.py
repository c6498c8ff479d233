"""Pictures beside their reading: transforms, folders and their splits, writing, strips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made_pictures import Image, colours, names, no_default, sentence, touch

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
    ("hold_back", "held_out"), [(1, 1), (3, 3), (11, 11), (0.001, 1), (0.25, 3), (0.3, 4), (0.9, 11)]
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
    splits = split_pictures(folder, default=no_default, hold_back=1)
    given = {Path(row["image"]).name: row["name"] for row in splits["training"] + splits["validation"]}
    assert len(set(given.values())) == 5
    assert given == {"a.png": "a.png", "a.jpg": "a.jpg", "a.png.jpg": "a.png.jpg", "b.png": "b", "c.d.png": "c.d"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hold_back": 4}, "more pictures than the 4 to hold back for validation, found 4"),
        ({"hold_back": 9}, "more pictures than the 9 to hold back for validation, found 4"),
        ({"hold_back": 0.99}, "more pictures than the 4 to hold back for validation, found 4"),
        ({"hold_back": 0}, "a share or a number of pictures above 0, found 0"),
        ({"hold_back": -0.1}, "a share or a number of pictures above 0, found -0.1"),
        ({"hold_back": float("nan")}, "a share or a number of pictures above 0, found nan"),
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
