from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import drop_entropy, make_blind, make_transition, parts_moved_by, plan_head_moved_by
from monai.metrics import PSNRMetric
from torch import Tensor, nn

from monai_rl_reg.losses import SoftActorCriticLoss
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.tasks.inpainting import InpaintingTask
from monai_rl_reg.tasks.task import State
from monai_rl_reg.tasks.translation import GREY, SpectralDiscriminator, TranslationTask

PARTS = ("policy.planner", "policy.actor", "critic", "log_temperature", "task.discriminator")
KINDS = pytest.mark.parametrize("kind", [TranslationTask, InpaintingTask])


def start(task: TranslationTask) -> State:
    image, label = torch.rand(2, 2, 3, 12, 16)
    return task.reset(image, label)


def make_loss(kind: type[TranslationTask], **options: Any) -> SoftActorCriticLoss:
    channels = 6 if kind is TranslationTask else 3
    policy = PlannerActor(2, channels, 3, channels=(8, 16), plan_channels=4, action_stride=1)
    nn.init.normal_(policy.actor.head.conv.weight, std=0.1)
    critic = TwinCritic(2, (8, 16), 4)
    discriminator = SpectralDiscriminator(channels=4)
    task = kind(adversarial_weight=0.1, discriminator=discriminator)
    return SoftActorCriticLoss(policy, critic, task, **options)


def terms_of(loss: SoftActorCriticLoss) -> dict[str, Tensor]:
    image, label = torch.rand(2, 2, 3, 24, 32)
    return loss(make_transition(loss, image, label))[0]


class Mean(nn.Module):
    """A discriminator that gives its mean, times a parameter of one."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x.new_zeros(1), self.factor * x.mean((1, 2, 3), keepdim=True)]


def test_first_state_of_photo_translation_is_grey_beside_the_source() -> None:
    image, label = torch.rand(2, 4, 12, 16), torch.rand(2, 3, 12, 16)
    task = TranslationTask()
    state = task.reset(image, label)
    assert torch.equal(state["source"], image)
    assert torch.equal(state["target"], label)
    assert state["prediction"].shape == (2, 3, 12, 16)
    assert (state["prediction"] == GREY).all()
    assert torch.equal(task.observe(state), torch.cat([image, state["prediction"]], 1))


def test_a_grey_source_gives_a_coloured_prediction() -> None:
    task = TranslationTask()
    state = task.reset(torch.rand(2, 1, 16, 16))
    assert state["prediction"].shape == (2, 3, 16, 16)
    assert task.observe(state).shape == (2, 4, 16, 16)


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


@KINDS
def test_step_is_pure_and_hands_untouched_entries_back(kind: type[TranslationTask]) -> None:
    task = kind()
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


@KINDS
def test_reward_is_the_gain_in_psnr_where_the_image_is_made(kind: type[TranslationTask]) -> None:
    task = kind(reward_scale=0.5)
    state = start(task)
    after, reward, _ = task.step(state, 0.4 * (state["target"] - state["prediction"]))
    metric = PSNRMetric(max_val=1.0)
    gain = [metric(task.region(s["prediction"]), task.region(s["target"])).squeeze(1) for s in (state, after)]
    torch.testing.assert_close(reward, 0.5 * (gain[1] - gain[0]), rtol=1e-4, atol=1e-4)
    assert (reward > 0).all()


def test_episodes_end_one_by_one_above_the_success() -> None:
    task = TranslationTask(success=25.0)
    state = task.reset(torch.zeros(3, 3, 12, 16), torch.full((3, 3, 12, 16), 0.7))
    errors = torch.tensor([0.10, 0.05, 0.0])  # 20 dB, 26 dB, no error at all
    _, reward, terminated = task.step(state, (0.2 - errors)[:, None, None, None].expand(3, 3, 12, 16))
    assert terminated.tolist() == [False, True, True]
    assert reward.isfinite().all()


@KINDS
def test_loss_is_the_weighted_distance_after_the_step_where_the_image_is_made(kind: type[TranslationTask]) -> None:
    task = kind(l1_weight=5.0)
    image = torch.full((2, 3, 12, 16), 0.9)
    state = task.reset(image, image)
    action = torch.full((2, 3, 12, 16), 0.1).requires_grad_()
    terms = task.loss(state, action, lambda observation: observation)
    assert set(terms) == {"l1"}
    assert float(terms["l1"]) == pytest.approx(5 * 0.3, rel=1e-4)
    (gradient,) = torch.autograd.grad(terms["l1"], [action])
    share = task.region(image).numel() / image.numel()
    assert float((gradient != 0).float().mean()) == pytest.approx(share)


def test_without_weight_no_discriminator_is_trained() -> None:
    task = TranslationTask(adversarial_weight=0.0, discriminator=Mean())
    assert not list(task.parameters())
    state = task.reset(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))
    assert set(task.loss(state, torch.zeros(2, 3, 8, 8), torch.zeros_like)) == {"l1"}


def test_adversarial_terms_are_those_of_least_squares() -> None:
    task = TranslationTask(adversarial_weight=0.5, discriminator=Mean())
    state = task.reset(torch.full((2, 3, 12, 16), 0.2), torch.full((2, 3, 12, 16), 0.8))
    terms = task.loss(state, torch.full((2, 3, 12, 16), 0.1), lambda observation: observation)
    made, real = (0.2 + 0.6) / 2, (0.2 + 0.8) / 2
    assert float(terms["adversarial"]) == pytest.approx(0.5 * (made - 1) ** 2, rel=1e-4)
    assert float(terms["discriminator"]) == pytest.approx(0.5 * (made**2 + (real - 1) ** 2), rel=1e-4)


@KINDS
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
def test_term_moves_only_its_own_parts(term: str, parts: set[str], kind: type[TranslationTask]) -> None:
    loss = make_loss(kind)
    assert parts_moved_by(terms_of(loss)[term], loss, PARTS) == parts


def test_one_backward_gives_the_discriminator_the_gradient_of_its_own_term() -> None:
    loss = make_loss(InpaintingTask)
    terms = terms_of(loss)
    parameters = list(loss.task.discriminator.parameters())
    alone = torch.autograd.grad(terms["discriminator"], parameters, retain_graph=True)
    torch.stack(list(terms.values())).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(alone))


@KINDS
def test_value_reaches_mean_and_spread_of_the_plan(kind: type[TranslationTask]) -> None:
    loss = make_loss(kind)
    drop_entropy(loss)
    assert plan_head_moved_by(terms_of(loss)["planner"], loss) == [True, True]
    make_blind(loss)
    assert plan_head_moved_by(terms_of(loss)["planner"], loss) == [False, False]


@pytest.mark.parametrize("term", ["l1", "adversarial"])
@KINDS
def test_task_loss_reaches_mean_and_spread_of_the_plan(kind: type[TranslationTask], term: str) -> None:
    loss = make_loss(kind)
    assert plan_head_moved_by(terms_of(loss)[term], loss) == [True, True]


def test_control_has_only_the_terms_of_the_task() -> None:
    loss = make_loss(InpaintingTask, reinforcement=False)
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
