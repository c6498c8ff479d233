"""Inference: run the steps and return the task's output, as a MONAI inferer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from monai_rl_reg.rollout import follow
from monai_rl_reg.tasks.task import State, Task


class StepwiseInferer(Inferer):
    """Carry out a number of steps of the policy and return ``task.output`` of the last state.

    Args:
        task: the environment.
        steps: number of steps.
        sample: draw the plans instead of taking their mode, for uncertainty.

    Raises:
        ValueError: if ``steps`` is negative.
    """

    def __init__(self, task: Task, steps: int, *, sample: bool = False) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        self.task = task
        self.steps = steps
        self.sample = sample

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the output for inputs (B, C, *spatial); for registration the displacement (B, d, *spatial)."""
        *_, last = self.trajectory(inputs, network)
        return self.task.output(last)

    def trajectory(self, inputs: Tensor, network: nn.Module) -> Iterator[State]:
        """Yield the first state and the state after every step."""
        state = self.task.reset(convert_to_tensor(inputs, track_meta=False))
        yield state
        yield from follow(network, self.task, state, self.steps, sample=self.sample)  # type: ignore[arg-type]
