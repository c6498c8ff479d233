from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import drop_entropy, make_blind, make_transition, parts_moved_by, plan_head_moved_by
from monai.metrics import PSNRMetric
from torch import Tensor, nn

from monai_rl_reg.losses import SoftActorCriticLoss
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.rollout import follow
from monai_rl_reg.tasks.task import State
from monai_rl_reg.tasks.translation import GREY, SpectralDiscriminator, TranslationTask

PARTS = ("policy.planner", "policy.actor", "critic", "log_temperature", "task.discriminator")
HOLE = (slice(None), slice(None), slice(3, 9), slice(4, 12))
"""Where a hole of one half lies in a picture of 12 x 16."""


def start(task: TranslationTask) -> State:
    image, label = torch.rand(2, 2, 3, 12, 16)
    return task.reset(image, None if task.hole else label)


def make_loss(hole: float | None, **options: Any) -> SoftActorCriticLoss:
    policy = PlannerActor(2, 6, 3, channels=(8, 16), plan_channels=4, action_stride=1)
    nn.init.normal_(policy.actor.head.conv.weight, std=0.1)
    critic = TwinCritic(2, 6, 4, channels=(8, 16))
    discriminator = SpectralDiscriminator(channels=4)
    task = TranslationTask(hole=hole, adversarial_weight=0.1, discriminator=discriminator)
    return SoftActorCriticLoss(policy, critic, task, **options)


def terms_of(loss: SoftActorCriticLoss) -> dict[str, Tensor]:
    image, label = torch.rand(2, 2, 3, 24, 32)
    return loss(make_transition(loss, image, None if loss.task.hole else label))[0]


