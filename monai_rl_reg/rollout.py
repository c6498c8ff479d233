"""Drive a batch of episodes through the policy: shared by training and inference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_rl_reg.convolutions import quick_convolutions
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.tasks.task import State, Task


@dataclass(frozen=True)
class Transition:
    """One step of the episodes that were still live: what the replay buffer stores.

    Attributes:
        state: state before the step.
        plan: the plan that was drawn, (B, P, *grid).
        reward: (B,).
        next_state: state after the step.
        terminated: (B,) bool; True where the task itself ended, never for running out of steps.
    """

    state: State
    plan: Tensor
    reward: Tensor
    next_state: State
    terminated: Tensor


@torch.no_grad()
def rollout(
    policy: PlannerActor, task: Task, state: State, steps: int, *, sample: bool = True
) -> Iterator[tuple[State, Transition]]:
    """Play ``steps`` steps; an episode that ends is frozen as it is and leaves the computation.

    Args:
        policy: draws plans and acts.
        task: the environment.
        state: from ``task.reset``.
        steps: the time limit.
        sample: draw the plans; False takes their modes.

    Yields:
        the state of the whole batch after the step, and the transition of the episodes that were live in it.
    """
    batch = len(next(iter(state.values())))
    live: Tensor | None = None  # None: all
    for _ in range(steps):
        current = state if live is None else {key: value[live] for key, value in state.items()}
        observation = task.observe(current)
        plan, action = policy.sample(observation)[::2] if sample else policy.decide(observation)[:2]
        after, reward, terminated = task.step(current, action)
        state = after if live is None else _merge(state, current, after, live)
        yield state, Transition(current, plan, reward, after, terminated)
        if terminated.any():
            rows = torch.arange(batch, device=terminated.device) if live is None else live
            live = rows[~terminated]
            if len(live) == 0:
                return


@torch.no_grad()
def follow(
    policy: PlannerActor,
    task: Task,
    state: State,
    steps: int,
    *,
    sample: bool = False,
    half: bool = False,
    critic: TwinCritic | None = None,
    worth: float = 0.0,
) -> Iterator[State]:
    """Yield the states of ``steps`` steps without judging them; the plan's mode, or with ``sample`` a drawn plan.

    With ``half`` the policy computes in bfloat16; the task, and with it the fields, stay in fp32. With a critic the
    steps end, for the whole batch, before the first from which on it expects a return of less than ``worth``.
    """
    for _ in range(steps):
        observation = task.observe(state)
        with quick_convolutions(observation.device, half=half):
            if critic is None:
                action = policy.sample(observation)[2] if sample else policy(observation)
            else:
                plan, *_, action, features = policy.sample(observation) if sample else policy.decide(observation)
                if float(critic(features, plan).amin(1).max()) < worth:
                    return
        state = task.advance(state, action)
        yield state


def _merge(state: State, current: State, after: State, live: Tensor) -> State:
    merged = dict(state)
    for key, value in after.items():
        if value is not current[key]:
            merged[key] = state[key].index_copy(0, live, value)
    return merged
