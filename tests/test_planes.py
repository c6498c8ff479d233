from __future__ import annotations

import itertools

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from monai_rl_reg.geometry import transform_points
from monai_rl_reg.planes import PLANES, ShownGrid

SHAPE = (5, 6, 7)
ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for letters in (tuple(pair[0] for pair in axes), tuple(pair[1] for pair in axes))
]


def oriented(axcodes: str) -> MetaTensor:
    """A random volume, oblique by some degrees and anisotropic, whose axes run as the letters say."""
    affine = torch.eye(4, dtype=torch.float64)
    turn = torch.linalg.matrix_exp(
        torch.tensor([[0, 0.1, -0.15], [-0.1, 0, 0.2], [0.15, -0.2, 0]], dtype=torch.float64)
    )
    affine[:3, :3] = turn * torch.tensor([1.0, 1.5, 2.0])
    affine[:3, 3] = torch.tensor([3.0, -4.0, 5.0])
    turned = Orientation(axcodes=axcodes, labels=None)(MetaTensor(torch.rand(1, *SHAPE), affine=affine))
    assert isinstance(turned, MetaTensor)
    return turned


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_planes_are_those_of_monais_orientation(axcodes: str) -> None:
    volume = oriented(axcodes)
    grid = ShownGrid(volume.affine, volume.shape[1:])
    shown = Orientation(axcodes="LPI", labels=None)(volume)
    assert grid.shape == tuple(shown.shape[1:])
    assert grid.spacing == pytest.approx([1.0, 1.5, 2.0])
    torch.testing.assert_close(grid.turn(volume.as_tensor()), shown.as_tensor())
    point = (1, 2, 4)
    axial, coronal, sagittal = (grid.cut(volume.as_tensor(), plane, point)[0] for plane in PLANES[3])
    torch.testing.assert_close(axial, shown.as_tensor()[0, :, :, 4].T)
    torch.testing.assert_close(coronal, shown.as_tensor()[0, :, 2].T)
    torch.testing.assert_close(sagittal, shown.as_tensor()[0, 1].T)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_voxels_are_the_coordinates_of_what_is_cut(axcodes: str) -> None:
    volume = oriented(axcodes)
    grid = ShownGrid(volume.affine, volume.shape[1:])
    for plane in grid.planes:
        at = grid.voxels(plane, (1, 2, 4)).long()
        cut = grid.cut(volume.as_tensor(), plane, (1, 2, 4))[0]
        torch.testing.assert_close(volume.as_tensor()[0][tuple(at)], cut)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_vectors_point_to_the_right_and_down(axcodes: str) -> None:
    """Right of an axial picture is the patient's left, down is the back; a millimetre is a millimetre."""
    volume = oriented(axcodes)
    grid = ShownGrid(volume.affine, volume.shape[1:])
    for plane in grid.planes:
        at = grid.voxels(plane, (1, 2, 4))
        along = grid.along_plane(at, plane)
        right, down = along[:, 0, 1] - along[:, 0, 0], along[:, 1, 0] - along[:, 0, 0]
        torch.testing.assert_close(right, torch.tensor([grid.spacing[plane.across], 0.0], dtype=torch.float64))
        torch.testing.assert_close(down, torch.tensor([0.0, grid.spacing[plane.down]], dtype=torch.float64))
        world = transform_points(grid.affine, at)
        right, down = world[:, 0, 1] - world[:, 0, 0], world[:, 1, 0] - world[:, 0, 0]
        for step, axis in ((right, plane.across), (down, plane.down)):
            assert int(step.abs().argmax()) == axis
            assert step[axis] < 0  # to the patient's left, the back, the feet


def test_the_fullest_slices_are_on_the_shown_axes() -> None:
    volume = oriented("PSR")
    grid = ShownGrid(volume.affine, volume.shape[1:])
    mass = torch.zeros_like(volume.as_tensor())
    voxel = (1, 4, 2)
    mass[0][voxel] = 1
    assert grid.fullest(mass) == grid.shown(voxel)
    assert grid.turn(mass)[0][grid.shown(voxel)] == 1
    assert grid.shown([-9.0, 99.0, 2.2]) == grid.shown([0, volume.shape[2] - 1, 2])


def test_two_dimensional_grids_have_one_plane() -> None:
    affine = torch.eye(4, dtype=torch.float64)
    affine[0, 0], affine[1, 1] = -1.0, 2.0
    image = torch.rand(1, 5, 6)
    grid = ShownGrid(affine, image.shape[1:])
    assert grid.planes == PLANES[2]
    torch.testing.assert_close(grid.cut(image, grid.planes[0], (0, 0))[0], image[0].flip(1).T)
    assert grid.size(grid.planes[0]) == (5.0, 12.0)
