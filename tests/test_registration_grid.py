"""A displacement on a grid of half the images' resolution, and its folds."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks import Warp
from registration_pairs import (
    ODD_SIZES,
    SIZES,
    blob,
    blocks,
    constant_action,
    half,
    monai_dice,
    no_policy,
    random_pair,
    smooth_action,
)

from monai_rl_reg.geometry import compose, identity_grid
from monai_rl_reg.inferer import StepwiseInferer
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.tasks.registration import RegistrationTask


@pytest.mark.parametrize("size", ODD_SIZES)
def test_one_voxel_of_a_half_grid_is_two_of_the_image(size: tuple[int, ...]) -> None:
    centre = [n // 2 for n in size]
    fixed, moving = blob(centre, size), blob([centre[0] + 2, *centre[1:]], size)
    task = RegistrationTask(len(size), field_stride=2)
    state = task.advance(task.reset(torch.cat([fixed, moving], dim=1)), constant_action(1, half(size)))
    torch.testing.assert_close(task.output(state), constant_action(2, size))
    # the last two rows look beyond the edge
    torch.testing.assert_close(state["moved"][:, :, :-2], fixed[:, :, :-2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("field_stride", [1, 2])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_output_has_the_size_of_the_image(size: tuple[int, ...], field_stride: int) -> None:
    task = RegistrationTask(len(size), field_stride=field_stride)
    policy = PlannerActor(len(size), 2, len(size), channels=(8, 8), plan_channels=3, action_stride=field_stride)
    assert StepwiseInferer(task, 2)(random_pair(size), policy).shape == (2, len(size), *size)
    grid = half(size) if field_stride == 2 else list(size)
    assert list(task.reset(random_pair(size))["displacement"].shape) == [2, len(size), *grid]


@pytest.mark.parametrize("size", ODD_SIZES)
def test_upsampled_field_keeps_the_place_of_what_it_moves(size: tuple[int, ...]) -> None:
    """A field that grows linearly along an axis is the same function of the place on both grids."""
    task = RegistrationTask(len(size), field_stride=2)
    state = task.reset(random_pair(size, batch=1))
    centres = 2 * identity_grid(half(size)).float() + 0.5  # of the half grid's voxels, in voxels of the images
    full = task.output(state | {"displacement": 0.1 * centres[None] / 2})
    inside = (..., *(slice(1, n - 1) for n in size))
    torch.testing.assert_close(full[inside], 0.1 * identity_grid(size).float()[None][inside])


@pytest.mark.parametrize("size", ODD_SIZES)
def test_fields_compose_on_the_half_grid(size: tuple[int, ...]) -> None:
    task = RegistrationTask(len(size), field_stride=2)
    first, second = smooth_action(half(size), batch=2), smooth_action(half(size), batch=2)
    state = task.advance(task.advance(task.reset(random_pair(size)), first), second)
    torch.testing.assert_close(state["displacement"], compose(first, second, Warp("bilinear", "border")))


@pytest.mark.parametrize("size", SIZES)
def test_reward_of_a_half_grid_action_is_that_of_what_it_does_to_the_image(size: tuple[int, ...]) -> None:
    fixed, moving = blocks(size), blocks(size, shift=2)
    task = RegistrationTask(len(size), field_stride=2)
    state = task.reset(random_pair(size, batch=1), torch.cat([fixed, moving], dim=1))
    _, reward, terminated = task.step(state, constant_action(1, half(size)))
    torch.testing.assert_close(reward, 10 * (1 - monai_dice(moving, fixed)))
    assert terminated.all()


@pytest.mark.parametrize("size", SIZES)
def test_dice_term_tells_labels_half_a_voxel_of_the_field_apart(size: tuple[int, ...]) -> None:
    task = RegistrationTask(len(size), field_stride=2, dice_weight=2.0)
    label = torch.cat([blocks(size), blocks(size, shift=1)], dim=1)
    label = label * (label < 3)  # the third one comes near the edge, which the field repeats
    state = task.reset(random_pair(size, batch=1), label)
    apart, nearer, met = (
        task.loss(state, constant_action(shift, half(size)), no_policy)["dice"].item() for shift in (0, 0.25, 0.5)
    )
    assert met == pytest.approx(0, abs=1e-4)
    assert met < nearer < apart


@pytest.mark.parametrize("size", ODD_SIZES)
def test_fold_term_is_zero_for_a_smooth_field_and_positive_for_a_folded_one(size: tuple[int, ...]) -> None:
    task = RegistrationTask(len(size), field_stride=2, fold_weight=3.0)
    state = task.reset(random_pair(size, batch=1))
    smooth = smooth_action(half(size), amplitude=0.2)
    assert task.loss(state, smooth, no_policy)["folds"] == 0
    mirrored = torch.zeros_like(smooth)
    mirrored[:, 0] = (-2 * identity_grid(half(size))[0]).float()  # every determinant is -1
    mirrored.requires_grad_()
    folds = task.loss(state | {"displacement": torch.zeros_like(smooth)}, mirrored, no_policy)["folds"]
    torch.testing.assert_close(folds, torch.tensor(3 * 1.1))
    (gradient,) = torch.autograd.grad(folds, mirrored)
    assert gradient.abs().sum() > 0


def test_no_fold_term_without_its_weight() -> None:
    task = RegistrationTask(2)
    assert "folds" not in task.loss(task.reset(random_pair((8, 8))), constant_action(0, (8, 8), batch=2), no_policy)
