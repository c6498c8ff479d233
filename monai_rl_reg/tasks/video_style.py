"""Video style transfer as a task: image style transfer that remembers, and is taught to be steady from frame to frame.

References:
    RL-NST, arXiv 2310.00405; Consistent Video Style Transfer via Compound Regularization, AAAI 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.errors import InputError
from monai_rl_reg.features import FeatureNetwork
from monai_rl_reg.recurrent import fold, unfold
from monai_rl_reg.tasks.style import StyleTask
from monai_rl_reg.tasks.task import Act, State
from monai_rl_reg.warping import Warp


class VideoStyleTask(StyleTask):
    """State: as in image style transfer, and two memories: of the steps so far and of the frames so far.

    The memories are part of the action, so that the policy stays a function of the observation: what it wants to
    remember it writes, and reads again with the next step. The step memory starts empty with every frame; the frame
    memory is carried on from the last step of one frame to the first of the next.

    The task loss adds the compound temporal loss: the frame is warped by a random smooth flow and gets noise, as if
    it were the next frame, and the two results have to differ by the flow alone::

        temporal = temporal_weight * mean |warp(styled(frame), flow) - styled(warp(frame, flow) + noise)|

    so that single pictures teach it, without a video.

    Args:
        features, style, kwargs: as in :class:`~monai_rl_reg.tasks.style.StyleTask`.
        temporal_weight: weight of the temporal term.
        flow: standard deviation of the random flow, in pixels.
        noise: standard deviation of the noise, in intensities.
    """

    replay_keys = ("content", "stylised", "step_memory", "frame_memory")

    def __init__(
        self,
        features: FeatureNetwork | None = None,
        style: Tensor | None = None,
        *,
        temporal_weight: float = 10.0,
        flow: float = 4.0,
        noise: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(features, style, **kwargs)
        self.temporal_weight = temporal_weight
        self.flow = flow
        self.noise = noise
        self.warp = Warp("bilinear", "border")

    def reset(self, image: Tensor, label: Tensor | None = None) -> State:
        """Start from the content image (B, 3, H, W) with empty memories.

        Raises:
            ValueError: if it has another shape.
            InputError: if H or W is no multiple of 4.
        """
        state = super().reset(image, label)
        if image.shape[2] % 4 or image.shape[3] % 4:
            size = " x ".join(map(str, image.shape[2:]))
            raise InputError(
                f"frames: expected sizes that are multiples of 4 (crop_size, image_size), found height x width {size}"
            )
        empty = torch.zeros_like(state["content"][:, :1])
        return state | {"step_memory": empty, "frame_memory": empty}

    def observe(self, state: State) -> Tensor:
        """Return (content, stylised so far, step memory, frame memory), (B, 8, H, W), with ``guided`` the pull before
        the memories, (B, 11, H, W).
        """
        return torch.cat([super().observe(state), state["step_memory"], state["frame_memory"]], dim=1)

    def advance(self, state: State, action: Tensor) -> State:
        """Add the picture's part of the action (B, 5, H, W) and keep the memories' part."""
        memories = {"step_memory": action[:, 3:4], "frame_memory": action[:, 4:5]}
        return super().advance(state, action[:, :3]) | memories

    def loss(self, state: State, action: Tensor, act: Act) -> dict[str, Tensor]:
        """Return the terms of image style transfer and the compound temporal loss."""
        after = self.advance(state, action)
        flow = self.random_flow(state["content"])
        noise = self.noise * torch.randn_like(state["content"])  # one for both: a frame starts as its own content
        moved = state | {
            "content": self.warp(state["content"], flow) + noise,
            "stylised": self.warp(state["stylised"], flow) + noise,
            "step_memory": fold(self.warp(unfold(state["step_memory"]), F.avg_pool2d(flow, 4) / 4)),
            "frame_memory": after["frame_memory"],  # what the frame before has left
        }
        moved = self.advance(moved, act(self.observe(moved)))
        difference = self.warp(after["stylised"], flow) - moved["stylised"]
        return self.losses(after) | {"temporal": self.temporal_weight * difference.abs().mean()}

    def random_flow(self, image: Tensor) -> Tensor:
        """Return a random smooth flow (B, 2, H, W) in pixels for images of this shape."""
        coarse = self.flow * torch.randn(len(image), 2, 4, 4, device=image.device)
        return F.interpolate(coarse, size=image.shape[2:], mode="bicubic", align_corners=False)
