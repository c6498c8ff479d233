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
from monai_rl_reg.tasks.style import StyleTask
from monai_rl_reg.tasks.task import Act, State
from monai_rl_reg.warping import Warp


class VideoStyleTask(StyleTask):
    """State: as in image style transfer, and two memories: of the steps so far and of the frames so far.

    The memories are part of the action, so that the policy stays a function of the observation: what it wants to
    remember it writes, and reads again with the next step. The step memory starts empty with every frame; the frame
    memory is carried on from the last step of one frame to the first of the next.

    A frame after the first starts with what the style has changed in the one before, carried along the optical flow
    (of which :class:`~monai_rl_reg.inferer.FramewiseInferer` lets a twentieth fade).
    The task loss teaches that on single pictures, without a video: the content is carried along a random smooth flow
    and gets noise, as if it were the next frame, there the policy takes one step more, and the two results have to
    differ by the flow alone. The terms of image style transfer are the means over both frames; ``next`` and ``start``
    stay in [0, 1]::

        next     = warp(content, flow) + noise
        start    = next + warp(stylised - content, flow)
        temporal = temporal_weight * mean |step(start; next) - warp(stylised, flow)|

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
        self.warp = Warp("bicubic", "border")  # bilinear blurs a little more with every frame

    def reset(
        self,
        image: Tensor,
        label: Tensor | None = None,
        *,
        start: Tensor | None = None,
        frame_memory: Tensor | None = None,
    ) -> State:
        """Start as in image style transfer, with an empty step memory.

        Args:
            image: the content, (B, 3, H, W) in [0, 1].
            label: there is none.
            start: (B, 3, H, W) in [0, 1]; None starts from the content.
            frame_memory: (B, 1, H, W), what the frame before has left; None starts with an empty one.

        Raises:
            ValueError: if the image has another shape.
            InputError: if H or W is no multiple of 4.
        """
        state = super().reset(image, label, start=start)
        if image.shape[2] % 4 or image.shape[3] % 4:
            size = " x ".join(map(str, image.shape[2:]))
            raise InputError(
                f"frames: expected sizes that are multiples of 4 (crop_size, image_size), found height x width {size}"
            )
        empty = torch.zeros_like(state["content"][:, :1])
        return state | {"step_memory": empty, "frame_memory": empty if frame_memory is None else frame_memory}

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
        """Return the terms of image style transfer, after this step and the next frame's, and the temporal loss."""
        after = self.advance(state, action)
        flow = self.random_flow(state["content"])
        frame = self.warp(state["content"], flow) + self.noise * torch.randn_like(state["content"])
        start = frame + self.warp(after["stylised"] - state["content"], flow)
        following = self.reset(frame.clamp(0, 1), start=start.clamp(0, 1), frame_memory=after["frame_memory"])
        following = self.advance(following, act(self.observe(following)))
        here, there = self.losses(after), self.losses(following)
        difference = following["stylised"] - self.warp(after["stylised"], flow)
        terms = {name: (here[name] + there[name]) / 2 for name in here}
        return terms | {"temporal": self.temporal_weight * difference.abs().mean()}

    def random_flow(self, image: Tensor) -> Tensor:
        """Return a random smooth flow (B, 2, H, W) in pixels for images of this shape."""
        coarse = self.flow * torch.randn(len(image), 2, 4, 4, device=image.device)
        return F.interpolate(coarse, size=image.shape[2:], mode="bicubic", align_corners=False)