class Mean(nn.Module):
    """A discriminator that gives its mean, times a parameter of one."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x.new_zeros(1), self.factor * x.mean((1, 2, 3), keepdim=True)]


def test_first_state_of_inpainting_is_the_image_with_a_grey_hole() -> None:
    image = torch.rand(2, 3, 12, 16)
    kept = image.clone()
    state = TranslationTask(hole=0.5).reset(image)
    outside = torch.ones_like(image, dtype=torch.bool)
    outside[HOLE] = False
    for key in ("source", "prediction"):
        assert torch.equal(state[key][outside], image[outside])
        assert (state[key][HOLE] == GREY).all()
    assert torch.equal(state["target"], kept)
    assert torch.equal(image, kept)


def test_hole_cannot_be_seen() -> None:
    task = TranslationTask(hole=0.5)
    first, second = torch.rand(2, 3, 12, 16), torch.rand(2, 3, 12, 16)
    other = first.clone()
    other[HOLE] = second[HOLE]
    assert torch.equal(task.observe(task.reset(first)), task.observe(task.reset(other)))


def test_first_state_of_photo_translation_is_grey_beside_the_source() -> None:
    image, label = torch.rand(2, 4, 12, 16), torch.rand(2, 3, 12, 16)
    task = TranslationTask()
    state = task.reset(image, label)
    assert torch.equal(state["source"], image)
    assert torch.equal(state["target"], label)
    assert state["prediction"].shape == (2, 3, 12, 16)
    assert (state["prediction"] == GREY).all()
    assert torch.equal(task.observe(state), torch.cat([image, state["prediction"]], 1))


def test_inference_needs_no_target() -> None:
    task = TranslationTask()
    state = task.reset(torch.rand(2, 3, 12, 16))
    assert "target" not in state
    output = task.output(task.advance(state, torch.full((2, 3, 12, 16), 0.25)))
    assert torch.equal(output, torch.full((2, 3, 12, 16), GREY + 0.25))


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        ((3, 12, 16), None, r"expected images of shape \(B, C, H, W\), got \(3, 12, 16\)"),
        ((1, 3, 4, 12, 16), None, "expected images of shape"),
        ((1, 3, 12, 16), (1, 3, 12, 12), r"expected a label of the image's size \(12, 16\), got \(1, 3, 12, 12\)"),
    ],
)
def test_reset_refuses(image: tuple[int, ...], label: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TranslationTask().reset(torch.rand(image), None if label is None else torch.rand(label))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("hole", [None, 0.5])
def test_step_is_pure_and_hands_untouched_entries_back(hole: float | None, mirror: bool) -> None:
    task = TranslationTask(hole=hole, mirror=mirror)
    state = start(task)
    before = {key: value.clone() for key, value in state.items()}
    action = torch.rand(2, 3, 12, 16) - 0.5
    stepped, advanced = task.step(state, action)[0], task.advance(state, action)
    assert stepped.keys() == advanced.keys() == state.keys()
    for key in state:
        assert torch.equal(state[key], before[key]), key
        assert torch.equal(stepped[key], advanced[key]), key
    for key in ("source", "target"):
        assert stepped[key] is state[key]
        assert advanced[key] is state[key]
    assert set(task.replay_keys) == set(state)


def test_action_is_added_and_stays_within_the_range_of_pictures() -> None:
    task = TranslationTask()
    state = start(task)
    action = 3 * torch.rand(2, 3, 12, 16) - 1.5
    after = task.output(task.advance(state, action))
    assert torch.equal(after, (state["prediction"] + action).clamp(0, 1))
    assert {after.min().item(), after.max().item()} == {0, 1}


def test_every_other_step_looks_at_and_acts_on_the_mirror_image() -> None:
    task, plain = TranslationTask(hole=0.5, mirror=True), TranslationTask(hole=0.5)
    state = start(task)
    policy = PlannerActor(2, 6, 3, channels=(8, 16), plan_channels=4, action_stride=1)
    nn.init.normal_(policy.actor.head.conv.weight, std=0.1)
    states = [state, *follow(policy, task, state, 3)]
    assert [s["mirrored"].tolist() for s in states] == [[False] * 2, [True] * 2, [False] * 2, [True] * 2]
    assert torch.equal(task.observe(states[1]), plain.observe(states[1]).flip(3))
    flipped = plain.reset(state["target"].flip(3)) | {"prediction": states[1]["prediction"].flip(3)}
    expected = next(follow(policy, plain, flipped, 1))["prediction"].flip(3)
    assert torch.equal(states[2]["prediction"], expected)
    assert not torch.allclose(states[2]["prediction"], next(follow(policy, plain, states[1], 1))["prediction"])


@pytest.mark.parametrize("mirror", [False, True])
def test_outside_of_the_hole_nothing_changes(mirror: bool) -> None:
    task = TranslationTask(hole=0.5, mirror=mirror)
    state = start(task)
    for _ in range(3):
        after = task.advance(state, 0.4 * torch.rand(2, 3, 12, 16) - 0.2)
        changed = after["prediction"] != state["prediction"]
        assert changed[HOLE].all()
        changed[HOLE] = False
        assert not changed.any()
        state = after


@pytest.mark.parametrize("hole", [None, 0.5])
def test_reward_is_the_gain_in_psnr_where_the_image_is_made(hole: float | None) -> None:
    task = TranslationTask(hole=hole, reward_scale=0.5)
    state = start(task)
    after, reward, _ = task.step(state, 0.4 * (state["target"] - state["prediction"]))
    where = (slice(None),) * 4 if hole is None else HOLE
    metric = PSNRMetric(max_val=1.0)
    gain = [metric(s["prediction"][where], s["target"][where]).squeeze(1) for s in (state, after)]
    torch.testing.assert_close(reward, 0.5 * (gain[1] - gain[0]), rtol=1e-4, atol=1e-4)
    assert (reward > 0).all()


def test_reward_by_hand() -> None:
    task = TranslationTask(hole=0.5)
    state = task.reset(torch.full((1, 3, 12, 16), 0.7))  # 13.98 dB away from grey
    reward = task.step(state, torch.full((1, 3, 12, 16), 0.1))[1]  # 20 dB
    assert float(reward) == pytest.approx(0.1 * (20 - 13.9794), rel=1e-4)


def test_episodes_end_one_by_one_above_the_success() -> None:
    task = TranslationTask(success=25.0)
    state = task.reset(torch.zeros(3, 3, 12, 16), torch.full((3, 3, 12, 16), 0.7))
    errors = torch.tensor([0.10, 0.05, 0.0])  # 20 dB, 26 dB, no error at all
    _, reward, terminated = task.step(state, (0.2 - errors)[:, None, None, None].expand(3, 3, 12, 16))
    assert terminated.tolist() == [False, True, True]
    assert reward.isfinite().all()


@pytest.mark.parametrize("hole", [None, 0.5])
def test_loss_is_the_weighted_distance_after_the_step_where_the_image_is_made(hole: float | None) -> None:
    task = TranslationTask(hole=hole, l1_weight=5.0)
    image = torch.full((2, 3, 12, 16), 0.9)
    state = task.reset(image, None if hole else image)
    action = torch.full((2, 3, 12, 16), 0.1).requires_grad_()
    terms = task.loss(state, action, lambda observation: observation)
    assert set(terms) == {"l1"}
    assert float(terms["l1"]) == pytest.approx(5 * 0.3, rel=1e-4)
    (gradient,) = torch.autograd.grad(terms["l1"], [action])
    share = 1 if hole is None else 6 * 8 / (12 * 16)
    assert float((gradient != 0).float().mean()) == pytest.approx(share)


def test_adversarial_terms_are_those_of_least_squares() -> None:
    task = TranslationTask(adversarial_weight=0.5, discriminator=Mean())
    state = task.reset(torch.full((2, 3, 12, 16), 0.2), torch.full((2, 3, 12, 16), 0.8))
    terms = task.loss(state, torch.full((2, 3, 12, 16), 0.1), lambda observation: observation)
    made, real = (0.2 + 0.6) / 2, (0.2 + 0.8) / 2
    assert float(terms["adversarial"]) == pytest.approx(0.5 * (made - 1) ** 2, rel=1e-4)
    assert float(terms["discriminator"]) == pytest.approx(0.5 * (made**2 + (real - 1) ** 2), rel=1e-4)


def test_discriminator_of_inpainting_judges_the_hole() -> None:
    seen: list[tuple[int, ...]] = []
    discriminator = Mean()
    discriminator.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    task = TranslationTask(hole=0.5, adversarial_weight=0.5, discriminator=discriminator)
    task.loss(start(task), torch.zeros(2, 3, 12, 16), lambda observation: observation)
    assert seen == [(2, 6, 6, 8)] * 3


@pytest.mark.parametrize("hole", [None, 0.5])
@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("critic", {"critic"}),
        ("planner", {"policy.planner"}),
        ("temperature", {"log_temperature"}),
        ("l1", {"policy.planner", "policy.actor"}),
        ("adversarial", {"policy.planner", "policy.actor"}),
        ("discriminator", {"task.discriminator"}),
    ],
)
def test_term_moves_only_its_own_parts(term: str, parts: set[str], hole: float | None) -> None:
    loss = make_loss(hole)
    assert parts_moved_by(terms_of(loss)[term], loss, PARTS) == parts


def test_one_backward_gives_the_discriminator_the_gradient_of_its_own_term() -> None:
    loss = make_loss(0.5)
    terms = terms_of(loss)
    parameters = list(loss.task.discriminator.parameters())
    alone = torch.autograd.grad(terms["discriminator"], parameters, retain_graph=True)
    torch.stack(list(terms.values())).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(alone))


@pytest.mark.parametrize("hole", [None, 0.5])
def test_value_reaches_mean_and_spread_of_the_plan(hole: float | None) -> None:
    loss = make_loss(hole)
    drop_entropy(loss)
    assert plan_head_moved_by(terms_of(loss)["planner"], loss) == [True, True]
    make_blind(loss)
    assert plan_head_moved_by(terms_of(loss)["planner"], loss) == [False, False]


@pytest.mark.parametrize("term", ["l1", "adversarial"])
@pytest.mark.parametrize("hole", [None, 0.5])
def test_task_loss_reaches_mean_and_spread_of_the_plan(hole: float | None, term: str) -> None:
    loss = make_loss(hole)
    assert plan_head_moved_by(terms_of(loss)[term], loss) == [True, True]


def test_control_has_only_the_terms_of_the_task() -> None:
    loss = make_loss(0.5, reinforcement=False)
    assert set(terms_of(loss)) == {"l1", "adversarial", "discriminator"}


def test_spectral_norm_of_every_convolution_becomes_one() -> None:
    discriminator = SpectralDiscriminator(channels=4)
    for _ in range(30):
        features = discriminator(torch.rand(2, 6, 32, 32))
    assert features[-1].shape[:2] == (2, 1)
    convolutions = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) >= 4
    for convolution in convolutions:
        largest = torch.linalg.matrix_norm(convolution.weight.detach().flatten(1), 2)
        assert float(largest) == pytest.approx(1, abs=0.05)
