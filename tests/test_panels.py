from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from PIL import Image

from monai_rl_reg import panels
from monai_rl_reg.panels import Draw

SIZE = (70.0, 70.0)


def draw(paint: Draw, size: tuple[float, float] = SIZE, **settings: int) -> np.ndarray:
    """The picture that a panel becomes, (height, width, 3)."""
    uri, width, height = panels.to_jpeg(size, paint, **settings)
    data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (width, height)
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_panel_has_the_shape_of_its_plane_and_keeps_to_its_size() -> None:
    noise = torch.rand(200, 100)
    picture = draw(lambda axes: panels.grey(axes, noise), (30.0, 60.0), longest=300)
    assert picture.shape == (300, 150, 3)
    sizes = [
        len(base64.b64decode(panels.to_jpeg(SIZE, lambda axes: panels.grey(axes, noise), most=most)[0].split(",")[1]))
        for most in (10**6, 40_000)
    ]
    assert sizes[1] <= 40_000 < sizes[0]


def test_checkerboard_squares_alternate() -> None:
    dark, bright = torch.zeros(35, 35), torch.ones(35, 35)
    picture = draw(lambda axes: panels.checkerboard(axes, dark, bright, squares=7), longest=350)
    centres = picture[25::50, 25::50, 0]
    assert centres.shape == (7, 7)
    rows, columns = np.indices((7, 7))
    np.testing.assert_array_equal(centres > 128, (rows + columns) % 2 == 1)


def test_difference_is_orange_where_moved_is_brighter_and_dark_where_they_agree() -> None:
    fixed, moved = torch.full((10, 30), 0.5), torch.full((10, 30), 0.5)
    moved[:, :10], moved[:, 20:] = 0.9, 0.1
    picture = draw(lambda axes: panels.difference(axes, moved, fixed), (30.0, 10.0), longest=300)
    brighter, same, darker = picture[50, 50], picture[50, 150], picture[50, 250]
    assert brighter[0] > brighter[2] + 80
    assert same.max() < 40
    assert darker[2] > darker[0] + 80


def test_outlines_run_round_each_label_and_close_at_the_edge() -> None:
    label = torch.zeros(7, 7)
    label[2:5, 0:3] = 3
    picture = draw(lambda axes: panels.outlines(axes, label, "#ff0000", width=4.0), longest=350)
    red = picture[..., 0] > 128
    assert red[200:250].any()  # below, y = 5 voxels of 50 pixels
    assert red[130:220, 150].mean() > 0.9  # on the right, x = 3
    assert red[130:220, :4].any()  # on the left, along the picture's edge
    assert not red[110:190, 60:110].any()  # the inside
    assert not red[300:].any()


def test_grid_lines_lie_where_the_coordinates_are_multiples() -> None:
    y, x = torch.meshgrid(torch.arange(70.0), torch.arange(70.0), indexing="ij")
    place = torch.stack([x + 3, y])  # comes from 3 mm farther right
    picture = draw(lambda axes: panels.grid_lines(axes, place, every=10.0, width=2.0), longest=700)
    bright = picture[..., 2] > 100
    columns = np.flatnonzero(bright[250:255].all(0))
    expected = np.array([10 * i - 3 + 0.5 for i in range(1, 8)]) * 10  # voxel centres are half a voxel in
    assert len(expected) == 7
    assert all(np.abs(columns - x).min() <= 2 for x in expected)
    assert all(np.abs(expected - c).min() <= 3 for c in columns)


def test_folds_are_marked_and_nothing_else_is() -> None:
    determinant = torch.ones(20, 20)
    clean = draw(lambda axes: panels.folds(axes, determinant))
    assert clean.max() < 10
    determinant[4, 15] = -0.1
    marked = draw(lambda axes: panels.folds(axes, determinant))[..., 0] > 128
    rows, columns = marked.nonzero()
    assert rows.mean() / marked.shape[0] == pytest.approx(4.5 / 20, abs=0.01)
    assert columns.mean() / marked.shape[1] == pytest.approx(15.5 / 20, abs=0.01)


@pytest.mark.parametrize(("size", "spacing"), [((182.0, 218.0), 15.0), ((50.0, 36.0), 3.0), ((4.0, 3.0), 0.2)])
def test_grid_spacing_is_round(size: tuple[float, float], spacing: float) -> None:
    assert panels.grid_spacing(size) == pytest.approx(spacing)


def test_a_window_spans_what_an_image_has() -> None:
    image = torch.linspace(0, 100, 1001).reshape(1, 7, 11, 13)
    low, high = panels.window(image)
    assert (low, high) == pytest.approx((0.5, 99.5), abs=0.1)
    assert panels.window(torch.full((1, 4, 4), 7.0)) == (7.0, 8.0)
    mostly_empty = torch.zeros(1, 100, 100)
    mostly_empty[0, 0, 0] = 5
    assert panels.window(mostly_empty) == (0.0, 5.0)
    assert panels.scaled(torch.tensor([-1.0, 5, 15]), (0, 10)).tolist() == [0, 0.5, 1]


def test_the_curves_take_the_colour_of_the_page_around_them() -> None:
    svg = panels.curve_svg({"one": [0.1, float("nan"), 0.3], "two": [0.5, 0.6, 0.7]})
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert svg.count("<path") > 4
