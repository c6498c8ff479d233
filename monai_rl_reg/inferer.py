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

KEPT = 0.95
"""Share of what is carried to the next frame: with all of it strokes heap up, and after 100 frames hide the picture."""
SAME_COLOUR = 0.1
"""Most that a colour changes from one frame to the next, along the flow, unless something else is shown."""
SAME_SHOT = 0.3
"""Share of a frame where the flow holds and colours stay, unless there is a cut: from 0.44 up within the clips of
DAVIS, up to 0.01 from one to another, and up to 0.07 from black or white, where any flow holds (0.37 from a grey)."""


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
            state = self.task.reset(convert_to_tensor(inputs, track_meta=False), **known)
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


class FramewiseInferer(Inferer):
    """Stepwise inference over the frames of a clip, one call a frame, in which each frame goes on from the one before.

    The first frame starts as itself. Every other one starts with what the style has changed in the one before, carried
    along the optical flow, and as itself where the flow does not hold (after Ruder et al., Artistic style transfer for
    videos, arXiv 1604.08610, who carry the result itself; over many frames that loses what is shown)::

        start = frame + 0.95 * holds * warp(result before - frame before, flow)

    so that few steps are left to take, and what moves keeps what it was given; what was carried wrongly fades. At a
    cut, where the flow hardly holds anywhere or leads to other colours, the next frame is a first one, and so is one of
    another size.

    Frames of any size are padded to a multiple of :data:`~monai_rl_reg.recurrent.FOLD` inside.

    Args:
        task: the environment.
        steps: number of steps of a first frame.
        next_steps: of every other one, at most ``steps``.
        carry: entries of the state that go on to the next frame; the task's ``reset`` takes them.

    Raises:
        ValueError: if a number of steps is negative.
    """

    def __init__(
        self, task: Task, steps: int, *, next_steps: int = 2, carry: Sequence[str] = ("frame_memory",)
    ) -> None:
        super().__init__()
        self.first = StepwiseInferer(task, steps)
        self.next = StepwiseInferer(task, min(steps, next_steps))
        self.task = task
        self.carry = carry
        self.warp = Warp("bicubic", "border")  # bilinear blurs a little more with every frame
        self.restart()

    def restart(self) -> None:
        """Forget: the next frame is the first of another clip."""
        self.carried: State = {}
        self.before: tuple[Tensor, Tensor] | None = None  # the last frame and its result

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the output for the next frame, (1, 3, H, W).

        Raises:
            ValueError: if it is a batch of several.
            InputError: if H or W is below 12, which the optical flow needs.
        """
        frame = convert_to_tensor(inputs, track_meta=False)
        if len(frame) != 1:
            raise ValueError(f"expected one frame at a time, got {len(frame)}")
        height, width = frame.shape[2:]
        pads = [0, -width % FOLD, 0, -height % FOLD]
        padded, start = F.pad(frame, pads, mode="replicate"), self._start(frame)
        if start is None:
            states = self.first.trajectory(padded, network)
        else:
            start = F.pad(start, pads, mode="replicate")
            states = self.next.trajectory(padded, network, start=start, **self.carried)
        *_, last = states
        self.carried = {key: last[key] for key in self.carry}
        result = self.task.output(last)[..., :height, :width]
        self.before = frame, result
        return result

    def _start(self, frame: Tensor) -> Tensor | None:
        """What a frame starts from; None if it is a first one."""
        if self.before is None or self.before[0].shape != frame.shape:
            return None
        frame_before, result_before = self.before
        flow, holds = (x[None].to(frame.device) for x in flows_between([frame_before[0], frame[0]])[0])
        stays = (self.warp(frame_before, flow) - frame).abs().mean(1, keepdim=True) < SAME_COLOUR
        if (holds & stays).float().mean() < SAME_SHOT:
            return None
        return (frame + KEPT * holds * self.warp(result_before - frame_before, flow)).clamp(0, 1)
