from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradients import drop_entropy, make_blind, make_transition, parts_moved_by, plan_head_moved_by
from monai.networks.blocks import Warp
from torch import Tensor, nn

from monai_rl_reg.features import FeatureNetwork
from monai_rl_reg.losses import SoftActorCriticLoss
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.recurrent import RecurrentPlannerActor
from monai_rl_reg.tasks.style import StyleTask
from monai_rl_reg.tasks.task import Act, State
from monai_rl_reg.tasks.video_style import VideoStyleTask

models = pytest.importorskip("torchvision.models")

PARTS = (
    *("policy.policy.planner", "policy.policy.actor", "policy.read", "policy.recall"),
    *("policy.step_memory", "policy.frame_memory", "critic", "log_temperature"),
)
POLICY = set(PARTS[:6])
REMEMBERING = POLICY - {"policy.policy.actor"}
SIZE = (40, 32)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureNetwork:
    """A feature network with random weights from a file: no download."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "squeezenet.pt"
    torch.save(models.squeezenet1_0(weights=None).state_dict(), file)
    return FeatureNetwork("squeezenet1_0", weights=str(file))


def make_task(features: FeatureNetwork, **options: Any) -> VideoStyleTask:
    return VideoStyleTask(features, torch.rand(3, 40, 40), **options)


def make_loss(features: FeatureNetwork, **options: Any) -> SoftActorCriticLoss:
    inner = PlannerActor(
        2, 10, 3, channels=(8, 16), plan_channels=1, plan_grid=(4, 4), action_bound=0.3, action_stride=1
    )
    nn.init.normal_(inner.actor.head.conv.weight, std=0.1)
    policy, critic = RecurrentPlannerActor(inner, 6), TwinCritic(2, (8, 16), 1)
    return SoftActorCriticLoss(policy, critic, make_task(features), **options)  # type: ignore[arg-type]


def terms_of(loss: SoftActorCriticLoss) -> dict[str, Tensor]:
    return loss(make_transition(loss, torch.rand(2, 3, *SIZE)))[0]


def picture(batch: int = 2) -> Tensor:
    """A picture that no small action carries out of its range."""
    return 0.3 + 0.4 * torch.rand(batch, 3, *SIZE)


def with_memories(image: Tensor, memory: Tensor | None = None) -> Tensor:
    return torch.cat([image, torch.zeros_like(image[:, :2]) if memory is None else memory], 1)


def darken(observation: Tensor) -> Tensor:
    """A policy that does with every pixel the same, and linearly: it commutes with every warp."""
    return with_memories(0.2 * (0.5 - observation[:, 3:6]))


def stay(observation: Tensor) -> Tensor:
    """A policy that changes nothing."""
    return with_memories(0 * observation[:, :3])


def test_first_state_has_empty_memories() -> None:
    image = torch.rand(2, 3, *SIZE)
    task = VideoStyleTask()
    observation = task.observe(task.reset(image))
    assert observation.shape == (2, 8, *SIZE)
    assert torch.equal(observation[:, :6], torch.cat([image, image], 1))
    assert not observation[:, 6:].any()


@pytest.mark.parametrize("shape", [(3, 40, 32), (2, 1, 40, 32), (2, 3, 40, 30), (2, 3, 39, 32)])
def test_reset_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected (images of shape|sizes that are multiples of 4)"):
        VideoStyleTask().reset(torch.rand(shape))


def test_memories_are_what_the_action_wrote_until_the_next_reset() -> None:
    task = VideoStyleTask()
    state, action = task.reset(picture()), 0.1 * torch.rand(2, 5, *SIZE)
    after = task.advance(state, action)
    assert torch.equal(task.observe(after)[:, 6:], action[:, 3:])
    torch.testing.assert_close(task.output(after), state["stylised"] + action[:, :3])
    assert not task.observe(task.reset(picture()))[:, 6:].any()


def test_a_frame_starts_from_what_the_one_before_has_left() -> None:
    content, start, memory = picture(), picture(), torch.rand(2, 1, *SIZE)
    task = VideoStyleTask()
    state = task.reset(content, start=start, frame_memory=memory)
    assert torch.equal(task.observe(state), torch.cat([content, start, torch.zeros_like(memory), memory], 1))
    assert torch.equal(task.output(state), start)


def test_step_is_pure_and_hands_untouched_entries_back(features: FeatureNetwork) -> None:
    task = make_task(features)
    state, action = task.reset(torch.rand(2, 3, *SIZE)), torch.rand(2, 5, *SIZE) - 0.5
    before = {key: value.clone() for key, value in state.items()}
    stepped, advanced = task.step(state, action)[0], task.advance(state, action)
    assert set(task.replay_keys) == set(state) == set(before)
    for key in state:
        assert torch.equal(state[key], before[key]), key
        assert torch.equal(stepped[key], advanced[key]), key
    assert stepped["content"] is state["content"]


def test_reward_and_style_are_those_of_pictures(features: FeatureNetwork) -> None:
    task = make_task(features)
    single = StyleTask(features)
    single.levels = task.levels
    for name, gram in task.named_buffers():
        if name.startswith("gram"):
            single.register_buffer(name, gram)
    image, action = torch.rand(2, 3, *SIZE), torch.rand(2, 5, *SIZE) - 0.5
    _, reward, terminated = task.step(task.reset(image), action)
    torch.testing.assert_close(reward, single.step(single.reset(image), action[:, :3])[1])
    assert terminated.tolist() == [False, False]


def next_frames(
    task: VideoStyleTask, act: Act, monkeypatch: pytest.MonkeyPatch, flow: Tensor
) -> tuple[dict[str, Tensor], State, Tensor]:
    """The loss of a step with this flow to the next frame, the state after it, and what the policy saw there."""
    monkeypatch.setattr(task, "random_flow", lambda image: flow)
    state = task.advance(task.reset(picture()), 0.1 * torch.rand(2, 5, *SIZE))
    action = 0.1 * torch.rand(2, 5, *SIZE)
    seen: list[Tensor] = []

    def watched(observation: Tensor) -> Tensor:
        seen.append(observation)
        return act(observation)

    terms = task.loss(state, action, watched)
    (observation,) = seen
    return terms, task.advance(state, action), observation


def test_next_frame_starts_with_what_this_one_was_changed_by_and_the_frame_memory_just_written(
    features: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(features, noise=0.05)
    flow = task.random_flow(picture())
    _, after, observation = next_frames(task, stay, monkeypatch, flow)
    warp = Warp("bicubic", "border")
    noise = observation[:, :3] - warp(after["content"], flow)
    assert float(noise.std()) == pytest.approx(0.05, rel=0.05)
    expected = observation[:, :3] + warp(after["stylised"] - after["content"], flow)
    torch.testing.assert_close(observation[:, 3:6], expected, rtol=1e-4, atol=1e-5)
    assert not observation[:, 6:7].any()
    assert torch.equal(observation[:, 7:], after["frame_memory"])


def test_temporal_loss_is_what_differs_beyond_the_flow(
    features: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = VideoStyleTask(flow=2.0).random_flow(picture())
    task = make_task(features, temporal_weight=5.0, noise=0.0)
    assert float(next_frames(task, stay, monkeypatch, flow)[0]["temporal"]) == pytest.approx(0, abs=1e-4)
    terms, after, _ = next_frames(task, darken, monkeypatch, flow)
    expected = 5 * (0.2 * (0.5 - Warp("bicubic", "border")(after["stylised"], flow))).abs().mean()
    torch.testing.assert_close(terms["temporal"], expected, rtol=1e-3, atol=1e-5)
    task = make_task(features, temporal_weight=5.0, noise=0.02)
    noisy = next_frames(task, stay, monkeypatch, flow)[0]["temporal"]
    assert float(noisy) == pytest.approx(5 * 0.02 * math.sqrt(2 / math.pi), rel=0.05), "what a step leaves of the noise"


def test_terms_of_pictures_are_the_means_over_both_frames(
    features: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(features, noise=0.0)
    still = torch.zeros(2, 2, *SIZE)
    terms, after, _ = next_frames(task, stay, monkeypatch, still)
    here = task.losses(after)
    assert set(terms) == {*here, "temporal"}
    for name, value in here.items():  # the same frame twice
        torch.testing.assert_close(terms[name], value, rtol=1e-3, atol=1e-5)
    terms, after, observation = next_frames(task, darken, monkeypatch, still)
    changed = task.advance(after, darken(observation))
    for name, value in task.losses(after).items():
        torch.testing.assert_close(terms[name], (value + task.losses(changed)[name]) / 2, rtol=1e-3, atol=1e-5)


def test_random_flow_is_smooth_and_of_the_size_asked_for() -> None:
    flow = VideoStyleTask(flow=3.0).random_flow(torch.zeros(64, 3, 64, 48))
    assert flow.shape == (64, 2, 64, 48)
    assert float(flow.std()) == pytest.approx(3, rel=0.2)
    assert float(flow.mean()) == pytest.approx(0, abs=0.3)
    assert float(flow.diff(dim=2).abs().mean()) < 0.2
    assert not torch.equal(flow[0], flow[1])
    assert not VideoStyleTask(flow=0.0).random_flow(torch.zeros(1, 3, 16, 16)).any()


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("critic", {"critic"}),
        ("planner", REMEMBERING),
        ("temperature", {"log_temperature"}),
        ("content", POLICY),
        ("style", POLICY),
        ("variation", POLICY),
        ("temporal", POLICY),
    ],
)
def test_term_moves_only_its_own_parts(term: str, parts: set[str], features: FeatureNetwork) -> None:
    loss = make_loss(features)
    assert parts_moved_by(terms_of(loss)[term], loss, PARTS) == parts


def test_temporal_loss_teaches_what_to_write_into_the_frame_memory(features: FeatureNetwork) -> None:
    task = make_task(features)
    state = task.reset(picture())
    action = torch.zeros(2, 5, *SIZE, requires_grad=True)

    def recall(observation: Tensor) -> Tensor:
        return with_memories(0.1 * (1 + observation[:, 7:]) * observation[:, 3:6])

    (gradient,) = torch.autograd.grad(task.loss(state, action, recall)["temporal"], [action])
    assert gradient[:, :3].any()
    assert not gradient[:, 3].any()
    assert gradient[:, 4].any()


def test_value_reaches_mean_and_spread_of_the_plan(features: FeatureNetwork) -> None:
    loss = make_loss(features)
    drop_entropy(loss)
    assert plan_head_moved_by(terms_of(loss)["planner"], loss) == [True, True]
    make_blind(loss)
    assert plan_head_moved_by(terms_of(loss)["planner"], loss) == [False, False]


@pytest.mark.parametrize("term", ["content", "style", "variation", "temporal"])
def test_task_loss_reaches_mean_and_spread_of_the_plan(term: str, features: FeatureNetwork) -> None:
    loss = make_loss(features)
    assert plan_head_moved_by(terms_of(loss)[term], loss) == [True, True]
