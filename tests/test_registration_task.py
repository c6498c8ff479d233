"""The registration task: what a step does, what it earns, and when an episode ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from registration_pairs import (
    SIZES,
    blob,
    blocks,
    constant_action,
    monai_dice,
    no_policy,
    random_labels,
    random_pair,
    smooth_action,
)

from monai_rl_reg.geometry import compose, jacobian_determinant
from monai_rl_reg.metrics import local_ncc
from monai_rl_reg.similarity import LocalNCC
from monai_rl_reg.tasks.registration import RegistrationTask
from monai_rl_reg.tasks.task import State
from monai_rl_reg.warping import Warp


@pytest.mark.parametrize("size", SIZES)
def test_moved_image_looks_the_moving_one_up_at_x_plus_u(size: tuple[int, ...]) -> None:
    centre = [n // 2 for n in size]
    fixed, moving = blob(centre, size), blob([centre[0] + 3, *centre[1:]], size)
    task = RegistrationTask(len(size))
    state = task.reset(torch.cat([fixed, moving], dim=1))
    right = task.advance(state, constant_action(3, size))["moved"]
    wrong = task.advance(state, constant_action(-3, size))["moved"]
    # the last three rows look beyond the edge
    torch.testing.assert_close(right[:, :, :-3], fixed[:, :, :-3], rtol=0, atol=1e-5)
    assert (wrong - fixed).abs().max() > 0.9


@pytest.mark.parametrize("size", SIZES)
def test_displacement_is_the_composed_field(size: tuple[int, ...]) -> None:
    first, second = smooth_action(size, batch=2), smooth_action(size, batch=2)
    task = RegistrationTask(len(size))
    state = task.advance(task.advance(task.reset(random_pair(size)), first), second)
    expected = compose(first, second, Warp("bilinear", "border"))
    torch.testing.assert_close(task.output(state), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_moved_image_is_one_resampling_of_the_original(size: tuple[int, ...]) -> None:
    first, second = smooth_action(size, batch=2), smooth_action(size, batch=2)
    image = random_pair(size)
    warp = Warp("bilinear", "border")
    task = RegistrationTask(len(size))
    once = task.advance(task.reset(image), first)
    twice = task.advance(once, second)
    assert torch.equal(twice["moved"], warp(image[:, 1:], twice["displacement"]))
    assert not torch.allclose(twice["moved"], warp(once["moved"], second), atol=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_observation_is_fixed_beside_moved(size: tuple[int, ...]) -> None:
    image = random_pair(size)
    task = RegistrationTask(len(size))
    state = task.reset(image)
    assert torch.equal(task.observe(state), image)
    state = task.advance(state, smooth_action(size, batch=2))
    assert torch.equal(task.observe(state), torch.cat([image[:, :1], state["moved"]], dim=1))


@pytest.mark.parametrize("size", SIZES)
def test_reward_is_ten_times_the_gain_in_mean_dice(size: tuple[int, ...]) -> None:
    fixed, moving = blocks(size), blocks(size, shift=2)
    task = RegistrationTask(len(size))
    state = task.reset(random_pair(size, batch=1), torch.cat([fixed, moving], dim=1))
    for step, shift in ((1, 1), (1, 2), (-1, 1)):
        before = state
        state, reward, _ = task.step(state, constant_action(step, size))
        moved_before = task.warp_label(moving, before["displacement"])
        gain = monai_dice(blocks(size, shift=2 - shift), fixed) - monai_dice(moved_before, fixed)
        assert gain.item() != 0
        torch.testing.assert_close(reward, 10 * gain)


def test_reward_follows_its_scale() -> None:
    size = (16, 14)
    state = RegistrationTask(2).reset(random_pair(size), random_labels(size))
    action = smooth_action(size, batch=2)
    default = RegistrationTask(2).step(state, action)[1]
    torch.testing.assert_close(RegistrationTask(2, reward_scale=5).step(state, action)[1], default / 2)


@pytest.mark.parametrize(("labelled", "dice_reward"), [(False, True), (True, False)])
@pytest.mark.parametrize("size", SIZES)
def test_reward_without_labels_is_ten_times_the_gain_in_ncc(
    size: tuple[int, ...], labelled: bool, dice_reward: bool
) -> None:
    image = random_pair(size)
    task = RegistrationTask(len(size), similarity=LocalNCC(len(size), window=5), dice_reward=dice_reward)
    state = task.reset(image, random_labels(size) if labelled else None)
    after, reward, _ = task.step(state, smooth_action(size, batch=2, amplitude=0.2))
    assert (jacobian_determinant(after["displacement"]) > 0).all()
    gain = local_ncc(after["moved"], image[:, :1], 5) - local_ncc(image[:, 1:], image[:, :1], 5)
    torch.testing.assert_close(reward, 10 * gain)


def test_only_pairs_whose_fixed_image_lacks_labels_are_rewarded_by_ncc() -> None:
    size = (16, 14)
    image, label = random_pair(size), random_labels(size)
    label[1, 0] = 0
    action = smooth_action(size, batch=2, amplitude=0.2)
    reward = RegistrationTask(2).step(RegistrationTask(2).reset(image, label), action)[1]
    by_ncc = RegistrationTask(2, dice_reward=False)
    without_labels = by_ncc.step(by_ncc.reset(image, label), action)[1]
    torch.testing.assert_close(reward[1], without_labels[1])
    assert abs(reward[0] - without_labels[0]) > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_folds_cost_their_share(size: tuple[int, ...]) -> None:
    state = RegistrationTask(len(size)).reset(random_pair(size), random_labels(size))
    action = smooth_action(size, batch=2, amplitude=5)
    after, free, _ = RegistrationTask(len(size), fold_penalty=0).step(state, action)
    punished = RegistrationTask(len(size), fold_penalty=2).step(state, action)[1]
    share = (jacobian_determinant(after["displacement"]) <= 0).flatten(1).float().mean(1)
    assert (share > 0.01).all()
    torch.testing.assert_close(free - punished, 10 * 2 * share)


def test_rewards_of_an_episode_add_up_to_the_whole_gain() -> None:
    size = (16, 14)
    task = RegistrationTask(2)
    first = state = task.reset(random_pair(size), random_labels(size))
    total = torch.zeros(2)
    for _ in range(3):
        state, reward, _ = task.step(state, smooth_action(size, batch=2))
        total += reward
    at_once = task.step(first, state["displacement"])[1]
    torch.testing.assert_close(total, at_once)


def test_reward_of_a_step_is_its_own_after_an_unjudged_one() -> None:
    size = (16, 14)
    task = RegistrationTask(2)
    first, second, third = (smooth_action(size, batch=2) for _ in range(3))
    judged, _, _ = task.step(task.reset(random_pair(size), random_labels(size)), first)
    expected = task.step(task.step(judged, second)[0], third)[1]
    torch.testing.assert_close(task.step(task.advance(judged, second), third)[1], expected)


@pytest.mark.parametrize("size", SIZES)
def test_episode_terminates_only_at_success(size: tuple[int, ...]) -> None:
    label = torch.cat([blocks(size), blocks(size, shift=2)], dim=1).repeat(2, *[1] * (len(size) + 1))
    task = RegistrationTask(len(size))
    state = task.reset(random_pair(size), label)
    action = torch.cat([constant_action(2, size), constant_action(1, size)])
    terminated = task.step(state, action)[2]
    assert terminated.dtype == torch.bool
    assert terminated.tolist() == [True, False]


def test_success_is_a_matter_of_the_threshold() -> None:
    size = (16, 14)
    label = torch.cat([blocks(size), blocks(size, shift=1)], dim=1)
    state = RegistrationTask(2).reset(random_pair(size, batch=1), label)
    dice = monai_dice(blocks(size, shift=1), blocks(size)).item()
    for success, expected in ((dice - 0.01, True), (dice + 0.01, False)):
        task = RegistrationTask(2, success=success)
        assert task.step(state, constant_action(0, size))[2].item() is expected


@pytest.mark.parametrize("options", [{}, {"dice_reward": False}])
def test_identical_images_without_dice_never_terminate(options: dict[str, Any]) -> None:
    size = (16, 14)
    image = random_pair(size)[:, :1].repeat(1, 2, 1, 1)
    task = RegistrationTask(2, **options)
    assert not task.step(task.reset(image), constant_action(0, size, batch=2))[2].any()


@pytest.mark.parametrize(
    ("spatial_dims", "shape"), [(2, (1, 1, 8, 8)), (2, (1, 3, 8, 8)), (2, (1, 2, 8, 8, 8)), (3, (1, 2, 8, 8))]
)
def test_image_of_another_shape_is_refused(spatial_dims: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected image \(fixed, moving\) of shape \(B, 2, X, Y"):
        RegistrationTask(spatial_dims).reset(torch.rand(shape))


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_observe_and_loss_read_only_what_the_replay_stores(size: tuple[int, ...], dice_weight: float) -> None:
    task = RegistrationTask(len(size), dice_weight=dice_weight)
    action = smooth_action(size, batch=2)
    state, _, _ = task.step(task.reset(random_pair(size), random_labels(size)), action)
    stored = {key: state[key] for key in task.replay_keys}
    assert torch.equal(task.observe(stored), task.observe(state))
    torch.testing.assert_close(task.loss(stored, action, no_policy), task.loss(state, action, no_policy))


def copied(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("size", SIZES)
def test_untouched_entries_are_handed_on_as_the_same_objects(size: tuple[int, ...]) -> None:
    task = RegistrationTask(len(size))
    state = task.reset(random_pair(size), random_labels(size))
    untouched = {"fixed", "moving", "fixed_label", "moving_label"}
    after, _, _ = task.step(state, smooth_action(size, batch=2))
    for later in (after, task.advance(after, smooth_action(size, batch=2))):
        assert {key for key in later if key in state and later[key] is state[key]} == untouched


@pytest.mark.parametrize("size", SIZES)
def test_step_and_loss_leave_state_and_action_as_they_were(size: tuple[int, ...]) -> None:
    task = RegistrationTask(len(size), dice_weight=1.0)
    state, _, _ = task.step(task.reset(random_pair(size), random_labels(size)), smooth_action(size, batch=2))
    action = smooth_action(size, batch=2)
    before, action_before = copied(state), action.clone()
    task.step(state, action)
    task.loss(state, action, no_policy)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert torch.equal(action, action_before)


def test_same_step_from_the_same_state_gives_the_same_result() -> None:
    size = (16, 14)
    task = RegistrationTask(2)
    state = task.reset(random_pair(size), random_labels(size))
    action = smooth_action(size, batch=2)
    torch.testing.assert_close(task.step(state, action), task.step(state, action), rtol=0, atol=0)


def test_displacement_of_a_new_episode_is_zero() -> None:
    task = RegistrationTask(3)
    output = task.output(task.reset(random_pair((8, 9, 10))))
    assert output.shape == (2, 3, 8, 9, 10)
    assert not output.any()
