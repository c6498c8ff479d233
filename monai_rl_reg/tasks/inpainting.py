"""Inpainting as a task: the hole of an image is filled with the mean of several looks at it, each from another side.

References:
    SAEC, arXiv 2112.07403; RL-I2IT, arXiv 2309.13672, section on inpainting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.tasks.task import State
from monai_rl_reg.tasks.translation import GREY, TranslationTask


class InpaintingTask(TranslationTask):
    """State: the image with its hole, the hole as filled so far, the number of looks and, where known, the image.

    Each step looks at the image turned another way (upright, then mirrored, ...) and its action is its proposal for
    the hole. The prediction after n steps is the mean of their n proposals::

        prediction after = prediction + (proposal - prediction) / (looks + 1)

    What a look gets wrong on an image it has not learnt, the next one gets wrong otherwise, and the mean of both is
    nearer than either. For that a look sees the source alone, and the loss is that of its proposal alone: looks
    that see and mend what was filled in before learn to lean on it, as on the images they learn from it is right.

    Reward, end and loss are those of :class:`TranslationTask`, in the hole.

    Args:
        hole: the share of height and width that the central hole takes.
        views: ways to look at an image, 1, 2 or 4: the first is upright, every other one mirrored, every other pair
            upside down.
        options: of :class:`TranslationTask`.

    Raises:
        ValueError: if ``views`` is another number.
        InputError: if ``hole`` is not above 0 and up to 1.
    """

    replay_keys: tuple[str, ...] = ("source", "prediction", "target", "looks")

    def __init__(self, *, hole: float = 0.5, views: int = 2, **options: Any) -> None:
        super().__init__(**options)
        if views not in (1, 2, 4):
            raise ValueError(f"views must be 1, 2 or 4, got {views}")
        if not 0 < hole <= 1:
            raise InputError(f"hole: expected a share above 0 and up to 1, found {hole}")
        self.hole = hole
        self.views = views

    def reset(self, image: Tensor, label: Tensor | None = None) -> State:
        """Cut the hole out of an image (B, 3, H, W) in [0, 1], which is the target; ``label`` is not read.

        Raises:
            ValueError: if the image is not of such a shape.
        """
        state = super().reset(image, image)
        source = state["source"].clone()
        self.region(source).fill_(GREY)
        looks = torch.zeros(len(image), dtype=torch.long, device=image.device)
        return state | {"source": source, "prediction": source, "looks": looks}

    def region(self, x: Tensor) -> Tensor:
        """Return the hole of x (B, C, H, W), as a view."""
        for dim in (2, 3):
            size = round(x.shape[dim] * self.hole)
            x = x.narrow(dim, (x.shape[dim] - size) // 2, size)
        return x

    def observe(self, state: State) -> Tensor:
        """Return the source, (B, 3, H, W), turned as the step looks at it."""
        return self._turned(state["source"], state)

    def proposal(self, state: State, action: Tensor) -> Tensor:
        """Return the source with the action, (B, 3, H, W), turned back and added; in [0, 1]."""
        return (state["source"] + self._turned(action, state)).clamp(0, 1)

    def advance(self, state: State, action: Tensor) -> State:
        """Take the proposal of ``action``, (B, 3, H, W), into the mean; outside of the hole nothing changes."""
        share = 1 / (state["looks"] + 1)[:, None, None, None]
        prediction = state["prediction"].clone()
        self.region(prediction).lerp_(self.region(self.proposal(state, action)), share)
        return state | {"prediction": prediction, "looks": state["looks"] + 1}

    def _turned(self, x: Tensor, state: State) -> Tensor:
        """Return x (B, C, H, W) turned as the step looks at it, which is also how it is turned back."""
        for k, dim in enumerate((3, 2)[: self.views // 2]):
            turned = state["looks"] >> k & 1 == 1
            x = torch.where(turned[:, None, None, None], x.flip(dim), x)
        return x
