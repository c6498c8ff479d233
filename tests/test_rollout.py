from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.rollout import follow, rollout
from monai_rl_reg.similarity import LocalNCC
from monai_rl_reg.tasks.registration import RegistrationTask
from monai_rl_reg.tasks.task import Act, State, Task


class CountdownTask(Task):
    """Every episode counts the number in its image down and terminates at zero; the image itself stays."""

    replay_keys = ("image", "left")

    def reset(self, image: Tensor, label: Tensor | None = None) -> State:
        return {"image": image, "left": image.flatten(1)[:, 0]}

    def observe(self, state: State) -> Tensor:
        return state["image"]

    def advance(self, state: State, action: Tensor) -> State:
        return state | {"left": state["left"] - 1}

    def step(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        after = self.advance(state, action)
        return after, 10 * state["left"], after["left"] <= 0

    def loss(self, state: State, action: Tensor, act: Act) -> dict[str, Tensor]:
        return {}

    def output(self, state: State) -> Tensor:
        return state["left"]


def make_policy(spatial_dims: int = 2) -> PlannerActor:
    policy = PlannerActor(spatial_dims, 2, spatial_dims, channels=(8, 8), plan_channels=3)
    torch.nn.init.normal_(policy.actor.head.conv.weight)
    return policy


def start(lengths: Sequence[int]) -> State:
    counts = torch.tensor(lengths, dtype=torch.float32)
    return CountdownTask().reset(counts[:, None, None, None].repeat(1, 2, 8, 8))


def test_ended_episodes_stay_as_they_are() -> None:
    states = [state for state, _ in rollout(make_policy(), CountdownTask(), start([1, 3, 2]), 3)]
    assert [state["left"].tolist() for state in states] == [[0, 2, 1], [0, 1, 0], [0, 0, 0]]


def test_only_live_episodes_are_yielded() -> None:
    transitions = [transition for _, transition in rollout(make_policy(), CountdownTask(), start([1, 3, 2]), 3)]
    assert [transition.state["left"].tolist() for transition in transitions] == [[1, 3, 2], [2, 1], [1]]
    assert [transition.next_state["left"].tolist() for transition in transitions] == [[0, 2, 1], [1, 0], [0]]
    assert [transition.reward.tolist() for transition in transitions] == [[10, 30, 20], [20, 10], [10]]
    assert [transition.terminated.tolist() for transition in transitions] == [
        [True, False, False],
        [False, True],
        [True],
    ]
    assert [len(transition.plan) for transition in transitions] == [3, 2, 1]


def test_live_episodes_keep_their_own_untouched_entries() -> None:
    for _, transition in rollout(make_policy(), CountdownTask(), start([1, 3, 2]), 3):
        taken = transition.state["image"][:, 0, 0, 0] - transition.state["left"]
        assert taken.unique().numel() == 1


def test_rollout_stops_when_all_have_ended() -> None:
    assert len(list(rollout(make_policy(), CountdownTask(), start([1, 3, 2]), 10))) == 3


def test_rollout_stops_at_the_time_limit() -> None:
    assert len(list(rollout(make_policy(), CountdownTask(), start([5, 9]), 4))) == 4


def test_running_out_of_steps_is_not_termination() -> None:
    transitions = [transition for _, transition in rollout(make_policy(), CountdownTask(), start([5, 9]), 4)]
    assert not any(transition.terminated.any() for transition in transitions)


@pytest.mark.parametrize("lengths", [[5, 9], [1, 9]])
def test_untouched_entries_are_the_same_object_before_and_after_a_step(lengths: list[int]) -> None:
    for _, transition in rollout(make_policy(), CountdownTask(), start(lengths), 3):
        assert transition.next_state["image"] is transition.state["image"]
        assert transition.next_state["left"] is not transition.state["left"]


@pytest.mark.parametrize("lengths", [[5, 9], [1, 9]])
def test_untouched_entries_of_the_whole_batch_are_those_of_the_first_state(lengths: list[int]) -> None:
    first = start(lengths)
    for state, _ in rollout(make_policy(), CountdownTask(), first, 3):
        assert state["image"] is first["image"]


def test_first_state_is_left_as_it_was() -> None:
    first = start([1, 3])
    list(rollout(make_policy(), CountdownTask(), first, 3))
    assert first["left"].tolist() == [1, 3]


def test_rollout_builds_no_graph_and_leaves_the_gradient_mode_of_its_caller_alone() -> None:
    for _, transition in rollout(make_policy(), CountdownTask(), start([2]), 2):
        assert torch.is_grad_enabled()
        assert not transition.plan.requires_grad


def test_rollout_draws_its_plans() -> None:
    first, second = ([t.plan for _, t in rollout(make_policy(), CountdownTask(), start([1]), 1)] for _ in range(2))
    assert not torch.allclose(first[0], second[0])


def test_rollout_without_sampling_takes_the_mode_of_the_plan() -> None:
    policy, first = make_policy(), start([1, 3])
    ((_, transition),) = rollout(policy, CountdownTask(), first, 1, sample=False)
    torch.testing.assert_close(transition.plan, policy.decide(first["image"])[0].detach())


def test_rollout_without_sampling_and_follow_take_the_same_steps() -> None:
    policy, task = make_policy(), RegistrationTask(2)
    first = task.reset(torch.rand(2, 2, 9, 7))
    played = [task.output(state) for state, _ in rollout(policy, task, first, 3, sample=False)]
    torch.testing.assert_close(played, [task.output(state) for state in follow(policy, task, first, 3)])


def test_registration_episodes_freeze_as_well() -> None:
    task = RegistrationTask(2, similarity=LocalNCC(2, window=3))
    label = torch.randint(0, 3, (3, 2, 9, 7))
    label[1, 1] = label[1, 0]
    policy = make_policy()
    torch.nn.init.zeros_(policy.actor.head.conv.weight)  # no action: the pair that matches ends, the others go on
    sizes = [len(t.reward) for _, t in rollout(policy, task, task.reset(torch.rand(3, 2, 9, 7), label), 3)]
    assert sizes == [3, 2, 2]


@pytest.mark.parametrize("size", [(9, 7), (9, 7, 5)])
def test_follow_is_policy_and_advance_in_turn(size: tuple[int, ...]) -> None:
    policy, task = make_policy(len(size)), RegistrationTask(len(size))
    image = torch.rand(2, 2, *size)
    followed = list(follow(policy, task, task.reset(image), 3))
    assert len(followed) == 3
    state = task.reset(image)
    with torch.no_grad():
        for found in followed:
            state = task.advance(state, policy(task.observe(state)))
            torch.testing.assert_close(found, state)


def test_follow_with_sampling_carries_out_drawn_plans() -> None:
    policy, task = make_policy(), RegistrationTask(2)
    first = task.reset(torch.rand(1, 2, 9, 7))
    torch.manual_seed(1)
    (found,) = follow(policy, task, first, 1, sample=True)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = task.advance(first, policy.sample(task.observe(first))[2])
        mode = task.advance(first, policy(task.observe(first)))
    torch.testing.assert_close(found["displacement"], expected["displacement"])
    assert not torch.allclose(found["displacement"], mode["displacement"], atol=1e-3)


@pytest.mark.parametrize(("worth", "steps"), [(0.5, 2), (-1.0, 3), (3.0, 0)])
def test_follow_ends_where_a_critic_expects_too_little(worth: float, steps: int) -> None:
    policy, task = make_policy(), RegistrationTask(2)
    values = iter([[2.0, 0.9], [0.1, 0.6], [0.0, 0.4]])  # of both items, before each step

    def critic(features: list[torch.Tensor], plan: torch.Tensor) -> torch.Tensor:
        assert [len(x) for x in (*features, plan)] == [2] * (len(features) + 1)
        value = torch.tensor(next(values))
        return torch.stack([value, value + 1.0], dim=1)

    first = task.reset(torch.rand(2, 2, 9, 7))
    found = list(follow(policy, task, first, 3, critic=critic, worth=worth))  # type: ignore[arg-type]
    assert len(found) == steps
    for state, expected in zip(found, follow(policy, task, first, 3), strict=False):
        torch.testing.assert_close(state, expected)


def test_follow_does_not_judge() -> None:
    task = RegistrationTask(2)
    (state,) = follow(make_policy(), task, task.reset(torch.rand(1, 2, 9, 7)), 1)
    assert set(state) == {"fixed", "moving", "moved", "displacement"}


def test_training_goes_on_after_following_with_the_same_task() -> None:
    policy, task = make_policy(), RegistrationTask(2, similarity=LocalNCC(2, window=3))
    image = torch.rand(1, 2, 9, 7)
    list(follow(policy, task, task.reset(image), 2))
    state = task.reset(image)
    task.loss(state, policy(task.observe(state)), policy)["ncc"].backward()
    assert policy.actor.head.conv.weight.grad.any()
