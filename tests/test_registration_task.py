"""The registration task: what a step does, what it earns, and what the loss says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.losses import DiffusionLoss
from monai.metrics import compute_dice
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
from torch.nn import functional as F

from monai_rl_reg.anatomy import Anatomy
from monai_rl_reg.geometry import compose, jacobian_determinant
from monai_rl_reg.inferer import StepwiseInferer
from monai_rl_reg.losses import BoxLocalNormalizedCrossCorrelationLoss
from monai_rl_reg.metrics import UNLABELLED, local_ncc
from monai_rl_reg.networks import PlannerActor
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


@pytest.mark.parametrize(("dice_weight", "names"), [(0.0, {"ncc", "smoothness"}), (0.5, {"ncc", "smoothness", "dice"})])
@pytest.mark.parametrize("size", SIZES)
def test_loss_names_its_terms(size: tuple[int, ...], dice_weight: float, names: set[str]) -> None:
    task = RegistrationTask(len(size), dice_weight=dice_weight)
    terms = task.loss(task.reset(random_pair(size), random_labels(size)), smooth_action(size, batch=2), no_policy)
    assert set(terms) == names
    assert all(term.ndim == 0 for term in terms.values())


@pytest.mark.parametrize("size", SIZES)
def test_loss_terms_judge_the_state_after_the_step(size: tuple[int, ...]) -> None:
    task = RegistrationTask(len(size), similarity=LocalNCC(len(size), window=5), smoothness_weight=3.0)
    state = task.advance(task.reset(random_pair(size)), smooth_action(size, batch=2))
    action = smooth_action(size, batch=2)
    after = task.advance(state, action)
    terms = task.loss(state, action, no_policy)
    torch.testing.assert_close(terms["ncc"], -local_ncc(after["moved"], after["fixed"], 5).mean())
    torch.testing.assert_close(terms["smoothness"], 3 * DiffusionLoss()(after["displacement"]))


def test_constant_displacement_is_smooth() -> None:
    size = (16, 14)
    task = RegistrationTask(2)
    terms = task.loss(task.reset(random_pair(size, batch=1)), constant_action(2, size), no_policy)
    assert terms["smoothness"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_ncc_term_is_the_mean_over_its_scales(size: tuple[int, ...]) -> None:
    image = random_pair(size)
    pool = F.avg_pool3d if len(size) == 3 else F.avg_pool2d
    ncc = BoxLocalNormalizedCrossCorrelationLoss(len(size), 5)
    half = pool(image, 2)
    expected = (ncc(image[:, 1:], image[:, :1]) + ncc(half[:, 1:], half[:, :1])) / 2
    task = RegistrationTask(len(size), similarity=LocalNCC(len(size), window=5, scales=2))
    terms = task.loss(task.reset(image), constant_action(0, size, batch=2), no_policy)
    torch.testing.assert_close(terms["ncc"], expected)


@pytest.mark.parametrize("size", SIZES)
def test_dice_term_falls_to_zero_where_the_labels_meet(size: tuple[int, ...]) -> None:
    task = RegistrationTask(len(size), dice_weight=2.0)
    label = torch.cat([blocks(size), blocks(size, shift=2)], dim=1)
    state = task.reset(random_pair(size, batch=1), label)
    apart, nearer, met = (
        task.loss(state, constant_action(shift, size), no_policy)["dice"].item() for shift in (0, 1, 2)
    )
    assert met == pytest.approx(0, abs=1e-4)
    assert met < nearer < apart
    assert apart == pytest.approx(2 - 2 * monai_dice(blocks(size, shift=2), blocks(size)).item(), abs=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_nested_labels_count_the_higher_values_in(size: tuple[int, ...]) -> None:
    """A shift onto the fixed labels: no loss, and all that nested Dice can gain as the reward."""
    task = RegistrationTask(len(size), dice_weight=2.0, nested_labels=True, fold_penalty=0.0)
    core = blocks(size) * (blocks(size) != 3)
    fixed, moving = core, core.roll(1, 2)
    state = task.reset(random_pair(size, batch=1), torch.cat([fixed, moving], 1))
    shift = constant_action(1.0, size)
    torch.testing.assert_close(task.loss(state, shift, no_policy)["dice"], torch.tensor(0.0), atol=1e-4, rtol=0)
    masks = (torch.cat([label >= value for value in (1, 2)], dim=1) for label in (moving, fixed))
    gain = 1 - compute_dice(*masks).mean(1)
    torch.testing.assert_close(task.step(state, shift)[1], 10 * gain)


def test_ncc_term_follows_its_weight() -> None:
    state = RegistrationTask(2).reset(random_pair(SIZES[0]))
    action = smooth_action(SIZES[0], batch=2)
    whole, half, none = (
        RegistrationTask(2, similarity_weight=w).loss(state, action, no_policy) for w in (1.0, 0.5, 0.0)
    )
    torch.testing.assert_close(half["ncc"], whole["ncc"] / 2)
    assert set(none) == {"smoothness"}


def test_sharp_dice_counts_a_half_covered_pixel_as_covered() -> None:
    """A region of 4 x 4 moved by half a pixel covers 5 rows, two of them by half."""
    label = torch.zeros(1, 1, 12, 12)
    label[..., 4:8, 4:8] = 1
    losses = []
    for sharpness in (1.0, 2.0):
        task = RegistrationTask(2, dice_weight=1.0, dice_sharpness=sharpness)
        state = task.reset(random_pair((12, 12), batch=1), label.repeat(1, 2, 1, 1))
        losses.append(float(task.loss(state, constant_action(0.5, (12, 12)), no_policy)["dice"]))
    assert losses == pytest.approx([1 - 2 * 14 / 32, 1 - 2 * 16 / 36], abs=1e-4)


def test_label_weights_weigh_the_regions() -> None:
    """Two labels of which the second is matched: only the first one's weight counts."""
    fixed = torch.zeros(1, 1, 12, 12)
    fixed[..., 2:4, 2:4], fixed[..., 6:8, 6:8] = 1, 2
    moving = fixed * (fixed == 2)
    losses = {}
    for weights in ((1.0, 1.0), (3.0, 1.0)):
        task = RegistrationTask(2, dice_weight=1.0, label_weights=weights)
        state = task.reset(random_pair((12, 12), batch=1), torch.cat([fixed, moving], 1))
        losses[weights] = float(task.loss(state, constant_action(0.0, (12, 12)), no_policy)["dice"])
    assert losses[3.0, 1.0] == pytest.approx(3 * losses[1.0, 1.0], rel=1e-4)


