"""Which parts of the method a term of the loss moves; shared by the tests of the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_rl_reg.losses import SoftActorCriticLoss
from monai_rl_reg.rollout import Transition


def make_transition(loss: SoftActorCriticLoss, image: Tensor, label: Tensor | None = None) -> Transition:
    """Return the transition of a drawn plan from the first state."""
    state = loss.task.reset(image, label)
    with torch.no_grad():
        plan, _, action, _ = loss.policy.sample(loss.task.observe(state))
        after, reward, terminated = loss.task.step(state, action)
    return Transition(state, plan, reward, after, terminated)


def parts_moved_by(term: Tensor, loss: SoftActorCriticLoss, parts: Sequence[str]) -> set[str]:
    """Return those of the parts, named by how their parameters' names start, that the term has a gradient for."""
    names, parameters = zip(*[(n, p) for n, p in loss.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad(term, parameters, allow_unused=True, retain_graph=True)
    moved = [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None and gradient.any()]
    assert all(name.startswith(tuple(parts)) for name in moved), moved
    return {part for part in parts for name in moved if name.startswith(part)}


def plan_head_moved_by(term: Tensor, loss: SoftActorCriticLoss) -> list[bool]:
    """Return whether the term has a gradient for what the planner's head gives: the plan's mean, and its spread."""
    policy = getattr(loss.policy, "policy", loss.policy)
    weight = policy.planner.head[-1].conv.weight
    (gradient,) = torch.autograd.grad(term, [weight], retain_graph=True, allow_unused=True)
    return [False, False] if gradient is None else [bool(half.any()) for half in gradient.chunk(2)]


def make_blind(loss: SoftActorCriticLoss) -> None:
    """Let the critics see nothing of the plan."""
    for critic in loss.critic.critics:
        for parameter in critic.film.parameters():
            torch.nn.init.zeros_(parameter)


def drop_entropy(loss: SoftActorCriticLoss) -> None:
    """Set the temperature to 0: of J_pi the critics' value is left."""
    with torch.no_grad():
        loss.log_temperature.fill_(-torch.inf)
