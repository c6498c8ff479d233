"""Drawn sets: the same for the same seed, whole or not there, and what the tasks need to see in them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import Generator
from torch import Tensor

from monai_rl_reg import drawings
from monai_rl_reg.drawings import (
    draw_clip,
    draw_facades,
    draw_faces,
    packaged_pictures,
    packaged_style,
)
from monai_rl_reg.drawings.facade import LABELS
from monai_rl_reg.errors import InputError
from monai_rl_reg.pictures import SplitSideBySided, list_pictures, read_picture

Image = pytest.importorskip("PIL.Image")

Draw = Callable[..., Path]
SETS: tuple[Draw, ...] = (draw_faces, draw_facades)
ONE = {"skimage/data": ("chelsea.png",)}
"""A packaged picture that is quick to read."""


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pictures_of(folder: Path) -> Tensor:
    return torch.stack([read_picture(path) for path in list_pictures(folder)])


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return pictures_of(draw_faces(tmp_path_factory.mktemp("faces"), count=12, size=32))


@pytest.fixture(scope="module")
def facades(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Each with ``image``, the label map, and ``label``, the photograph."""
    whole = pictures_of(draw_facades(tmp_path_factory.mktemp("facades"), count=8, size=64))
    return [SplitSideBySided()({"image": picture}) for picture in whole]


# Every set


@pytest.mark.parametrize("draw", SETS)
@pytest.mark.parametrize(("count", "size"), [(1, 16), (3, 24)])
def test_counts_and_sizes(draw: Draw, count: int, size: int, tmp_path: Path) -> None:
    folder = draw(tmp_path / "new", count=count, size=size)
    assert list((tmp_path / "new").iterdir()) == [folder]
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:03d}.png" for i in range(count)]
    assert pictures_of(folder).shape == (count, 3, size, 2 * size if draw is draw_facades else size)


@pytest.mark.parametrize("draw", SETS)
def test_the_seed_decides_everything(draw: Draw, tmp_path: Path) -> None:
    first = bytes_of(draw(tmp_path / "a", count=3, size=24, seed=5))
    np.random.seed(1)
    torch.manual_seed(1)
    assert bytes_of(draw(tmp_path / "b", count=3, size=24, seed=5)) == first
    assert not set(bytes_of(draw(tmp_path / "a", count=3, size=24, seed=6)).values()) & set(first.values())
    more = bytes_of(draw(tmp_path / "a", count=4, size=24, seed=5))
    assert {name: more[name] for name in first} == first, "a larger set begins with the smaller one"
    assert len(list((tmp_path / "a").iterdir())) == 3, "each set has a folder of its own"


