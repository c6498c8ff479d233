"""What a policy observes of a registration: structures seen in the images, and the pull of a guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from registration_pairs import (
    ODD_SIZES,
    constant_action,
    half,
    no_policy,
    random_labels,
    random_pair,
    smooth_action,
)

from monai_rl_reg.anatomy import Anatomy
from monai_rl_reg.errors import InputError
from monai_rl_reg.inferer import StepwiseInferer
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.similarity import LocalNCC
from monai_rl_reg.tasks.registration import RegistrationTask


def seeing_task(size: Sequence[int], **options: Any) -> RegistrationTask:
    """A task whose anatomy has three structures."""
    anatomy = Anatomy(len(size), 3, channels=(4, 8, 8)).eval()
    return RegistrationTask(len(size), anatomy=anatomy, **options)


@pytest.mark.parametrize("field_stride", [1, 2])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_what_is_seen_in_both_images_is_observed_beside_them(size: tuple[int, ...], field_stride: int) -> None:
    task = seeing_task(size, field_stride=field_stride)
    image = random_pair(size)
    observation = task.observe(task.reset(image))
    assert observation.shape == (2, 2 + 2 * 3, *size)
    assert torch.equal(observation[:, :2], image)
    assert task.anatomy is not None
    assert torch.equal(observation[:, 2:5], task.anatomy.see(image[:, :1]))
    assert torch.equal(observation[:, 5:], task.anatomy.see(image[:, 1:]))


@pytest.mark.parametrize("size", ODD_SIZES)
def test_what_is_seen_in_the_moving_image_moves_with_the_field(size: tuple[int, ...]) -> None:
    task = seeing_task(size, field_stride=2)
    state = task.reset(random_pair(size))
    before = task.observe(state)
    after = task.observe(task.advance(state, constant_action(0.5, half(size), batch=2)))  # one voxel of the images
    assert torch.equal(after[:, 2:5], before[:, 2:5])
    torch.testing.assert_close(after[:, 5:, :-1], before[:, 5:, 1:], rtol=0, atol=1e-4)
    assert (after[:, 5:, :-1] - before[:, 5:, :-1]).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["step", "loss"])
def test_anatomy_needs_labels_in_training(part: str) -> None:
    size = (16, 14)
    task = seeing_task(size)
    state, action = task.reset(random_pair(size)), constant_action(0, size, batch=2)
    with pytest.raises(InputError, match="anatomy: expected labels in training, found pairs without"):
        task.step(state, action) if part == "step" else task.own_loss(state)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_inference_with_an_anatomy_needs_no_labels(size: tuple[int, ...]) -> None:
    task = seeing_task(size, field_stride=2)
    policy = PlannerActor(len(size), 8, len(size), channels=(8, 8), plan_channels=3, action_stride=2)
    assert StepwiseInferer(task, 2)(random_pair(size), policy).shape == (2, len(size), *size)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_observe_and_loss_with_an_anatomy_read_only_what_the_replay_stores(size: tuple[int, ...]) -> None:
    task = seeing_task(size, field_stride=2, fold_weight=1.0)
    action = smooth_action(half(size), batch=2)
    state, _, _ = task.step(task.reset(random_pair(size), random_labels(size)), action)
    stored = {key: state[key] for key in task.replay_keys}
    assert torch.equal(task.observe(stored), task.observe(state))
    terms = task.loss(stored, action, no_policy) | task.own_loss(stored)
    assert set(terms) == {"ncc", "smoothness", "folds", "anatomy"}
    torch.testing.assert_close(terms, task.loss(state, action, no_policy) | task.own_loss(state))


@pytest.mark.parametrize("field_stride", [1, 2])
@pytest.mark.parametrize("size", [*ODD_SIZES, (4, 5)])
def test_the_pull_of_the_guide_is_observed_on_two_grids(size: tuple[int, ...], field_stride: int) -> None:
    dims = len(size)
    task = RegistrationTask(dims, guide=LocalNCC(dims), field_stride=field_stride)
    image = random_pair(size)
    state = task.reset(image)
    observation = task.observe(state)
    assert observation.shape == (2, 2 + 2 * dims, *size)
    assert torch.equal(observation[:, :2], image)
    fine, coarse = observation[:, 2 : 2 + dims], observation[:, 2 + dims :]
    assert fine.abs().amax() > 0
    if field_stride == 1:
        torch.testing.assert_close(fine, LocalNCC(dims).pull(image[:, 1:], image[:, :1]))
    for pull, stride in ((fine, field_stride), (coarse, 2 * field_stride)):
        block = pull[(..., *[slice(0, stride)] * dims)].flatten(2)
        assert torch.equal(block, block[..., :1].expand_as(block)), "one value a voxel of its grid"
    state["moved"] = state["fixed"]
    at_rest = task.observe(state)[:, 2:]
    assert at_rest.abs().amax() < 0.05 * fine.abs().amax(), "nothing pulls where the images agree"


def test_a_guide_comes_before_the_anatomy() -> None:
    size = (12, 9)
    task = seeing_task(size, field_stride=2, guide=LocalNCC(2))
    state = task.reset(random_pair(size))
    without = seeing_task(size, field_stride=2)
    without.anatomy = task.anatomy
    assert torch.equal(task.observe(state)[:, 6:], without.observe(state)[:, 2:])
