from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp
from monai.transforms.utils import create_rotate
from torch import Tensor

from monai_rl_reg.geometry import (
    DenseTransform,
    carry,
    compose,
    grid_points,
    identity_grid,
    jacobian_determinant,
    landing,
    ras_to_lps,
    sample,
    sample_field,
    shift,
    slabs,
    transform_points,
    voxels_to_millimetres,
    world_box,
)

SIZES = [(9, 12), (8, 6, 7)]


def constant_field(shift: Sequence[float], size: Sequence[int]) -> Tensor:
    d = len(size)
    return torch.tensor(shift[:d]).reshape(1, d, *[1] * d).repeat(1, 1, *size)


def affine_near_identity(d: int) -> Tensor:
    affine = torch.eye(d + 1, dtype=torch.float64)
    affine[:d] += 0.1 * (torch.rand(d, d + 1, dtype=torch.float64) - 0.5)
    return affine


def field_of(affine: Tensor, size: Sequence[int]) -> Tensor:
    grid = identity_grid(size)
    return (transform_points(affine, grid) - grid).float()[None]


def oblique_affine(d: int) -> Tensor:
    """Rotated about every axis, with its own voxel size and sense in every direction."""
    affine = torch.eye(d + 1, dtype=torch.float64)
    rotation = torch.as_tensor(create_rotate(d, [0.4, -0.3, 0.7] if d == 3 else [0.4]))[:d, :d]
    affine[:d, :d] = rotation * torch.tensor([0.8, -1.5, 3.0], dtype=torch.float64)[:d]
    affine[:d, d] = torch.tensor([-20.0, 35.0, 7.0], dtype=torch.float64)[:d]
    return affine


def single_point(coordinates: Sequence[float]) -> Tensor:
    return torch.tensor(coordinates, dtype=torch.float64).reshape(-1, *[1] * len(coordinates))


@pytest.mark.parametrize("size", SIZES)
def test_constant_shifts_add_up(size: tuple[int, ...]) -> None:
    first, second = constant_field([1.5, 0, -1], size), constant_field([-0.5, 2, 4], size)
    composed = compose(first, second, Warp("bilinear", "border"))
    torch.testing.assert_close(composed, constant_field([1.0, 2, 3], size))


