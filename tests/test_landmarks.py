"""Landmarks: files, coordinates, and the way there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from torch.nn import functional as F

from monai_rl_reg.errors import InputError
from monai_rl_reg.finishing import Correspondence
from monai_rl_reg.geometry import carry
from monai_rl_reg.landmarks import Landmarks, read_landmarks


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_columns_spaces_and_images(tmp_path: Path) -> None:
    text = "name,x,y,z,space,image\ntip,1,2,3,RAS,\n,1,2,3,LPS,moving\nend,1,2,3,,Fixed\n"
    points = read_landmarks(write(tmp_path / "p.csv", text))
    assert points.points.T.tolist() == [[1, 2, 3], [-1, -2, 3], [-1, -2, 3]]
    assert points.names == ("tip", "", "end")
    assert points.images == ("fixed", "moving", "fixed")
    assert points.spaces == ("RAS", "LPS", "LPS")


@pytest.mark.parametrize("comment", ["# space: RAS", "# Coordinate system = RAS", "#space=ras"])
def test_a_comment_says_the_space(comment: str, tmp_path: Path) -> None:
    points = read_landmarks(write(tmp_path / "p.csv", f"{comment}\nx, y, z\n1,2,3\n\n4,5,6\n"))
    assert points.points.T.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_two_dimensions(tmp_path: Path) -> None:
    assert read_landmarks(write(tmp_path / "p.csv", "x,y\n1,2\n")).points.tolist() == [[-1], [-2]]


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    random = torch.randn(3, 4, dtype=torch.float64)
    points = Landmarks(random, ("a", "", "c, d", "e"), ("fixed", "moving", "fixed", "moving"), ("LPS", "RAS") * 2)
    points.save(tmp_path / "p.csv")
    again = read_landmarks(tmp_path / "p.csv")
    assert torch.allclose(again.points, points.points, atol=1e-6)
    assert (again.names, again.images, again.spaces) == (points.names, points.images, points.spaces)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "expected a CSV file, found none"),
        ("", "expected the columns x,y"),
        ("a,b\n1,2\n", "expected the columns x,y[,z], found a, b"),
        ("x,y,z\n", "expected at least one row"),
        ("x,y,z\n1,2,three\n", "line 2: expected numbers, found '1,2,three'"),
        ("x,y,z\n1,2\n", "line 2: expected numbers"),
        ("x,y,z\n\n1,2,nan\n", "line 3: expected finite numbers"),
        ("# space: MNI\nx,y,z\n1,2,3\n", "line 1: expected LPS or RAS, found MNI"),
        ("x,y,z,image\n1,2,3,atlas\n", "line 2: expected fixed or moving, found atlas"),
    ],
)
def test_bad_files(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as raised:
        read_landmarks(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)


def images() -> tuple[MetaTensor, MetaTensor]:
    affine = torch.diag(torch.tensor([1.5, 1.0, 2.0, 1.0])).double()
    return MetaTensor(torch.zeros(1, 20, 24, 18), affine=affine), MetaTensor(torch.zeros(1, 30, 30, 30))


@pytest.mark.parametrize(("point", "image"), [((29.3, 0, 0), "fixed"), ((0, 0, -0.6), "moving")])
def test_points_outside_their_image(point: tuple[float, ...], image: str) -> None:
    points = torch.tensor([[1.0, 1, 1], point], dtype=torch.float64).T
    landmarks = Landmarks(points, ("", "tip"), ("fixed", image), ("RAS", "RAS"), "p.csv")
    with pytest.raises(InputError, match=rf"landmarks p.csv: .* inside the {image} image, found 1 outside, .* tip at"):
        landmarks.check(*images())


def test_points_at_the_edge_are_inside() -> None:
    points = torch.tensor([[29.2, -0.4, 34.9], [29.4, 29.4, -0.4]], dtype=torch.float64).T
    Landmarks(points, ("", ""), ("fixed", "moving"), ("LPS", "LPS")).check(*images())


def test_points_of_another_dimension() -> None:
    with pytest.raises(InputError, match="expected 3 coordinates a point, found 2"):
        Landmarks(torch.zeros(2, 1), ("",), ("fixed",), ("LPS",)).check(*images())


def test_there_and_back_is_under_half_a_voxel() -> None:
    fixed, _ = images()
    field = 0.5 * F.interpolate(torch.randn(1, 3, 4, 4, 4), (10, 12, 9), mode="trilinear")[0]
    grid = fixed.affine.double() @ torch.diag(torch.tensor([2.0, 2, 2, 1])).double()
    initial = torch.eye(4, dtype=torch.float64)
    initial[:3, :3] += 0.2 * torch.randn(3, 3)
    initial[:3, 3] = 20
    way = Correspondence.on_fixed_grid(field, grid, initial, fixed)
    points = torch.rand(3, 50, dtype=torch.float64) * torch.tensor([[20.0], [16.0], [24.0]]) + 4
    start = Landmarks(points, ("",) * 50, ("fixed",) * 50, ("LPS",) * 50)
    there = start.carried(way)
    assert set(there.images) == {"moving"}
    assert (there.points - carry(initial, points)).norm(dim=0).mean() > 0.3  # the field counts, too
    back = there.carried(way)
    assert set(back.images) == {"fixed"}
    assert (back.points - points).norm(dim=0).max() < 0.05  # millimetres, of voxels of 1 mm and more


def test_landmarks_of_one_name_in_both_images_tell_the_error() -> None:
    fixed, _ = images()
    initial = torch.eye(4, dtype=torch.float64)
    initial[0, 3] = 4.0
    field = torch.zeros(3, *fixed.shape[1:])
    field[1] = 3.0 / float(fixed.affine[:3, 1].norm())
    way = Correspondence.on_fixed_grid(field, fixed.affine.double(), initial, fixed)
    step = way.steps.displacement[:, 3, 3, 3].double()
    assert float(step.norm()) == pytest.approx(3)
    inside = torch.tensor([[9.0, 8.0, 10.0], [7.0, 9.0, 12.0]], dtype=torch.float64).T
    shift = torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64)
    there = inside + (shift + step)[:, None] + torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    points = torch.cat([inside, there, inside, there], dim=1)
    names = ("a", "b", "a", "b", "", "twice", "", "twice")
    roles = ("fixed", "fixed", "moving", "moving", "fixed", "moving", "moving", "moving")
    found = Landmarks(points, names, roles, ("RAS",) * 8).errors(way)
    assert found["tre_landmarks"] == 2
    assert found["tre_after_mm"] == pytest.approx(0.5, abs=1e-4)
    away = [float((step + torch.tensor([0.0, 0.0, z])).norm()) for z in (0.0, 1.0)]
    assert found["tre_before_mm"] == pytest.approx(sum(away) / 2, abs=1e-4)
    assert Landmarks(points[:, :2], names[:2], roles[:2], ("RAS",) * 2).errors(way) == {}
