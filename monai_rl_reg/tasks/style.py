"""Image style transfer as a task: a photograph takes on the style of one painting, a little more with every step.

References:
    RL-NST, arXiv 2310.00405; RL-I2IT, arXiv 2309.13672, section on style transfer; perceptual losses, arXiv 1603.08155.
"""

from __future__ import annotations

import torch
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.features import FeatureNetwork
from monai_rl_reg.tasks.task import Act, State, Task


class StyleTask(Task):
    """State: content image and what it has become so far, both in [0, 1].

    The action is added to the image. An episode has no end of its own: the number of steps is the user's knob of
    stylisation. With F_l the features of layer l and G_l their Gram matrix::

        reward  = reward_scale * (log style before the step - log style after it)

        content = ||F_c(image) - F_c(content)||^2 / ||F_c(content)||^2
        style   = mean over l of ||G_l(image) - G_l(style)||^2 / ||G_l(style)||^2

    so that the weights mean the same for every feature network. The task loss adds the total variation.

    Args:
        features: the feature network; inference does without.
        style: the style image, (3, H, W) in [0, 1]; inference does without.
        content_layer: which of the network's layers the content loss looks at.
        content_weight: weight of the content loss.
        style_weight: weight of the style loss.
        variation_weight: weight of the total variation, the mean absolute difference of neighbouring pixels.
        reward_scale: factor on the reward.
    """

    replay_keys: tuple[str, ...] = ("content", "stylised")

    def __init__(
        self,
        features: FeatureNetwork | None = None,
        style: Tensor | None = None,
        *,
        content_layer: int = 1,
        content_weight: float = 1.0,
        style_weight: float = 3.0,
        variation_weight: float = 0.3,
        reward_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.features = features
        self.content_layer = content_layer
        self.content_weight = content_weight
        self.style_weight = style_weight
        self.variation_weight = variation_weight
        self.reward_scale = reward_scale
        self.levels = 0
        if features is not None and style is not None:
            with torch.no_grad():
                grams = [gram_matrix(x) for x in features(convert_to_tensor(style, track_meta=False)[None])]
            self.levels = len(grams)
            for level, gram in enumerate(grams):
                self.register_buffer(f"gram_{level}", gram)

    def reset(self, image: Tensor, label: Tensor | None = None) -> State:
        """Start from the content image (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: if it has another shape.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(image.shape)}")
        image = image.float()
        return {"content": image, "stylised": image}

    def observe(self, state: State) -> Tensor:
        """Return (content, stylised so far), (B, 6, H, W)."""
        return torch.cat([state["content"], state["stylised"]], dim=1)

    def advance(self, state: State, action: Tensor) -> State:
        """Add the action, (B, 3, H, W); the image stays in [0, 1]."""
        after = state | {"stylised": (state["stylised"] + action).clamp(0, 1)}
        after.pop("style_loss", None)  # was that of the state before
        return after

    def step(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        """Advance; return also the fall of the log style loss, (B,), and False, (B,): there is no end."""
        after = self.advance(state, action)
        before = state["style_loss"] if "style_loss" in state else self.style_loss(state)
        after["style_loss"] = self.style_loss(after)
        reward = self.reward_scale * (before / after["style_loss"]).log()
        return after, reward, torch.zeros_like(reward, dtype=torch.bool)

    def loss(self, state: State, action: Tensor, act: Act) -> dict[str, Tensor]:
        """Return content loss, style loss and total variation after the step."""
        return self.losses(self.advance(state, action))

    def losses(self, state: State) -> dict[str, Tensor]:
        """Return the weighted terms for a state."""
        features = self._features(state["stylised"])
        x = state["stylised"]
        variation = (x.diff(dim=2)).abs().mean() + (x.diff(dim=3)).abs().mean()
        return {
            "content": self.content_weight * self._content_loss(features, state).mean(),
            "style": self.style_weight * self._style_loss(features).mean(),
            "variation": self.variation_weight * variation,
        }

    def output(self, state: State) -> Tensor:
        """Return the stylised image, (B, 3, H, W) in [0, 1]."""
        return state["stylised"]

    @torch.no_grad()
    def style_loss(self, state: State) -> Tensor:
        """Return the style loss of each item, (B,), unweighted."""
        return self._style_loss(self._features(state["stylised"]))

    @torch.no_grad()
    def content_loss(self, state: State) -> Tensor:
        """Return the content loss of each item, (B,), unweighted."""
        return self._content_loss(self._features(state["stylised"]), state)

    def _features(self, image: Tensor, *, count: int | None = None) -> list[Tensor]:
        if self.features is None or not self.levels:
            raise ValueError("expected a feature network and a style image to judge a stylised image with")
        features: list[Tensor] = self.features(image, count=count)
        return features

    def _content_loss(self, features: list[Tensor], state: State) -> Tensor:
        with torch.no_grad():
            count = range(self.levels)[self.content_layer] + 1
            goal = self._features(state["content"], count=count)[-1]
        return _relative(features[self.content_layer], goal)

    def _style_loss(self, features: list[Tensor]) -> Tensor:
        grams = [self.get_buffer(f"gram_{level}") for level in range(self.levels)]
        distances = [_relative(gram_matrix(x), goal) for x, goal in zip(features, grams, strict=True)]
        return torch.stack(distances).mean(0)


def gram_matrix(features: Tensor) -> Tensor:
    """Return the Gram matrices (B, C, C) of features (B, C, H, W), per pixel, in fp32."""
    x = features.float().flatten(2)
    return x @ x.transpose(1, 2) / x.shape[2]


def _relative(x: Tensor, goal: Tensor) -> Tensor:
    error = F.mse_loss(x.float(), goal.float().expand_as(x), reduction="none").flatten(1).mean(1)
    return error / goal.float().square().flatten(1).mean(1).clamp(min=1e-12)
