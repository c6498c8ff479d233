from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from monai.losses import DiffusionLoss
from monai.metrics import compute_dice
from monai.networks.blocks import Warp
from monai.networks.utils import one_hot
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.anatomy import Anatomy
from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import compose, identity_grid, jacobian_determinant
from monai_rl_reg.inferer import StepwiseInferer
from monai_rl_reg.losses import BoxLocalNormalizedCrossCorrelationLoss
from monai_rl_reg.metrics import UNLABELLED, local_ncc
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.similarity import LocalNCC
from monai_rl_reg.tasks.registration import RegistrationTask
from monai_rl_reg.tasks.task import State

SIZES = [(16, 14), (12, 10, 11)]
ODD_SIZES = [(15, 13), (16, 14), (13, 10, 11)]


def no_policy(observation: Tensor) -> Tensor:
    raise AssertionError("the registration loss looks at one step only")


def constant_action(shift: float, size: Sequence[int], *, batch: int = 1) -> Tensor:
    """A shift along the first axis."""
    action = torch.zeros(batch, len(size), *size)
    action[:, 0] = shift
    return action


def smooth_action(size: Sequence[int], *, batch: int = 1, amplitude: float = 1.0) -> Tensor:
    mode = "trilinear" if len(size) == 3 else "bilinear"
    coarse = amplitude * torch.randn(batch, len(size), *[4] * len(size))
    return F.interpolate(coarse, size=tuple(size), mode=mode, align_corners=True)


def blob(centre: Sequence[float], size: Sequence[int]) -> Tensor:
    offset = identity_grid(size) - torch.tensor(centre, dtype=torch.float64).reshape(-1, *[1] * len(size))
    return torch.exp(-offset.square().sum(0) / 4).float()[None, None]


def blocks(size: Sequence[int], shift: int = 0) -> Tensor:
    """Three labels of unequal size, shifted along the first axis."""
    label = torch.zeros(1, 1, *size)
    label[:, :, 2 + shift : 5 + shift, 2:6] = 1
    label[:, :, 6 + shift : 8 + shift, 1:8] = 2
    label[:, :, 5 + shift : 9 + shift, 8:] = 3
    return label


def random_pair(size: Sequence[int], *, batch: int = 2) -> Tensor:
    return torch.rand(batch, 2, *size)


def random_labels(size: Sequence[int], *, batch: int = 2) -> Tensor:
    return torch.randint(0, 4, (batch, 2, *size))


def monai_dice(moved: Tensor, fixed: Tensor) -> Tensor:
    return compute_dice(one_hot(moved, 4), one_hot(fixed, 4), include_background=False).nanmean(1)


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
    anatomy = Anatomy(2, 2, channels=(4, 8))
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
    task = RegistrationTask(2, dice_weight=1.0, anatomy=Anatomy(2, 2, channels=(4, 8)))
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


def half(size: Sequence[int]) -> list[int]:
    return [(n + 1) // 2 for n in size]


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
def test_dice_term_of_half_covered_voxels_falls_to_zero_where_the_labels_meet(size: tuple[int, ...]) -> None:
    task = RegistrationTask(len(size), field_stride=2, dice_weight=2.0)
    label = torch.cat([blocks(size), blocks(size, shift=2)], dim=1)
    label = label * (label < 3)  # the third one comes near the edge, which the field repeats
    state = task.reset(random_pair(size, batch=1), label)
    apart, nearer, met = (
        task.loss(state, constant_action(shift, half(size)), no_policy)["dice"].item() for shift in (0, 0.5, 1)
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


def seeing_task(size: Sequence[int], **options: Any) -> RegistrationTask:
    """A task whose anatomy has three structures."""
    anatomy = Anatomy(len(size), 3, channels=(4, 8)).eval()
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
    for seen, role in ((observation[:, 2:5], image[:, :1]), (observation[:, 5:], image[:, 1:])):
        whole = (..., *(slice(n // field_stride * field_stride) for n in size))  # an odd edge is of half a block
        pool = F.avg_pool3d if len(size) == 3 else F.avg_pool2d
        expected = pool(task.anatomy.see(role)[whole], field_stride)
        expected = F.interpolate(expected, scale_factor=field_stride, mode="nearest")
        torch.testing.assert_close(seen[whole], expected)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_what_is_seen_in_the_moving_image_moves_with_the_field(size: tuple[int, ...]) -> None:
    task = seeing_task(size, field_stride=2)
    state = task.reset(random_pair(size))
    before = task.observe(state)
    after = task.observe(task.advance(state, constant_action(1, half(size), batch=2)))
    assert torch.equal(after[:, 2:5], before[:, 2:5])
    torch.testing.assert_close(after[:, 5:, :-2], before[:, 5:, 2:], rtol=0, atol=1e-5)
    assert (after[:, 5:, :-2] - before[:, 5:, :-2]).abs().max() > 1e-3


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
