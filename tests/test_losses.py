from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor

from monai_rl_reg.losses import BoxLocalNormalizedCrossCorrelationLoss, SoftActorCriticLoss
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.rollout import Transition
from monai_rl_reg.similarity import LocalNCC
from monai_rl_reg.tasks.registration import RegistrationTask

PARTS = ("policy.planner", "policy.actor", "critic", "log_temperature")


def value_and_gradients(loss: torch.nn.Module, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pred, target = pred.clone().requires_grad_(), target.clone().requires_grad_()
    value = loss(pred, target)
    weights = torch.rand(value.shape, generator=torch.Generator().manual_seed(0))
    return value.detach(), *torch.autograd.grad((weights * value).sum(), [pred, target])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("window", [3, 5, 7, 9])
@pytest.mark.parametrize("size", [(15, 12), (4, 7), (11, 10, 12), (5, 3, 4)])
def test_box_ncc_equals_that_of_monai(size: tuple[int, ...], window: int, reduction: str) -> None:
    pred, target = torch.rand(2, 2, 1, *size)
    ours = BoxLocalNormalizedCrossCorrelationLoss(len(size), window, reduction=reduction)
    theirs = LocalNormalizedCrossCorrelationLoss(len(size), window, reduction=reduction)
    found, expected = value_and_gradients(ours, pred, target), value_and_gradients(theirs, pred, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_box_ncc_equals_that_of_monai_with_several_channels_and_other_smoothing() -> None:
    pred, target = torch.rand(2, 2, 3, 12, 9)
    options: dict[str, Any] = {"smooth_nr": 0.01, "smooth_dr": 0.5}
    found = BoxLocalNormalizedCrossCorrelationLoss(2, 5, **options)(pred, target)
    expected = LocalNormalizedCrossCorrelationLoss(2, 5, **options)(pred, target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_box_ncc_of_half_precision_is_computed_in_full() -> None:
    pred, target = torch.rand(2, 1, 1, 12, 12).half()
    loss = BoxLocalNormalizedCrossCorrelationLoss(2, 5)
    assert torch.equal(loss(pred, target), loss(pred.float(), target.float()))


def test_box_ncc_keeps_what_it_summed_of_a_target_until_the_target_changes() -> None:
    loss = BoxLocalNormalizedCrossCorrelationLoss(2, 5)
    pred, target = torch.rand(2, 1, 1, 12, 12)
    first = loss(pred, target)
    assert torch.equal(loss(pred, target), first)
    assert torch.equal(loss(pred, target.clone()), first)
    target[..., 6:] = pred[..., 6:]
    changed = loss(pred, target)
    assert changed < first
    assert torch.equal(changed, loss(pred, target.clone()))
    other = BoxLocalNormalizedCrossCorrelationLoss(2, 3)(pred, target)
    assert torch.equal(other, BoxLocalNormalizedCrossCorrelationLoss(2, 3)(pred, target.clone()))


def test_box_ncc_keeps_nothing_that_a_gradient_cannot_pass() -> None:
    loss = BoxLocalNormalizedCrossCorrelationLoss(2, 5)
    pred, target = torch.rand(2, 1, 1, 12, 12)
    with torch.inference_mode():
        expected = loss(pred, target)
    pred.requires_grad_()
    loss(pred, target).backward()
    target.requires_grad_()
    found = loss(pred, target)
    found.backward()
    assert torch.equal(found, expected)
    assert target.grad is not None


def test_box_ncc_refuses_images_of_different_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        BoxLocalNormalizedCrossCorrelationLoss(2)(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 9))


def test_box_ncc_refuses_another_number_of_dimensions() -> None:
    with pytest.raises(ValueError, match="expected 3 spatial dimensions"):
        BoxLocalNormalizedCrossCorrelationLoss(3)(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))


def make_loss(**options: Any) -> SoftActorCriticLoss:
    policy = PlannerActor(2, 2, 2, channels=(8, 16), plan_channels=4)
    critic = TwinCritic(2, (8, 16), 4)
    return SoftActorCriticLoss(policy, critic, RegistrationTask(2, similarity=LocalNCC(2, window=3)), **options)


def make_transition(loss: SoftActorCriticLoss, *, terminated: bool = False) -> Transition:
    state = loss.task.reset(torch.rand(3, 2, 12, 12))
    with torch.no_grad():
        plan, _, action, _ = loss.policy.sample(loss.task.observe(state))
        next_state, _, _ = loss.task.step(state, action)
    return Transition(state, plan, torch.tensor([0.5, -1.0, 2.0]), next_state, torch.full((3,), terminated))


def parts_moved_by(term: Tensor, loss: SoftActorCriticLoss) -> set[str]:
    names, parameters = zip(*[(n, p) for n, p in loss.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad(term, parameters, allow_unused=True, retain_graph=True)
    moved = [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None and gradient.any()]
    return {part for part in PARTS for name in moved if name.startswith(part)}


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("critic", {"critic"}),
        ("planner", {"policy.planner"}),
        ("temperature", {"log_temperature"}),
        ("ncc", {"policy.planner", "policy.actor"}),
        ("smoothness", {"policy.planner", "policy.actor"}),
    ],
)
def test_term_moves_only_its_own_parts(term: str, parts: set[str]) -> None:
    loss = make_loss()
    terms, _ = loss(make_transition(loss))
    assert parts_moved_by(terms[term], loss) == parts


def test_one_backward_gives_the_gradients_of_the_terms_taken_one_by_one() -> None:
    loss = make_loss()
    terms, _ = loss(make_transition(loss))
    critics = list(loss.critic.parameters())
    alone = torch.autograd.grad(terms["critic"], critics, retain_graph=True)
    torch.stack(list(terms.values())).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in critics], list(alone))


