from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F

from monai_rl_reg.networks import PlannerActor, TwinCritic

CHANNELS = (8, 16)  # two levels: a stride of 4
SIZES = [(8, 12), (9, 7), (3, 2), (1, 1), (8, 4, 8), (9, 7, 5), (3, 2, 1), (1, 1, 1)]
GRIDS = [(2, None), (2, (3, 2)), (3, None), (3, (2, 1, 3))]


def make_policy(spatial_dims: int, **options: Any) -> PlannerActor:
    options = {"channels": CHANNELS, "plan_channels": 3} | options
    return PlannerActor(spatial_dims, 2, spatial_dims, **options)


def make_observation(size: Sequence[int], batch: int = 2) -> Tensor:
    return torch.rand(batch, 2, *size)


def enlarge_action(policy: PlannerActor, factor: float) -> None:
    with torch.no_grad():
        policy.actor.head.conv.weight.mul_(factor)


def small_observation(spatial_dims: int) -> Tensor:
    return make_observation((9, 7, 5)[:spatial_dims])


@pytest.mark.parametrize("action_stride", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
def test_action_has_the_size_of_the_observation_over_its_stride_rounded_up(
    size: tuple[int, ...], action_stride: int, batch: int
) -> None:
    policy = make_policy(len(size), action_stride=action_stride)
    observation = make_observation(size, batch)
    expected = (batch, len(size), *(math.ceil(n / action_stride) for n in size))
    assert policy(observation).shape == expected
    assert policy.sample(observation)[2].shape == expected


def test_action_has_the_resolution_of_the_observation_unless_asked_otherwise() -> None:
    assert make_policy(2)(make_observation((9, 7))).shape == (2, 2, 9, 7)


@pytest.mark.parametrize("action_stride", [1, 2])
@pytest.mark.parametrize(("size", "padded"), [((9, 7), (10, 8)), ((9, 7, 5), (10, 8, 6)), ((9, 8, 6), (10, 8, 6))])
def test_odd_sizes_are_filled_up_by_repeating_the_edge(
    size: tuple[int, ...], padded: tuple[int, ...], action_stride: int
) -> None:
    policy = make_policy(len(size), action_stride=action_stride)
    enlarge_action(policy, 100)
    observation = make_observation(size)
    pads = [pad for old, new in zip(size[::-1], padded[::-1], strict=True) for pad in (0, new - old)]
    action = policy(F.pad(observation, pads, mode="replicate"))
    kept = [slice(math.ceil(n / action_stride)) for n in size]
    torch.testing.assert_close(policy(observation), action[(..., *kept)])


@pytest.mark.parametrize("action_stride", [1, 2])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_action_is_bounded_and_reaches_its_bound(spatial_dims: int, action_stride: int) -> None:
    policy = make_policy(spatial_dims, action_bound=2.5, action_stride=action_stride)
    enlarge_action(policy, 1e5)
    largest = policy(small_observation(spatial_dims)).abs().max().item()
    assert largest <= 2.5
    assert largest > 2.4


@pytest.mark.parametrize("action_stride", [1, 2])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_untrained_policy_hardly_acts(spatial_dims: int, action_stride: int) -> None:
    policy = make_policy(spatial_dims, action_bound=5.0, action_stride=action_stride)
    action = policy(small_observation(spatial_dims))
    assert 0 < action.abs().max() < 0.25 * 5.0
    assert action.abs().mean() < 0.06 * 5.0


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_forward_is_deterministic(spatial_dims: int) -> None:
    policy = make_policy(spatial_dims).train()
    enlarge_action(policy, 100)
    observation = small_observation(spatial_dims)
    first = policy(observation)
    torch.manual_seed(1)
    assert torch.equal(policy(observation), first)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_forward_carries_out_the_mode_of_the_plan(spatial_dims: int) -> None:
    policy = make_policy(spatial_dims)
    enlarge_action(policy, 100)
    observation = make_observation((8, 12, 4)[:spatial_dims])
    mode = torch.tanh(policy.planner(observation)[0])
    plan, action, features = policy.decide(observation)
    torch.testing.assert_close(plan, mode)
    torch.testing.assert_close(action, policy.actor(mode, features, list(observation.shape[2:])))
    torch.testing.assert_close(policy(observation), action)


def test_action_of_an_item_is_independent_of_its_batch() -> None:
    policy = make_policy(2)
    enlarge_action(policy, 100)
    observation = make_observation((9, 7), batch=3)
    torch.testing.assert_close(policy(observation)[1:2], policy(observation[1:2]))


@pytest.mark.parametrize(("spatial_dims", "plan_grid"), GRIDS)
def test_log_prob_is_that_of_a_tanh_squashed_normal(spatial_dims: int, plan_grid: tuple[int, ...] | None) -> None:
    policy = make_policy(spatial_dims, plan_grid=plan_grid)
    observation = make_observation((8, 12, 4)[:spatial_dims])
    plan, log_prob, _, _ = policy.sample(observation)
    mean, log_std, _ = policy.planner(observation)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(log_prob, reference.log_prob(plan).flatten(1).sum(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("spatial_dims", "plan_grid"), GRIDS)
def test_plan_has_its_declared_shape(spatial_dims: int, plan_grid: tuple[int, ...] | None) -> None:
    policy = make_policy(spatial_dims, plan_grid=plan_grid)
    grid = plan_grid or (1,) * spatial_dims
    assert policy.plan_shape == (3, *grid)
    plan, log_prob, _, _ = policy.sample(small_observation(spatial_dims))
    assert plan.shape == (2, 3, *grid)
    assert log_prob.shape == (2,)


def test_plan_lies_between_minus_one_and_one() -> None:
    policy = make_policy(2, plan_channels=64)
    with torch.no_grad():
        policy.planner.head[-1].conv.bias[:64] = torch.linspace(-3, 3, 64)
    plan = torch.cat([policy.draw(make_observation((8, 8)))[0] for _ in range(20)])
    assert plan.abs().max() < 1
    assert plan.min() < -0.9
    assert plan.max() > 0.9


def test_log_prob_of_a_saturated_plan_is_finite() -> None:
    policy = make_policy(2)
    torch.nn.init.constant_(policy.planner.head[-1].conv.bias, 50.0)
    assert policy.draw(make_observation((8, 8)))[1].isfinite().all()


def test_plan_varies_between_draws() -> None:
    policy = make_policy(2)
    observation = make_observation((8, 8))
    assert not torch.allclose(policy.draw(observation)[0], policy.draw(observation)[0])


@pytest.mark.parametrize("channels", [(8, 16), (4, 4)])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_plan_depends_on_the_observation(spatial_dims: int, channels: tuple[int, ...]) -> None:
    observation = small_observation(spatial_dims)
    observation[1] = 0
    mean = make_policy(spatial_dims, channels=channels).decide(observation)[0]
    assert (mean[0] - mean[1]).abs().max() > 1e-5


@pytest.mark.parametrize(("spatial_dims", "plan_grid"), GRIDS)
def test_actor_carries_out_the_plan_that_was_drawn(spatial_dims: int, plan_grid: tuple[int, ...] | None) -> None:
    policy = make_policy(spatial_dims, plan_grid=plan_grid)
    enlarge_action(policy, 100)
    observation = small_observation(spatial_dims)
    plan, _, action, features = policy.sample(observation)
    size = list(observation.shape[2:])
    torch.testing.assert_close(policy.actor(plan, features, size), action)
    assert not torch.allclose(policy.actor(-plan, features, size), action, atol=1e-3)


def test_gradient_of_the_action_reaches_mean_and_spread_of_the_plan() -> None:
    policy = make_policy(2)
    policy.sample(make_observation((8, 8)))[2].sum().backward()
    mean, log_std = policy.planner.head[-1].conv.bias.grad.chunk(2)
    assert (mean != 0).all()
    assert (log_std != 0).all()


@pytest.mark.parametrize("action_stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 7), (8, 8), (9, 7, 5)])
def test_scripted_policy_gives_the_same_action(size: tuple[int, ...], action_stride: int) -> None:
    policy = make_policy(len(size), action_stride=action_stride).eval()
    enlarge_action(policy, 100)
    observation = make_observation(size)
    torch.testing.assert_close(torch.jit.script(policy)(observation), policy(observation))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 2, 4), {}, "spatial_dims must be 2 or 3, got 4"),
        ((2, 2, 2), {"action_stride": 3}, "action_stride must be 1 or 2, got 3"),
        ((2, 2, 2), {"channels": (8,)}, "channels must name at least two levels"),
        ((3, 2, 3), {"plan_grid": (2, 2)}, "plan_grid must have 3 entries"),
    ],
)
def test_constructor_refuses(arguments: tuple[int, int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlannerActor(*arguments, **options)


@pytest.mark.parametrize("size", SIZES)
def test_critics_give_two_values_an_item(size: tuple[int, ...]) -> None:
    critic = TwinCritic(len(size), CHANNELS, 3)
    plan, _, features = make_policy(len(size)).draw(make_observation(size))
    assert critic(features, plan).shape == (2, 2)


def test_critics_are_independent() -> None:
    plan, _, features = make_policy(2).draw(make_observation((8, 8)))
    values = TwinCritic(2, CHANNELS, 3)(features, plan)
    assert not torch.allclose(values[:, 0], values[:, 1], atol=1e-4)


@pytest.mark.parametrize(("spatial_dims", "plan_grid"), GRIDS)
def test_gradient_of_the_value_by_the_plan_differs_between_states(
    spatial_dims: int, plan_grid: tuple[int, ...] | None
) -> None:
    critic = TwinCritic(spatial_dims, CHANNELS, 3)
    features = make_policy(spatial_dims).planner(small_observation(spatial_dims))[2]
    plan = torch.rand(1, 3, *(plan_grid or (1,) * spatial_dims)).repeat(2, *[1] * (spatial_dims + 1))
    plan.requires_grad_()
    critic(features, plan).amin(1).sum().backward()
    first, second = plan.grad
    assert first.abs().max() > 1e-4
    assert not torch.allclose(first, second, rtol=0.05)


def test_what_the_critics_learn_moves_no_planner() -> None:
    policy, critic = make_policy(2), TwinCritic(2, CHANNELS, 3)
    plan, _, features = policy.draw(make_observation((8, 8)))
    critic(features, plan.detach()).sum().backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_critics_learn_from_the_features_how_much_is_left_to_do() -> None:
    policy, critic = make_policy(2), TwinCritic(2, CHANNELS, 3)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)

    def error(count: int) -> torch.Tensor:
        left = torch.rand(count, 1, 1, 1)
        image = torch.rand(count, 1, 16, 16)
        observation = torch.cat([image, image + left * torch.randn(count, 1, 16, 16)], dim=1)
        with torch.no_grad():
            plan, _, features = policy.draw(observation)
        return (critic(features, plan) - left.reshape(count, 1)).square().mean()

    for _ in range(200):
        optimizer.zero_grad()
        error(8).backward()
        optimizer.step()
    with torch.no_grad():
        assert error(200) < 0.01  # of a variance of 0.083


@pytest.mark.parametrize("size", [(10, 6), (9, 6), (10, 6, 8), (9, 5, 7)])
def test_actor_is_the_convolution_of_the_doubled_map(size: tuple[int, ...]) -> None:
    policy = PlannerActor(len(size), 2, len(size), channels=(4, 8), plan_channels=4)
    level = policy.actor.levels[0]
    below, beside = torch.rand(2, 8, *(math.ceil(n / 2) for n in size)), torch.rand(2, 4, *size)
    doubled = F.interpolate(below, scale_factor=2, mode="nearest")
    for dim, n in enumerate(size, start=2):
        # what is left out still has its say at the edge, where a convolution of the cropped map would see zeros
        beside = F.pad(beside, [0, 0] * (len(size) - dim + 1) + [0, doubled.shape[dim] - n])
    expected = level.act(level.conv(torch.cat([doubled, beside], dim=1)))
    found = level(below, beside[(..., *map(slice, size))])
    torch.testing.assert_close(found, expected[(..., *map(slice, size))], rtol=0, atol=1e-5)
