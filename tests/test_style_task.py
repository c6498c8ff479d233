from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import drop_entropy, make_blind, make_transition, parts_moved_by, plan_head_moved_by
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_rl_reg.errors import InputError
from monai_rl_reg.features import FeatureNetwork
from monai_rl_reg.losses import SoftActorCriticLoss
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.tasks.style import StyleTask, gram_matrix, load_style

models = pytest.importorskip("torchvision.models")

PARTS = ("policy.planner", "policy.actor", "critic", "log_temperature")
SIZE = (40, 32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a feature network in a file: no download."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "squeezenet.pt"
    torch.save(models.squeezenet1_0(weights=None).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def features(weights: Path) -> FeatureNetwork:
    return FeatureNetwork("squeezenet1_0", weights=str(weights))


@pytest.fixture
def style() -> Tensor:
    return torch.rand(3, 48, 40)


@pytest.fixture
def task(features: FeatureNetwork, style: Tensor) -> StyleTask:
    return StyleTask(features, style)


def make_loss(task: StyleTask, **options: Any) -> SoftActorCriticLoss:
    policy = PlannerActor(
        2, 6, 3, channels=(8, 16), plan_channels=1, plan_grid=(4, 4), action_bound=0.3, action_stride=1
    )
    nn.init.normal_(policy.actor.head.conv.weight, std=0.1)
    return SoftActorCriticLoss(policy, TwinCritic(2, (8, 16), 1), task, **options)


def terms_of(loss: SoftActorCriticLoss) -> dict[str, Tensor]:
    return loss(make_transition(loss, torch.rand(2, 3, *SIZE)))[0]


def test_first_state_is_the_content_image() -> None:
    image = torch.rand(2, 3, *SIZE)
    task = StyleTask()
    state = task.reset(image)
    assert torch.equal(task.output(state), image)
    assert torch.equal(task.observe(state), torch.cat([image, image], 1))


@pytest.mark.parametrize("shape", [(3, 40, 32), (2, 1, 40, 32), (2, 4, 40, 32), (1, 3, 4, 40, 32)])
def test_reset_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, H, W\), got"):
        StyleTask().reset(torch.rand(shape))


def test_inference_needs_no_feature_network() -> None:
    task = StyleTask()
    state = task.advance(task.reset(torch.full((1, 3, *SIZE), 0.5)), torch.full((1, 3, *SIZE), 0.2))
    torch.testing.assert_close(task.output(state), torch.full((1, 3, *SIZE), 0.7))


@pytest.mark.parametrize("judge", ["step", "loss"])
def test_judging_needs_a_feature_network_and_a_style(judge: str, features: FeatureNetwork) -> None:
    for task in (StyleTask(), StyleTask(features)):
        state, action = task.reset(torch.rand(1, 3, *SIZE)), torch.zeros(1, 3, *SIZE)
        with pytest.raises(ValueError, match="expected a feature network and a style image"):
            task.step(state, action) if judge == "step" else task.loss(state, action, lambda observation: observation)


def test_step_is_pure_and_hands_untouched_entries_back(task: StyleTask) -> None:
    state, action = task.reset(torch.rand(2, 3, *SIZE)), torch.rand(2, 3, *SIZE) - 0.5
    state = task.step(state, action)[0]
    keys, before = set(state), {key: value.clone() for key, value in state.items()}
    stepped, advanced = task.step(state, action)[0], task.advance(state, action)
    assert set(state) == keys
    for key in state:
        assert torch.equal(state[key], before[key]), key
    for key in task.replay_keys:
        assert torch.equal(stepped[key], advanced[key]), key
    assert stepped["content"] is state["content"]
    assert advanced["content"] is state["content"]
    assert torch.equal(advanced["stylised"], (state["stylised"] + action).clamp(0, 1))


def test_reward_is_the_fall_of_the_log_style_loss(features: FeatureNetwork, style: Tensor) -> None:
    task = StyleTask(features, style, reward_scale=2.0)
    state = task.reset(torch.rand(2, 3, *SIZE))
    after, reward, terminated = task.step(state, 0.5 * torch.rand(2, 3, *SIZE) - 0.25)
    losses = []
    for image in (state["stylised"], after["stylised"]):
        grams = [(gram_matrix(x), gram_matrix(y)) for x, y in zip(features(image), features(style[None]), strict=True)]
        relative = [(x - y).square().sum((1, 2)) / y.square().sum() for x, y in grams]
        losses.append(torch.stack(relative).mean(0))
    torch.testing.assert_close(reward, 2 * (losses[0].log() - losses[1].log()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(task.style_loss(after), losses[1], rtol=1e-3, atol=1e-6)
    assert terminated.tolist() == [False, False]


def test_rewards_add_up_along_an_episode(task: StyleTask) -> None:
    first = state = task.reset(torch.rand(2, 3, *SIZE))
    total = torch.zeros(2)
    for _ in range(3):
        state, reward, _ = task.step(state, 0.4 * torch.rand(2, 3, *SIZE) - 0.2)
        total += reward
    torch.testing.assert_close(total, (task.style_loss(first) / task.style_loss(state)).log(), rtol=1e-4, atol=1e-5)


def test_style_loss_that_a_step_left_is_not_that_of_a_later_state(task: StyleTask) -> None:
    action = 0.4 * torch.rand(2, 3, *SIZE) - 0.2
    stepped = task.step(task.reset(torch.rand(2, 3, *SIZE)), action)[0]
    advanced = task.advance(stepped, action)
    without = {key: advanced[key] for key in task.replay_keys}
    torch.testing.assert_close(task.step(advanced, action)[1], task.step(without, action)[1])


def test_an_image_has_no_distance_to_itself(features: FeatureNetwork) -> None:
    image = torch.rand(2, 3, *SIZE)
    task = StyleTask(features, image[1])
    state = task.reset(image)
    torch.testing.assert_close(task.content_loss(state), torch.zeros(2))
    assert float(task.style_loss(state)[0]) > 0.01
    assert float(task.style_loss(state)[1]) == pytest.approx(0, abs=1e-6)
    assert (task.content_loss(task.advance(state, torch.rand(2, 3, *SIZE) - 0.5)) > 0.001).all()


def test_gram_matrix_by_hand() -> None:
    features = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])[None]
    assert gram_matrix(features).tolist() == [[[5 / 2, 1 / 2], [1 / 2, 10 / 2]]]
    assert gram_matrix(features.half()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.float16):  # a sum over all pixels is past what fp16 holds
        assert gram_matrix(torch.full((1, 1, 256, 256), 2.0)).item() == 4


def test_gram_matrix_does_not_know_places_or_size() -> None:
    features = torch.rand(1, 4, 5, 6)
    shuffled = features.flatten(2)[:, :, torch.randperm(30)].reshape(1, 4, 3, 10)
    torch.testing.assert_close(gram_matrix(shuffled), gram_matrix(features))
    torch.testing.assert_close(gram_matrix(torch.cat([features, features], 2)), gram_matrix(features))


def test_loss_is_that_of_the_state_after_the_step(task: StyleTask) -> None:
    state, action = task.reset(torch.rand(2, 3, *SIZE)), 0.4 * torch.rand(2, 3, *SIZE) - 0.2
    terms = task.loss(state, action, lambda observation: observation)
    after = task.advance(state, action)
    assert set(terms) == {"content", "style", "variation"}
    torch.testing.assert_close(terms["content"], task.content_weight * task.content_loss(after).mean())
    torch.testing.assert_close(terms["style"], task.style_weight * task.style_loss(after).mean())


@pytest.mark.parametrize("name", ["content", "style", "variation"])
def test_weight_scales_its_own_term(name: str, features: FeatureNetwork, style: Tensor) -> None:
    weights: dict[str, Any] = dict.fromkeys(["content_weight", "style_weight", "variation_weight"], 1.0)
    state, action = StyleTask().reset(torch.rand(2, 3, *SIZE)), torch.rand(2, 3, *SIZE) - 0.5
    plain, scaled = (
        StyleTask(features, style, **chosen).loss(state, action, lambda observation: observation)
        for chosen in (weights, weights | {f"{name}_weight": 3.0})
    )
    for key, value in plain.items():
        torch.testing.assert_close(scaled[key], (3 if key == name else 1) * value)


def test_variation_is_the_mean_difference_of_neighbours(features: FeatureNetwork, style: Tensor) -> None:
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    ramp = (0.02 * rows + 0.005 * columns).expand(1, 3, *SIZE)
    task = StyleTask(features, style, variation_weight=2.0)
    assert float(task.losses(task.reset(ramp))["variation"]) == pytest.approx(2 * (0.02 + 0.005), rel=1e-4)


def test_checkpoint_holds_the_style_but_not_the_feature_network(
    task: StyleTask, features: FeatureNetwork, style: Tensor
) -> None:
    assert set(task.state_dict()) == {*(f"gram_{level}" for level in range(4)), "_extra_state"}
    assert list(task.parameters()) == []
    other = StyleTask(features, torch.rand(3, 48, 40))
    other.load_state_dict(task.state_dict())
    assert other.style is not None
    assert torch.equal(other.style, style)
    state = task.reset(torch.rand(1, 3, *SIZE))
    assert torch.equal(other.style_loss(state), task.style_loss(state))


def test_checkpoint_of_a_style_with_meta_data_is_of_plain_tensors(features: FeatureNetwork, style: Tensor) -> None:
    """MONAI's transforms give tensors that ``torch.load`` refuses to read again."""
    state = StyleTask(features, MetaTensor(style)).state_dict()
    extra = state.pop("_extra_state")
    assert {type(value) for value in state.values()} == {type(extra["style"])} == {Tensor}
    assert all(torch.equal(value, StyleTask(features, style).state_dict()[key]) for key, value in state.items())


def saved(task: StyleTask, tmp_path: Path) -> str:
    path = tmp_path / "model.pt"
    torch.save({"network": {}, "task": task.state_dict()}, path)
    return str(path)


def test_loaded_task_judges_and_guides_as_in_training(
    features: FeatureNetwork, weights: Path, style: Tensor, tmp_path: Path
) -> None:
    settings = {"content_layer": 2, "content_weight": 1.3, "style_weight": 2.0, "variation_weight": 0.1}
    task = StyleTask(features, style, guided=True, **settings)
    again = load_style(StyleTask(), saved(task, tmp_path), feature_weights=str(weights))
    state = task.advance(task.reset(torch.rand(2, 3, *SIZE)), torch.rand(2, 3, *SIZE) - 0.5)
    assert again.observe(state).shape[1] == 9
    torch.testing.assert_close(again.observe(state), task.observe(state))
    torch.testing.assert_close(again.losses(state), task.losses(state))


def test_loaded_task_without_guide_needs_the_features_to_judge_alone(
    features: FeatureNetwork, weights: Path, style: Tensor, tmp_path: Path
) -> None:
    path = saved(StyleTask(features, style), tmp_path)
    state = StyleTask().reset(torch.rand(1, 3, *SIZE))
    assert load_style(StyleTask(), path, feature_weights="absent.pt").observe(state).shape[1] == 6
    judging = load_style(StyleTask(), path, feature_weights=str(weights), judge=True)
    torch.testing.assert_close(judging.style_loss(state), StyleTask(features, style).style_loss(state))


def test_another_feature_network_than_that_of_the_training_is_refused(
    features: FeatureNetwork, weights: Path, style: Tensor, tmp_path: Path
) -> None:
    path = saved(StyleTask(features, style, guided=True), tmp_path)
    others = {key: value + 0.05 * torch.randn_like(value) for key, value in torch.load(weights).items()}
    torch.save(others, tmp_path / "others.pt")
    with pytest.raises(InputError, match=r"model\.pt: expected the weights of \w+ that it was trained with"):
        load_style(StyleTask(), path, feature_weights=str(tmp_path / "others.pt"))


@pytest.mark.parametrize("content", [{"network": {}}, {"task": {}}, {"task": StyleTask().state_dict()}])
def test_checkpoint_without_a_style_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: expected one of image style transfer with its style"):
        load_style(StyleTask(), str(tmp_path / "model.pt"))


def test_pull_is_the_way_down_of_the_task_loss(features: FeatureNetwork, style: Tensor) -> None:
    task = StyleTask(features, style)
    inside = torch.rand(2, 3, *SIZE) * 0.8 + 0.1
    state = task.reset(torch.rand(2, 3, *SIZE)) | {"stylised": inside}
    pull = task.pull(state)
    torch.testing.assert_close(pull.square().mean((1, 2, 3)), torch.ones(2))

    def total(image: Tensor) -> float:
        return float(torch.stack(list(task.losses(state | {"stylised": image}).values())).sum())

    way, off = 1e-3 * pull, 1e-3 * torch.randn_like(pull)
    falls = [total(inside) - total(inside + change) for change in (way, off)]
    assert falls[0] > 10 * abs(falls[1])
    assert total(inside) - total(inside - way) < 0


def test_pull_of_an_item_knows_nothing_of_the_others(features: FeatureNetwork, style: Tensor) -> None:
    task = StyleTask(features, style)
    state = task.reset(torch.rand(2, 3, *SIZE))
    alone = task.pull({key: value[1:] for key, value in state.items()})
    torch.testing.assert_close(task.pull(state)[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_guided_task_observes_the_pull_in_every_mode(mode: Any, features: FeatureNetwork, style: Tensor) -> None:
    task = StyleTask(features, style, guided=True)
    state = task.reset(torch.rand(1, 3, *SIZE))
    expected = torch.cat([state["content"], state["stylised"], task.pull(state)], 1)
    with mode():
        seen = task.observe(task.reset(state["content"]))
    torch.testing.assert_close(seen, expected)
    assert not seen.requires_grad


def test_no_pull_where_there_is_nowhere_to_go(features: FeatureNetwork) -> None:
    image = torch.full((1, 3, *SIZE), 0.5)
    task = StyleTask(features, image[0])
    assert torch.isfinite(task.pull(task.reset(image))).all()


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("critic", {"critic"}),
        ("planner", {"policy.planner"}),
        ("temperature", {"log_temperature"}),
        ("content", {"policy.planner", "policy.actor"}),
        ("style", {"policy.planner", "policy.actor"}),
        ("variation", {"policy.planner", "policy.actor"}),
    ],
)
def test_term_moves_only_its_own_parts(term: str, parts: set[str], task: StyleTask) -> None:
    loss = make_loss(task)
    assert parts_moved_by(terms_of(loss)[term], loss, PARTS) == parts


def test_value_reaches_mean_and_spread_of_the_plan(task: StyleTask) -> None:
    loss = make_loss(task)
    drop_entropy(loss)
    assert plan_head_moved_by(terms_of(loss)["planner"], loss) == [True, True]
    make_blind(loss)
    assert plan_head_moved_by(terms_of(loss)["planner"], loss) == [False, False]


@pytest.mark.parametrize("term", ["content", "style", "variation"])
def test_task_loss_reaches_mean_and_spread_of_the_plan(term: str, task: StyleTask) -> None:
    loss = make_loss(task)
    assert plan_head_moved_by(terms_of(loss)[term], loss) == [True, True]


def test_descending_the_style_term_lowers_the_style_loss(task: StyleTask) -> None:
    """The gradient points the right way: from image to image by the term alone."""
    state = task.reset(torch.rand(1, 3, *SIZE))
    action = torch.zeros(1, 3, *SIZE, requires_grad=True)
    (gradient,) = torch.autograd.grad(task.loss(state, action, lambda observation: observation)["style"], [action])
    after = task.advance(state, -0.01 * gradient.sign())
    assert float(task.style_loss(after)) < float(task.style_loss(state))