def test_dice_term_of_fixed_images_without_labels_is_finite() -> None:
    size = (16, 14)
    label = random_labels(size)
    label[:, 0] = 0
    task = RegistrationTask(2, dice_weight=1.0)
    assert task.loss(task.reset(random_pair(size), label), constant_action(0, size, batch=2), no_policy)[
        "dice"
    ].isfinite()


@pytest.mark.parametrize("lacking", ["fixed", "moving"])
def test_pairs_without_both_labels_are_left_out_of_what_labels_tell(lacking: str) -> None:
    """A batch of a labelled pair and one that lacks a label: everything from labels is that of the first alone."""
    size = (16, 14)
    anatomy = Anatomy(2, 2, channels=(4, 8, 8))
    task = RegistrationTask(2, dice_weight=1.0, anatomy=anatomy)
    image, label = random_pair(size), torch.randint(0, 3, (2, 2, *size))
    label[1, ("fixed", "moving").index(lacking)] = UNLABELLED
    action = smooth_action(size, batch=2)
    both, alone = task.reset(image, label), task.reset(image[:1], label[:1])
    other = task.reset(image[1:])
    torch.testing.assert_close(
        task.loss(both, action, no_policy)["dice"], task.loss(alone, action[:1], no_policy)["dice"]
    )
    _, reward, terminated = task.step(both, action)
    torch.testing.assert_close(reward[:1], task.step(alone, action[:1])[1])
    unjudged = RegistrationTask(2)
    torch.testing.assert_close(reward[1:], unjudged.step(other, action[1:])[1])  # by NCC
    assert not terminated[1]
    have = [0, 1, 2] if lacking == "moving" else [0, 2, 3]  # of both fixed images, then both moving ones
    seen, known = (torch.cat(x.split(1, dim=1))[have] for x in (image, label))
    torch.testing.assert_close(task.own_loss(both)["anatomy"], anatomy.loss(seen, known))


def test_a_batch_without_any_label_teaches_nothing_about_them() -> None:
    task = RegistrationTask(2, dice_weight=1.0, anatomy=Anatomy(2, 2, channels=(4, 8, 8)))
    state = task.reset(random_pair((16, 14)), torch.full((2, 2, 16, 14), UNLABELLED))
    action = smooth_action((16, 14), batch=2).requires_grad_()
    terms = task.loss(state, action, no_policy) | task.own_loss(state)
    assert float(terms["dice"]) == float(terms["anatomy"]) == 0
    sum(terms.values()).backward()
    assert task.step(state, action.detach())[1].isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_every_term_has_a_gradient_by_the_action(size: tuple[int, ...]) -> None:
    task = RegistrationTask(len(size), dice_weight=1.0)
    action = smooth_action(size, batch=2).requires_grad_()
    terms = task.loss(task.reset(random_pair(size), random_labels(size)), action, no_policy)
    for term in terms.values():
        (gradient,) = torch.autograd.grad(term, action, retain_graph=True)
        assert (gradient.flatten(1) != 0).any(1).all()


def test_dice_term_needs_labels() -> None:
    size = (16, 14)
    task = RegistrationTask(2, dice_weight=1.0)
    with pytest.raises(ValueError, match="dice_weight 1: expected labels"):
        task.loss(task.reset(random_pair(size)), constant_action(0, size, batch=2), no_policy)


def test_inference_with_a_dice_term_in_training_needs_no_labels() -> None:
    task = RegistrationTask(2, dice_weight=1.0)
    policy = PlannerActor(2, 2, 2, channels=(8, 8), plan_channels=3)
    assert StepwiseInferer(task, 2)(random_pair((16, 14)), policy).shape == (2, 2, 16, 14)


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