@pytest.mark.parametrize("draw", SETS)
def test_a_set_that_is_there_is_not_drawn_again(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw(tmp_path, count=2, size=16)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    def unexpected(random: Generator, size: int) -> np.ndarray:
        raise AssertionError("drawn again")

    monkeypatch.setattr(drawings, "face", unexpected)
    monkeypatch.setattr(drawings, "facade", unexpected)
    assert draw(str(tmp_path), count=2, size=16) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


@pytest.mark.parametrize("error", [ValueError("no pencil"), KeyboardInterrupt(), OSError(28, "No space left")])
@pytest.mark.parametrize(("draw", "name"), [(draw_faces, "face"), (draw_facades, "facade")])
def test_an_interrupted_drawing_leaves_nothing(
    draw: Draw, name: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, drawn = getattr(drawings, name), []

    def interrupted(random: Generator, size: int) -> np.ndarray:
        if len(drawn) == 2:
            assert len(list(tmp_path.rglob("*.png"))) == 2, "two were written"
            raise error
        drawn.append(size)
        return original(random, size)

    with monkeypatch.context() as context:
        context.setattr(drawings, name, interrupted)
        with pytest.raises(InputError if isinstance(error, OSError) else type(error)) as raised:
            draw(tmp_path, count=3, size=16)
    if isinstance(error, OSError):
        assert "expected room to write it, found: " in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert len(list_pictures(draw(tmp_path, count=3, size=16))) == 3, "and the next try is not hindered"


def test_the_set_of_a_faster_process_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = drawings.face

    def slow(random: Generator, size: int) -> np.ndarray:
        with monkeypatch.context() as context:  # meanwhile
            context.setattr(drawings, "face", original)
            draw_faces(tmp_path, count=1, size=16)
        return np.zeros((size, size, 3))

    monkeypatch.setattr(drawings, "face", slow)
    folder = draw_faces(tmp_path, count=1, size=16)
    assert list(tmp_path.iterdir()) == [folder]
    assert pictures_of(folder).max() > 0


def test_no_room(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^output .*file.*: expected room to write it, found: "):
        draw_faces(tmp_path / "file", count=1, size=16)
    (tmp_path / "faces_1x16_seed0").touch()
    with pytest.raises(InputError, match=r"^output .*faces_1x16_seed0: expected room to write it, found: "):
        draw_faces(tmp_path, count=1, size=16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces_1x16_seed0", "file"]


# Faces


def test_faces_are_roughly_symmetrical_and_differ(faces: Tensor) -> None:
    middle = faces[:, :, 4:28, 8:24]  # without most of the background, which is shaded to one side
    mirrored = middle.flip(-1)
    nearest = min(float((a - b).abs().mean()) for a, b in itertools.combinations(middle, 2))
    own = (middle - mirrored).abs().mean((1, 2, 3))
    assert own.max() < 0.1
    assert own.min() > 0.005, "light, parting and eyes are not quite symmetrical"
    assert own.max() < nearest, "a face is nearer to its mirror image than to any other face"
    flat = (middle - middle.mean((-2, -1), keepdim=True)).flatten(1)
    flat_mirrored = (mirrored - mirrored.mean((-2, -1), keepdim=True)).flatten(1)
    alike = torch.nn.functional.cosine_similarity(flat, flat_mirrored)
    assert alike.min() > 0.5
    assert alike.mean() > 0.75


def test_faces_are_aligned_and_of_many_colours(faces: Tensor) -> None:
    average = faces.mean(0)
    assert average.std((-2, -1)).max() > 0.04, "the average of all still shows a face"
    cheeks = faces[:, :, 18:21, 15:17].mean((-2, -1))  # the nose: always skin
    assert (cheeks[:, 0] > cheeks[:, 2]).all(), "skin is never blue"
    assert cheeks.mean(1).max() - cheeks.mean(1).min() > 0.2, "and of many tones"


# Facades


def test_label_maps_have_only_flat_colours_of_labels(facades: list[dict[str, Tensor]]) -> None:
    colours = {colour: name for name, colour in LABELS.items()}
    assert len(colours) == 12
    seen = set()
    for facade in facades:
        values = facade["image"].mul(255).round().byte().flatten(1).T.tolist()
        found = {colours[tuple(value)] for value in values}  # KeyError: a colour that is no label's
        assert {"background", "wall", "window", "door", "cornice"} <= found
        seen |= found
    assert seen == set(LABELS), "every label occurs in a few facades"


def test_the_photograph_is_beside_its_own_label_map(facades: list[dict[str, Tensor]]) -> None:
    def explained(photo: Tensor, labels: Tensor) -> float:
        """The share of the photograph's variance that the labels' mean colours explain."""
        kinds = labels.mul(255).round().long()
        kinds = kinds[0] * 65536 + kinds[1] * 256 + kinds[2]
        rest = torch.zeros(())
        for kind in kinds.unique():
            inside = photo[:, kinds == kind]
            rest += (inside - inside.mean(1, keepdim=True)).square().sum()
        return 1 - float(rest / (photo - photo.mean((1, 2), keepdim=True)).square().sum())

    shares = [explained(facade["label"], facade["image"]) for facade in facades]
    others = [explained(a["label"], b["image"]) for a, b in itertools.permutations(facades, 2)]
    assert np.mean(shares) > np.mean(others) + 0.2
    for facade in facades:
        photo = facade["label"].mul(255).round().byte().flatten(1).T
        assert len(photo.unique(dim=0)) > 500, "a photograph is not flat"


def test_facades_differ(facades: list[dict[str, Tensor]]) -> None:
    for a, b in itertools.combinations(facades, 2):
        assert (a["image"] != b["image"]).any(0).float().mean() > 0.05
        assert (a["label"] - b["label"]).abs().mean() > 0.05


# The style


def test_the_style_is_one_colourful_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packaged_style(tmp_path, size=32)
    assert path.is_file()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    picture = read_picture(path)
    assert picture.shape == (3, 32, 32)
    assert (picture.max(0).values - picture.min(0).values).mean() > 0.2, "strong in colour"
    sky, land = picture[:, :20].mean((1, 2)), picture[:, -6:].mean((1, 2))
    assert sky[2] > sky[0], "the sky is blue"
    assert land.mean() < sky.mean(), "over dark hills"
    monkeypatch.setattr(drawings, "painting", None)
    assert packaged_style(tmp_path, size=32) == path


# Packaged pictures, and the clip over one


def test_packaged_pictures_are_copied_at_most_512_pixels_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    assert len(drawings._packaged_files()) >= 4
    few = ("astronaut.png", "chelsea.png", "motorcycle_left.png")  # the others in the same way
    monkeypatch.setattr(drawings, "PHOTOGRAPHS", {"skimage/data": few})
    folder = packaged_pictures(tmp_path)
    files = drawings._packaged_files()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert {path.stem for path in folder.iterdir()} == {path.stem for path in files}
    assert [path.name for path in files] == list(few)
    for source in files:
        with Image.open(source) as file:
            width, height = file.size
        with Image.open(folder / f"{source.stem}.png") as file:
            assert (file.format, file.mode) == ("PNG", "RGB")
            assert max(file.size) == min(512, max(width, height)), "smaller ones are not enlarged"
            assert file.width / file.height == pytest.approx(width / height, rel=0.01)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert packaged_pictures(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_files_that_a_version_lacks_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr(drawings, "PHOTOGRAPHS", {"skimage/data": ("chelsea.png", "no_such_file.png")})
    assert [path.name for path in packaged_pictures(tmp_path).iterdir()] == ["chelsea.png"]
    monkeypatch.setattr(drawings, "PHOTOGRAPHS", {"skimage/data": ("no_such_file.png",)})
    with pytest.raises(InputError, match=r"^packaged pictures: expected any of .*no_such_file\.png.*, found none$"):
        packaged_pictures(tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []


@pytest.mark.parametrize("make", [packaged_pictures, draw_clip])
def test_without_the_packages_the_command_that_installs_them_is_named(
    make: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("skimage", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r'pip install -e "\.\[images\]"') as error:
        make(tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(drawings, "PHOTOGRAPHS", ONE)
    with pytest.raises(InputError, match=r"^module skimage: expected it to be installed \(pip install"):
        make(tmp_path)


def test_one_of_the_packages_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(drawings, "PHOTOGRAPHS", {"sklearn/datasets/images": ("china.jpg",)} | ONE)
    assert [path.name for path in packaged_pictures(tmp_path).iterdir()] == ["chelsea.png"]


def test_a_clip_moves_steadily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr(drawings, "PHOTOGRAPHS", ONE)
    folder = draw_clip(tmp_path, frames=6, size=(48, 64))
    assert list(tmp_path.iterdir()) == [folder]
    assert [path.name for path in list_pictures(folder)] == [f"{i:05d}.png" for i in range(6)]
    frames = pictures_of(folder)
    assert frames.shape == (6, 3, 48, 64)
    disc = (frames - torch.tensor([230, 60, 30]).view(3, 1, 1) / 255).abs().amax(1) < 0.02
    places = [mask.nonzero().float().mean(0).tolist() for mask in disc]
    across = [place[1] for place in places]
    assert across == sorted(across), "the disc goes to the right"
    assert np.diff(across) == pytest.approx([0.7 * 64 / 5] * 5, abs=0.7)
    assert min(place[0] for place in places) < places[0][0] - 10, "and up and down again"
    assert (frames[1:] - frames[:-1]).abs().mean((1, 2, 3)).min() > 0.005
    assert bytes_of(draw_clip(tmp_path / "again", frames=6, size=(48, 64))) == bytes_of(folder)
    assert draw_clip(tmp_path, frames=6, size=(48, 64)) == folder


def test_a_clip_of_one_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr(drawings, "PHOTOGRAPHS", ONE)
    assert pictures_of(draw_clip(tmp_path, frames=1, size=(24, 32))).shape == (1, 3, 24, 32)
