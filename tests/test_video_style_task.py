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
from monai_rl_reg.recurrent import RecurrentPlannerActor, fold, unfold
from monai_rl_reg.tasks.style import StyleTask
from monai_rl_reg.tasks.task import Act
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


def temporal(task: VideoStyleTask, act: Act, image: Tensor) -> float:
    """The temporal term of a policy's first step."""
    state = task.reset(image)
    return float(task.loss(state, act(task.observe(state)), act)["temporal"])


def with_memories(image: Tensor, memory: Tensor | None = None) -> Tensor:
    return torch.cat([image, torch.zeros_like(image[:, :2]) if memory is None else memory], 1)


def darken(observation: Tensor) -> Tensor:
    """A policy that does with every pixel the same, and linearly: it commutes with every warp."""
    return with_memories(0.2 * (0.5 - observation[:, 3:6]))


def flatten(observation: Tensor) -> Tensor:
    """A policy that makes everything one grey, whatever noise there is."""
    return with_memories(0.5 - observation[:, 3:6])


def shade(observation: Tensor) -> Tensor:
    """A policy that goes by the place in the picture, thus does not move with what is shown."""
    ramp = torch.linspace(-0.2, 0.2, observation.shape[3])
    return with_memories(ramp.expand_as(observation[:, :3]))


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
    terms = task.loss(task.reset(image), action, darken)
    expected = single.loss(single.reset(image), action[:, :3], darken)
    assert set(terms) == {*expected, "temporal"}
    torch.testing.assert_close({name: terms[name] for name in expected}, expected)


def test_temporal_loss_of_a_policy_that_moves_with_the_picture_is_zero_without_noise(features: FeatureNetwork) -> None:
    task = make_task(features, noise=0.0)
    assert temporal(task, darken, picture()) == pytest.approx(0, abs=1e-4)
    assert temporal(task, shade, picture()) > 0.01


def test_temporal_loss_without_flow_and_noise_is_zero_for_every_policy_without_frame_memory(
    features: FeatureNetwork,
) -> None:
    task = make_task(features, noise=0.0, flow=0.0)
    assert temporal(task, shade, picture()) == pytest.approx(0, abs=1e-4)


def test_temporal_loss_of_a_policy_is_what_it_leaves_of_the_noise(features: FeatureNetwork) -> None:
    task = make_task(features, noise=0.02, temporal_weight=5.0)
    mean = 0.02 * math.sqrt(2 / math.pi)
    assert temporal(task, flatten, picture()) == pytest.approx(0, abs=1e-4)
    assert temporal(task, darken, picture()) == pytest.approx(5 * 0.8 * mean, rel=0.05)
    assert temporal(task, lambda x: with_memories(0 * x[:, :3]), picture()) == pytest.approx(5 * mean, rel=0.05)


def test_next_frame_of_the_temporal_loss_is_the_moved_one_with_the_frame_memory_just_written(
    features: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(features, noise=0.0)
    flow = task.random_flow(picture())
    monkeypatch.setattr(task, "random_flow", lambda image: flow)
    state = task.advance(task.reset(picture()), 0.1 * torch.rand(2, 5, *SIZE))
    action = 0.1 * torch.rand(2, 5, *SIZE)
    seen: list[Tensor] = []

    def act(observation: Tensor) -> Tensor:
        seen.append(observation)
        return darken(observation)

    task.loss(state, action, act)
    warp = Warp("bilinear", "border")
    (observation,) = seen
    torch.testing.assert_close(observation[:, :3], warp(state["content"], flow))
    torch.testing.assert_close(observation[:, 3:6], warp(state["stylised"], flow))
    assert torch.equal(observation[:, 7:], action[:, 4:])
    assert not torch.equal(observation[:, 6:7], state["step_memory"])


def test_step_memory_moves_with_the_picture(features: FeatureNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a flow of 8 pixels, which are 2 of the memory's."""
    task = make_task(features, noise=0.0)
    flow = torch.zeros(2, 2, *SIZE)
    flow[:, 1] = 8
    monkeypatch.setattr(task, "random_flow", lambda image: flow)
    state = task.advance(task.reset(picture()), 0.1 * torch.rand(2, 5, *SIZE))
    seen: list[Tensor] = []

    def act(observation: Tensor) -> Tensor:
        seen.append(observation)
        return darken(observation)

    task.loss(state, torch.zeros(2, 5, *SIZE), act)
    memory = unfold(state["step_memory"])
    moved = torch.cat([memory[..., 2:], memory[..., -1:], memory[..., -1:]], -1)
    torch.testing.assert_close(seen[0][:, 6:7], fold(moved), rtol=1e-4, atol=1e-5)


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