def test_target_critics_get_no_gradient() -> None:
    loss = make_loss()
    terms, _ = loss(make_transition(loss))
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is None for parameter in loss.target_critic.parameters())
    assert all(parameter.grad is not None for parameter in loss.critic.parameters())


def test_target_critics_move_by_the_target_rate() -> None:
    loss = make_loss(target_rate=0.25)
    before = [parameter.clone() for parameter in loss.target_critic.parameters()]
    with torch.no_grad():
        for parameter in loss.critic.parameters():
            parameter.add_(1.0)
    loss.update_targets()
    after = list(loss.target_critic.parameters())
    torch.testing.assert_close([parameter.detach() for parameter in after], [old + 0.25 for old in before])


@pytest.mark.parametrize("terminated", [False, True])
def test_only_termination_stops_the_bootstrap(terminated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = make_loss(discount=0.9, initial_temperature=0.5)
    batch = make_transition(loss, terminated=terminated)
    for critic, value in zip(loss.target_critic.critics, (7.0, 3.0), strict=True):
        torch.nn.init.zeros_(critic.value[-1].weight)
        torch.nn.init.constant_(critic.value[-1].bias, value)
    log_prob = torch.tensor([4.0, 8.0, 12.0])
    features = loss.policy.planner(loss.task.observe(batch.state))[2]
    monkeypatch.setattr(loss.policy, "draw", lambda observation: (torch.zeros(3, 4, 1, 1), log_prob, features))

    numbers_in_plan = 4
    soft_value = 3.0 - 0.5 * log_prob / numbers_in_plan
    target = batch.reward if terminated else batch.reward + 0.9 * soft_value
    values = loss.critic(features, batch.plan)
    expected = (values - target[:, None]).square().mean()
    torch.testing.assert_close(loss(batch)[0]["critic"], expected)


def test_planner_and_temperature_terms_follow_their_equations() -> None:
    loss = make_loss(planner_weight=0.3, initial_temperature=0.5, target_entropy=-1.5)
    batch = make_transition(loss)
    observation = loss.task.observe(batch.state)
    torch.manual_seed(1)
    terms, figures = loss(batch)
    torch.manual_seed(1)
    plan, log_prob, _, features = loss.policy.sample(observation)
    per_number = log_prob / 4
    value = loss.critic(features, plan).amin(1)
    torch.testing.assert_close(terms["planner"], 0.3 * (0.5 * per_number - value).mean())
    torch.testing.assert_close(terms["temperature"], -math.log(0.5) * (per_number - 1.5).mean())
    torch.testing.assert_close(figures["entropy"], -per_number.mean())
    torch.testing.assert_close(figures["alpha"], torch.tensor(0.5))


@pytest.mark.parametrize(("target_entropy", "direction"), [(10.0, 1), (-10.0, -1)])
def test_temperature_rises_while_the_entropy_is_below_its_target(target_entropy: float, direction: int) -> None:
    loss = make_loss(target_entropy=target_entropy)
    loss(make_transition(loss))[0]["temperature"].backward()
    assert -loss.log_temperature.grad.sign() == direction


def test_control_has_only_the_terms_of_the_task() -> None:
    loss = make_loss(reinforcement=False)
    terms, figures = loss(make_transition(loss))
    assert set(terms) == {"ncc", "smoothness"}
    assert figures == {}
    assert parts_moved_by(terms["ncc"], loss) == {"policy.planner", "policy.actor"}


def test_control_is_deterministic() -> None:
    loss = make_loss(reinforcement=False)
    torch.nn.init.normal_(loss.policy.actor.head.conv.weight)
    batch = make_transition(loss)
    torch.manual_seed(1)
    first = loss(batch)[0]["ncc"]
    torch.manual_seed(2)
    assert torch.equal(loss(batch)[0]["ncc"], first)


def test_control_asks_for_no_gradient_of_the_critics_and_the_temperature() -> None:
    loss = make_loss(reinforcement=False)
    wanting = {name for name, parameter in loss.named_parameters() if parameter.requires_grad}
    assert wanting == {f"policy.{name}" for name, _ in loss.policy.named_parameters()}


def test_planner_term_enters_after_its_warm_up() -> None:
    loss = make_loss(planner_warm_up=2)
    batch = make_transition(loss)
    planner, critic = [], []
    for _ in range(3):
        terms, _ = loss(batch)
        planner.append(terms["planner"].item())
        critic.append(terms["critic"].item())
        loss.update_targets()
    assert planner[:2] == [0, 0]
    assert planner[2] != 0
    assert min(critic) > 0


def test_warm_up_goes_on_where_a_checkpoint_left_it() -> None:
    saved = make_loss(planner_warm_up=2)
    saved.update_targets()
    saved.update_targets()
    resumed = make_loss(planner_warm_up=2)
    resumed.load_state_dict(saved.state_dict())
    assert resumed(make_transition(resumed))[0]["planner"] != 0


def test_terms_are_full_precision_and_finite_under_autocast() -> None:
    loss = make_loss()
    batch = make_transition(loss)
    with torch.autocast("cpu", torch.bfloat16):
        terms, _ = loss(batch)
    assert {name: term.dtype for name, term in terms.items()} == dict.fromkeys(terms, torch.float32)
    assert torch.stack(list(terms.values())).isfinite().all()


def test_unrolled_task_loss_is_that_of_a_random_number_of_steps_with_their_gradient() -> None:
    loss = make_loss(reinforcement=False, unroll=3)
    torch.nn.init.normal_(loss.policy.actor.head.conv.weight, std=0.1)
    weight = loss.policy.actor.head.conv.weight
    batch = make_transition(loss)
    state, expected = batch.state, []
    for _ in range(3):
        action = loss.policy(loss.task.observe(state))
        value = loss.task.loss(state, action, loss.policy)["ncc"]
        expected.append((float(value), torch.autograd.grad(value, weight, retain_graph=True)[0]))
        state = loss.task.advance(state, action)
    assert len({round(value, 4) for value, _ in expected}) == 3, "the steps differ"
    drawn = set()
    for _ in range(20):
        found = loss(batch)[0]["ncc"]
        steps = min(range(3), key=lambda i: abs(expected[i][0] - float(found)))
        torch.testing.assert_close(float(found), expected[steps][0])
        torch.testing.assert_close(torch.autograd.grad(found, weight)[0], expected[steps][1])
        drawn.add(steps)
    assert drawn == {0, 1, 2}


def test_what_the_task_itself_learns_counts_once_however_far_the_loss_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = make_loss(reinforcement=False, unroll=3)
    monkeypatch.setattr(loss.task, "own_loss", lambda state: {"own": torch.tensor(3.0)})
    assert loss(make_transition(loss))[0]["own"] == 3.0