@pytest.mark.parametrize("size", SIZES)
def test_composed_affine_maps_are_their_product(size: tuple[int, ...]) -> None:
    d = len(size)
    first, second = affine_near_identity(d), affine_near_identity(d)
    composed = compose(field_of(first, size), field_of(second, size), Warp("bilinear", "border"))
    expected = field_of(first @ second, size)  # the step comes first: x -> first(second(x))
    landing = transform_points(second, identity_grid(size))
    last = torch.tensor(size).reshape(-1, *[1] * d) - 1
    inside = ((landing >= 0) & (landing <= last)).all(0)
    assert inside.sum() > 0.5 * math.prod(size)
    torch.testing.assert_close(composed[0][:, inside], expected[0][:, inside], rtol=0, atol=1e-5)
    assert not torch.allclose(composed[0][:, inside], field_of(second @ first, size)[0][:, inside], atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_composing_with_no_step_changes_nothing(size: tuple[int, ...]) -> None:
    field = torch.randn(2, len(size), *size)
    composed = compose(field, torch.zeros_like(field), Warp("bilinear", "border"))
    torch.testing.assert_close(composed, field, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_jacobian_determinant_equals_that_of_numpy(size: tuple[int, ...]) -> None:
    d = len(size)
    field = torch.randn(2, d, *size)
    for item, found in zip(field.double().numpy(), jacobian_determinant(field), strict=True):
        gradient = np.array([np.gradient(component, axis=tuple(range(d))) for component in item])
        jacobian = np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(d)
        torch.testing.assert_close(found.double(), torch.from_numpy(np.linalg.det(jacobian)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_jacobian_determinant_of_an_affine_map_is_that_of_its_matrix(size: tuple[int, ...]) -> None:
    d = len(size)
    affine = affine_near_identity(d)
    found = jacobian_determinant(field_of(affine, size))
    torch.testing.assert_close(found, torch.full_like(found, torch.linalg.det(affine[:d, :d]).item()))


@pytest.mark.parametrize("size", SIZES)
def test_identity_grid_is_that_of_numpy(size: tuple[int, ...]) -> None:
    assert torch.equal(identity_grid(size), torch.from_numpy(np.indices(size).astype(np.float64)))


@pytest.mark.parametrize("size", SIZES)
def test_transform_points_is_the_homogeneous_product(size: tuple[int, ...]) -> None:
    affine, points = oblique_affine(len(size)), identity_grid(size)
    homogeneous = np.concatenate([points.numpy(), np.ones((1, *size))])
    expected = np.tensordot(affine.numpy(), homogeneous, axes=1)[: len(size)]
    torch.testing.assert_close(transform_points(affine, points), torch.from_numpy(expected))
    torch.testing.assert_close(grid_points(affine, size), torch.from_numpy(expected))


@pytest.mark.parametrize("size", SIZES)
def test_slabs_are_the_grid_in_pieces(size: tuple[int, ...]) -> None:
    affine, (first, *rest) = oblique_affine(len(size)), size
    pieces = list(slabs(affine, size, most=2 * math.prod(rest)))
    assert [rows for rows, _ in pieces] == [slice(i, min(i + 2, first)) for i in range(0, first, 2)]
    torch.testing.assert_close(torch.cat([points for _, points in pieces], dim=1), grid_points(affine, size))


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", SIZES)
def test_sample_at_displaced_voxels_is_the_warp_of_monai(size: tuple[int, ...], mode: str) -> None:
    image, field = torch.rand(2, *size), 3 * torch.randn(len(size), *size)
    found = sample(image, identity_grid(size) + field, mode=mode)
    torch.testing.assert_close(found, Warp(mode, "border")(image[None], field[None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_sample_of_a_linear_ramp_is_exact(size: tuple[int, ...], dtype: torch.dtype) -> None:
    d = len(size)
    slope = torch.tensor([2.0, -3.0, 5.0], dtype=torch.float64)[:d]
    image = torch.tensordot(slope, identity_grid(size), dims=1).float()[None]
    index = (torch.tensor(size) - 1).reshape(-1, *[1] * d) * torch.rand(d, *[4] * d)
    found = sample(image, index.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], torch.tensordot(slope, index.double(), dims=1).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_sample_takes_a_list_of_points(size: tuple[int, ...]) -> None:
    image = torch.rand(2, *size)
    index = identity_grid(size).flatten(1)
    torch.testing.assert_close(sample(image, index), image.flatten(1))


@pytest.mark.parametrize("outside", ["border", "zeros"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", SIZES)
def test_edge_voxel_reaches_half_a_voxel_outside(size: tuple[int, ...], mode: str, outside: str) -> None:
    image = 1 + torch.rand(1, *size)
    low = [0] * len(size)
    high = [count - 1 for count in size]
    for corner, step in ((low, -0.49), (high, 0.49)):
        index = single_point(corner) + step
        assert sample(image, index, mode=mode, outside=outside).item() == pytest.approx(image[(0, *corner)].item())


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", SIZES)
def test_only_zeros_ends_the_image_half_a_voxel_outside(size: tuple[int, ...], mode: str) -> None:
    image = 1 + torch.rand(1, *size)
    for axis, count in enumerate(size):
        for position in (-0.51, count - 0.49):
            index = single_point([n // 2 for n in size])
            index[axis] = position
            assert sample(image, index, mode=mode, outside="zeros").item() == 0
            assert sample(image, index, mode=mode, outside="border").item() >= 1


def test_sample_of_a_single_slice_repeats_it() -> None:
    image = torch.rand(1, 5, 6, 1)
    index = identity_grid((5, 6, 3))
    torch.testing.assert_close(sample(image, index), image.repeat(1, 1, 1, 3))


@pytest.mark.parametrize("size", SIZES)
def test_ras_to_lps_flips_the_first_two_and_is_its_own_inverse(size: tuple[int, ...]) -> None:
    vectors = torch.randn(len(size), *size)
    flipped = ras_to_lps(vectors)
    assert torch.equal(flipped[:2], -vectors[:2])
    assert torch.equal(flipped[2:], vectors[2:])
    assert torch.equal(ras_to_lps(flipped), vectors)


@pytest.mark.parametrize("size", SIZES)
def test_millimetres_are_the_way_between_world_points(size: tuple[int, ...]) -> None:
    affine, start = oblique_affine(len(size)), identity_grid(size)
    displacement = torch.randn(len(size), *size, dtype=torch.float64)
    expected = transform_points(affine, start + displacement) - transform_points(affine, start)
    torch.testing.assert_close(voxels_to_millimetres(displacement, affine), expected)


def test_millimetres_of_an_oblique_grid_by_hand() -> None:
    cosine, sine = math.cos(math.radians(30)), math.sin(math.radians(30))
    affine = torch.tensor([[2 * cosine, -3 * sine, 5.0], [2 * sine, 3 * cosine, -7.0], [0, 0, 1]])
    displacement = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)
    expected = torch.tensor([2 * cosine, 2 * sine]).reshape(2, 1, 1)
    torch.testing.assert_close(voxels_to_millimetres(displacement, affine), expected)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_shift_and_landing_are_where_the_transform_carries(size: tuple[int, ...], dense: bool) -> None:
    affine, to_other = oblique_affine(len(size)), affine_near_identity(len(size))
    d = len(size)
    of_file, motion = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    of_file[:d, :d], of_file[:d, 3] = affine[:d, :d], affine[:d, d]
    motion[:3] += 0.1 * torch.rand(3, 4)
    transform = DenseTransform(torch.randn(d, *size), of_file) if dense else motion
    world = grid_points(affine, size)
    carried = carry(transform, world)
    torch.testing.assert_close(world + shift(transform, world), carried)
    expected = transform_points(to_other, carried)
    torch.testing.assert_close(landing(affine, size, transform, to_other), expected)


@pytest.mark.parametrize("size", SIZES)
def test_world_box_holds_every_voxel_centre_tightly(size: tuple[int, ...]) -> None:
    affine = oblique_affine(len(size))
    world = transform_points(affine, identity_grid(size)).flatten(1)
    low, high = world_box(affine, size)
    torch.testing.assert_close(low, world.amin(1))
    torch.testing.assert_close(high, world.amax(1))


@pytest.mark.parametrize("size", [(7, 8, 9), (1, 5, 6), (6, 7)])
def test_a_field_is_sampled_as_an_image_is(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    field = torch.rand(len(size), *size)
    index = 12 * torch.rand(len(size), 4, 50) - 2  # some beyond the edges
    torch.testing.assert_close(sample_field(field, index), sample(field, index), rtol=0, atol=1e-4)
