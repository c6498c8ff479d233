"""The registration task's loss: its terms, their weights, and pairs that lack labels."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiffusionLoss
from monai.metrics import compute_dice
from registration_pairs import (
    SIZES,
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
from monai_rl_reg.inferer import StepwiseInferer
from monai_rl_reg.losses import BoxLocalNormalizedCrossCorrelationLoss
from monai_rl_reg.metrics import UNLABELLED, local_ncc
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.similarity import LocalNCC
from monai_rl_reg.tasks.registration import RegistrationTask


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
