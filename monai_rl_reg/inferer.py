"""Inference: run the steps and return the task's output, as a MONAI inferer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.convolutions import quick_convolutions
from monai_rl_reg.networks import TwinCritic
from monai_rl_reg.recurrent import FOLD
from monai_rl_reg.rollout import follow
from monai_rl_reg.tasks.task import State, Task
from monai_rl_reg.video import flows_between
from monai_rl_reg.warping import Warp


def half_pays(device: str | torch.device) -> bool:
    """Return whether a device has instructions for bfloat16: several times faster, and as accurate for a step field."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public word for it
    return torch.device(device).type == "cpu" and supported is not None and bool(supported())


def clock(device: str | torch.device) -> float:
    """Return the time, in seconds, when a device has done all it was given: CUDA works on by itself."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class StepwiseInferer(Inferer):
    """Carry out a number of steps of the policy and return ``task.output`` of the last state.

    Args:
        task: the environment.
        steps: number of steps.
        sample: draw the plans instead of taking their mode, for uncertainty.
        half: let the networks compute in bfloat16, see :func:`half_pays`.
        keep_history: keep the outputs of the last call, from before the first step to after the last, in ``history``.
        critic: ends the steps early, as :func:`~monai_rl_reg.rollout.follow` has it; what it ends is not settled.
        worth: the least return that the critic must expect.

    Raises:
        ValueError: if ``steps`` is negative.
    """

    def __init__(
        self,
        task: Task,
        steps: int,
        *,
        sample: bool = False,
        half: bool = False,
        keep_history: bool = False,
        critic: TwinCritic | None = None,
        worth: float = 0.0,
    ) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        self.task = task
        self.steps = steps
        self.sample = sample
        self.half = half
        self.keep_history = keep_history
        self.critic = critic
        self.worth = worth
        self.history: list[Tensor] = []

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the output for inputs (B, C, *spatial); for registration the displacement (B, d, *spatial)."""
        if not self.keep_history:
            *_, last = self.trajectory(inputs, network)
            return self.task.output(last)
        self.history = [self.task.output(state) for state in self.trajectory(inputs, network)]
        return self.history[-1]

    def trajectory(self, inputs: Tensor, network: nn.Module, **known: Tensor) -> Iterator[State]:
        """Yield the first state and the state after every step, the last of all steps settled.

        ``known`` is what more the task's ``reset`` takes.
        """
        self.task.eval()
        with quick_convolutions(inputs.device, half=self.half):
            state = self._begin(convert_to_tensor(inputs, track_meta=False), **known)
        yield state
        policy: Any = network
        after = follow(
            policy,
            self.task,
            state,
            self.steps,
            sample=self.sample,
            half=self.half,
            critic=self.critic,
            worth=self.worth,
        )
        for taken, state in enumerate(after, start=1):
            if taken == self.steps:
                with torch.no_grad():
                    state = self.task.settle(state, taken)
            yield state

    def _begin(self, inputs: Tensor, **known: Tensor) -> State:
        return self.task.reset(inputs, **known)


class FramewiseInferer(StepwiseInferer):
    """Stepwise inference over the frames of a clip, one call a frame, that carries on what it has from frame to frame.

    Two things make a clip steady: what the policy remembers (``carry``), and a share of each result that is not new but
    the result before, carried along the optical flow between the two frames, where it holds (as in Ruder et al.,
    Artistic style transfer for videos, arXiv 1604.08610)::

        result = styled + steadiness * holds * (warp(result before, flow) - styled)

    Frames of any size are padded to a multiple of :data:`~monai_rl_reg.recurrent.FOLD` inside.

    Args:
        task: the environment.
        steps: number of steps a frame.
        carry: entries of the state that go on to the next frame; none treats every frame by itself.
        steadiness: the share that is carried along the flow, from 0, none, to less than 1.

    Raises:
        ValueError: if ``steadiness`` is out of its range.
    """

    def __init__(
        self,
        task: Task,
        steps: int,
        *,
        carry: Sequence[str] = ("frame_memory",),
        steadiness: float = 0.0,
    ) -> None:
        super().__init__(task, steps)
        if not 0 <= steadiness < 1:
            raise ValueError(f"expected a steadiness from 0 to less than 1, got {steadiness}")
        self.carry = carry
        self.steadiness = steadiness
        self.warp = Warp("bilinear", "border")
        self.restart()

    def restart(self) -> None:
        """Forget: the next frame is the first of another clip."""
        self.carried: State = {}
        self.before: tuple[Tensor, Tensor] | None = None  # the last frame and its result

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the output for the next frame, (1, 3, H, W); with ``steadiness`` H and W are at least 12."""
        frame = convert_to_tensor(inputs, track_meta=False)
        height, width = frame.shape[2:]
        pads = [0, -width % FOLD, 0, -height % FOLD]
        *_, last = self.trajectory(F.pad(frame, pads, mode="replicate"), network)
        self.carried = {key: last[key] for key in self.carry}
        result = self.task.output(last)[..., :height, :width]
        if self.steadiness > 0:
            result = self._steady(frame, result)
        return result

    def _steady(self, frame: Tensor, result: Tensor) -> Tensor:
        if self.before is not None:
            frame_before, result_before = self.before
            flow, holds = flows_between([frame_before[0], frame[0]])[0]
            carried = self.warp(result_before, flow[None].to(result.device))
            result = result + self.steadiness * holds.to(result.device) * (carried - result)
        self.before = frame, result
        return result

    def _begin(self, inputs: Tensor, **known: Tensor) -> State:
        return super()._begin(inputs, **known) | self.carried
