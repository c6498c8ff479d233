"""A policy with memory: planner and actor behind two convolutional gated recurrent units.

References:
    RL-NST, arXiv 2310.00405; convolutional GRU, arXiv 1511.06432.
"""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.networks import ACTIVATION, PlannerActor

FOLD = 4
"""A memory has FOLD * FOLD channels at 1 / FOLD of the resolution; folded it is one channel of the image's size."""


def fold(memory: Tensor) -> Tensor:
    """Return a memory (B, 16, H / 4, W / 4) as one channel, (B, 1, H, W)."""
    return F.pixel_shuffle(memory, FOLD)


def unfold(memory: Tensor) -> Tensor:
    """Return a folded memory (B, 1, H, W) as (B, 16, H / 4, W / 4)."""
    return F.pixel_unshuffle(memory, FOLD)


class ConvolutionalGRU(nn.Module):
    """Gated recurrent unit whose products are 3 x 3 convolutions.

    Args:
        channels: of the input and of the memory.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.candidate = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Return the new memory from input and memory, (B, C, H, W) each; it lies in (-1, 1)."""
        update, reset = torch.sigmoid(self.gates(torch.cat([x, memory], dim=1))).chunk(2, dim=1)
        candidate = torch.tanh(self.candidate(torch.cat([x, reset * memory], dim=1)))
        return (1 - update) * memory + update * candidate


class RecurrentPlannerActor(nn.Module):
    """Planner and actor that see, beside the images, what two memories recall.

    Observation and action carry each memory as one folded channel, after the images; so the recurrent policy is used,
    trained and replayed like any other. The step memory's unit reads the images, the frame memory's unit reads the
    step memory.

    Args:
        policy: planner and actor for ``in_channels`` of the images and ``recalled`` channels more.
        in_channels: channels of the images in the observation.
        recalled: channels in which the policy sees the memories.
    """

    def __init__(self, policy: PlannerActor, in_channels: int, *, recalled: int = 4) -> None:
        super().__init__()
        width = FOLD * FOLD
        self.policy = policy
        self.plan_shape = policy.plan_shape
        self.read = nn.Sequential(
            Convolution(2, in_channels, width, strides=2, act=ACTIVATION, norm=None),
            Convolution(2, width, width, strides=2, act=ACTIVATION, norm=None),
        )
        self.step_memory = ConvolutionalGRU(width)
        self.frame_memory = ConvolutionalGRU(width)
        self.recall = nn.Conv2d(width, recalled, 1)

    def forward(self, observation: Tensor) -> Tensor:
        """One deterministic step: (B, in_channels + 2, H, W) to action and memories, (B, out_channels + 2, H, W)."""
        return self.decide(observation)[1]

    def decide(self, observation: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the mode of the plan, the action with the memories, and the planner's features."""
        recalled, memories = self._remember(observation)
        plan, action, features = self.policy.decide(recalled)
        return plan, torch.cat([action, memories], dim=1), features

    @torch.jit.unused
    def sample(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """One stochastic step: plan, its log-probability, the action with the memories, and the planner's features."""
        recalled, memories = self._remember(observation)
        plan, log_prob, action, features = self.policy.sample(recalled)
        return plan, log_prob, torch.cat([action, memories], dim=1), features

    @torch.jit.unused
    def draw(self, observation: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Draw a plan without acting on it; return its log-probability and the planner's features too."""
        return self.policy.draw(self._remember(observation)[0])

    def _remember(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        images = observation[:, :-2]
        # FOLD by its number, and not by fold and unfold: TorchScript knows no global variables
        step = self.step_memory(self.read(images), F.pixel_unshuffle(observation[:, -2:-1], 4))
        frame = self.frame_memory(step, F.pixel_unshuffle(observation[:, -1:], 4))
        recalled = F.interpolate(self.recall(frame), size=images.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([images, recalled], dim=1), torch.cat(
            [F.pixel_shuffle(step, 4), F.pixel_shuffle(frame, 4)], dim=1
        )
