"""The contract between the engine and a task: the environment of the method as pure functions on batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

State = dict[str, Tensor]
"""What an episode carries along; every entry is batch first."""
Act = Callable[[Tensor], Tensor]
"""The policy as a task sees it: an observation to its deterministic action."""


class Task(nn.Module, ABC):
    """The environment of the method.

    The engine calls nothing but what stands here and knows of no task. ``image`` and ``label`` are MONAI's own pair,
    so that ``prepare_batch``, ``SupervisedEvaluator`` and MONAI Label need no adapter. What a task needs besides
    (a frozen feature network, a discriminator) it owns as a module of its own.
    """

    replay_keys: tuple[str, ...]
    """The entries of the state that :meth:`observe` and :meth:`loss` read: all that the replay buffer stores."""

    @abstractmethod
    def reset(self, image: Tensor, label: Tensor | None = None) -> State:
        """Return the first state of an episode per item of the batch."""

    @abstractmethod
    def observe(self, state: State) -> Tensor:
        """Return what the policy sees, and the critics by the planner's features, (B, C, *spatial)."""

    @abstractmethod
    def advance(self, state: State, action: Tensor) -> State:
        """Return the state after the action, without judging it: all that inference needs.

        Pure: entries that the action does not touch are handed back as the same objects, so that the replay buffer
        can store those once.
        """

    def settle(self, state: State, steps: int) -> State:
        """Return the state that inference ends with, from that after so many steps: where a task finishes by itself."""
        return state

    @abstractmethod
    def step(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        """Return :meth:`advance`'s state, the reward (B,) and whether the episode has terminated, (B,) bool.

        Pure as :meth:`advance` is. Terminated is never truncated: running out of steps is no business of the task.
        """

    @abstractmethod
    def loss(self, state: State, action: Tensor, act: Act) -> dict[str, Tensor]:
        """Return the task's own loss as named scalar terms to be summed; differentiable in the action.

        ``act`` gives the policy's action on any other observation, for a loss that compares two of them or looks
        further than one step.
        """

    def own_loss(self, state: State) -> dict[str, Tensor]:
        """Return the loss of what the task itself learns, as :meth:`loss` does, where no action has a part in it."""
        return {}

    @abstractmethod
    def output(self, state: State) -> Tensor:
        """Return what becomes MONAI's ``pred``."""
