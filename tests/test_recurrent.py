from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.recurrent import FOLD, ConvolutionalGRU, RecurrentPlannerActor, fold, unfold

SIZE = (24, 20)


def make_policy(recalled: int = 4) -> RecurrentPlannerActor:
    inner = PlannerActor(
        2, 6 + recalled, 3, channels=(8, 8), plan_channels=1, plan_grid=(4, 4), action_bound=0.2, action_stride=1
    )
    for head in (inner.actor.head.conv, inner.planner.head[-1].conv):
        nn.init.normal_(head.weight, std=0.3)
    return RecurrentPlannerActor(inner, 6, recalled=recalled)


def test_fold_and_unfold_are_inverse() -> None:
    memory, image = torch.rand(2, FOLD * FOLD, 6, 5), torch.rand(2, 1, *SIZE)
    assert fold(memory).shape == (2, 1, *SIZE)
    assert unfold(image).shape == (2, FOLD * FOLD, 6, 5)
    assert torch.equal(unfold(fold(memory)), memory)
    assert torch.equal(fold(unfold(image)), image)


def test_fold_keeps_a_memory_at_its_place() -> None:
    memory = torch.zeros(1, FOLD * FOLD, 6, 5)
    memory[:, :, 2, 3] = 1
    rows, columns = torch.nonzero(fold(memory)[0, 0], as_tuple=True)
    assert rows.unique().tolist() == [8, 9, 10, 11]
    assert columns.unique().tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(("bias", "kept"), [(-50.0, True), (50.0, False)])
def test_update_gate_keeps_the_memory_or_replaces_it(bias: float, kept: bool) -> None:
    unit = ConvolutionalGRU(4)
    nn.init.constant_(unit.gates.bias, bias)  # update and reset
    x, memory = torch.rand(2, 2, 4, 6, 5)
    candidate = torch.tanh(unit.candidate(torch.cat([x, memory], 1)))
    torch.testing.assert_close(unit(x, memory), memory if kept else candidate)


def test_reset_gate_hides_the_memory_from_the_candidate() -> None:
    unit = ConvolutionalGRU(4)
    with torch.no_grad():
        unit.gates.weight.zero_()
        unit.gates.bias.copy_(torch.tensor([50.0] * 4 + [-50.0] * 4))  # replace all, and see nothing of it
    x, memory = torch.rand(2, 2, 4, 6, 5)
    torch.testing.assert_close(unit(x, memory), unit(x, torch.zeros_like(memory)))


def test_memory_stays_within_bounds_whatever_it_sees() -> None:
    unit = ConvolutionalGRU(4)
    memory = torch.zeros(2, 4, 6, 5)
    for _ in range(20):
        memory = unit(1000 * torch.randn(2, 4, 6, 5), memory)
        assert memory.abs().max() <= 1
    assert memory.abs().max() > 0.5


def test_action_is_the_bounded_picture_and_both_memories() -> None:
    policy, observation = make_policy(), torch.rand(2, 8, *SIZE)
    plan, action, _ = policy.decide(observation)
    assert plan.shape == (2, *policy.plan_shape) == (2, 1, 4, 4)
    assert action.shape == (2, 5, *SIZE)
    assert action[:, :3].abs().max() <= 0.2
    assert torch.equal(policy(observation), action)
    step = policy.step_memory(policy.read(observation[:, :6]), unfold(observation[:, 6:7]))
    torch.testing.assert_close(action[:, 3:4], fold(step))
    torch.testing.assert_close(action[:, 4:5], fold(policy.frame_memory(step, unfold(observation[:, 7:8]))))


def test_memories_stay_within_bounds_over_many_steps() -> None:
    policy, images = make_policy(), 100 * torch.rand(1, 6, *SIZE)
    memories = torch.zeros(1, 2, *SIZE)
    with torch.no_grad():
        for _ in range(20):
            memories = policy(torch.cat([images, memories], 1))[:, 3:]
    assert memories.abs().max() <= 1


@pytest.mark.parametrize("memory", [6, 7])
def test_each_memory_influences_the_next_picture_and_what_is_remembered(memory: int) -> None:
    policy, observation = make_policy(), torch.rand(1, 8, *SIZE)
    other = observation.clone()
    other[:, memory] += 0.5
    with torch.no_grad():
        difference = (policy(other) - policy(observation)).abs().amax((0, 2, 3))
    assert (difference[:3] > 1e-4).all()
    assert difference[4] > 1e-4, "the frame memory"
    assert (difference[3] > 1e-4) == (memory == 6), "the step memory reads no other"


def test_memory_of_a_place_reaches_the_picture_around_it_first() -> None:
    """What was remembered of the upper left corner is recalled there."""
    policy, observation = make_policy(), torch.rand(1, 8, 96, 96)
    other = observation.clone()
    other[:, 7, :8, :8] += 0.5
    with torch.no_grad():
        difference = (policy._remember(other)[0] - policy._remember(observation)[0]).abs().amax((0, 1))
    assert difference[:8, :8].max() > 1e-4
    assert difference[32:, 32:].max() == 0


def test_sample_draws_a_plan_and_remembers_the_same() -> None:
    policy, observation = make_policy(), torch.rand(2, 8, *SIZE)
    plan, log_prob, action, _ = policy.sample(observation)
    assert plan.shape == (2, 1, 4, 4)
    assert log_prob.shape == (2,)
    decided = policy(observation)
    assert torch.equal(action[:, 3:], decided[:, 3:]), "memories do not depend on the plan"
    assert not torch.equal(action[:, :3], decided[:, :3])
    assert not torch.equal(policy.sample(observation)[0], plan)


def test_plan_is_drawn_from_the_distribution_that_sample_draws_from() -> None:
    policy, observation = make_policy(), torch.rand(2, 8, *SIZE)
    torch.manual_seed(1)
    plan, log_prob, _, features = policy.sample(observation)
    torch.manual_seed(1)
    torch.testing.assert_close(policy.draw(observation), (plan, log_prob, features))


def test_gradient_of_a_drawn_action_reaches_every_parameter() -> None:
    policy = make_policy()
    _, log_prob, action, _ = policy.sample(torch.rand(2, 8, *SIZE))
    (action.square().mean() + log_prob.mean()).backward()
    without = [name for name, parameter in policy.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.any() for name, parameter in policy.named_parameters() if name.endswith("weight"))


def test_gradient_goes_back_through_the_memories() -> None:
    policy, images = make_policy(), torch.rand(1, 6, *SIZE)
    first = policy(torch.cat([images, torch.zeros(1, 2, *SIZE)], 1))[:, 3:]
    first.retain_grad()
    policy(torch.cat([images, first], 1))[:, :3].square().mean().backward()
    assert first.grad[:, 0].any()
    assert first.grad[:, 1].any()


@pytest.mark.parametrize("size", [(24, 20), (32, 16), (4, 8)])
def test_scripted_policy_gives_the_same_action(size: tuple[int, int]) -> None:
    policy, observation = make_policy(), torch.rand(2, 8, *size)
    torch.testing.assert_close(torch.jit.script(policy)(observation), policy(observation))
