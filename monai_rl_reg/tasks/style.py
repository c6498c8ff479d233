"""Image style transfer as a task: a photograph takes on the style of one painting, a little more with every step.

References:
    RL-NST, arXiv 2310.00405; RL-I2IT, arXiv 2309.13672, section on style transfer; perceptual losses, arXiv 1603.08155.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.checkpoints import load_checkpoint
from monai_rl_reg.errors import InputError
from monai_rl_reg.features import FeatureNetwork
from monai_rl_reg.tasks.task import Act, State, Task

LEAST_SIZE = 16
"""Pixels a side that a feature network needs."""
SETTINGS = ("guided", "content_layer", "content_weight", "style_weight", "variation_weight")
"""What a policy's observation and losses depend on beside the style and the feature network."""


class StyleTask(Task):
    """State: content image and what it has become so far, both in [0, 1].

    The action is added to the image. An episode has no end of its own: the number of steps is the user's knob of
    stylisation. With F_l the features of layer l and G_l their Gram matrix::

        reward  = reward_scale * (log style before the step - log style after it)

        content = ||F_c(image) - F_c(content)||^2 / ||F_c(content)||^2
        style   = mean over l of ||G_l(image) - G_l(style)||^2 / ||G_l(style)||^2

    so that the weights mean the same for every feature network. The task loss adds the total variation.

    Args:
        features: the feature network; inference does without unless ``guided``.
        style: the style image, (3, H, W) in [0, 1]; inference does without unless ``guided``.
        guided: whether the :meth:`pull` of the task loss is observed beside the images: where each pixel should go,
            so that the policy has to find how far, and what goes together.
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
        guided: bool = False,
        content_layer: int = 1,
        content_weight: float = 1.0,
        style_weight: float = 3.0,
        variation_weight: float = 0.3,
        reward_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.features = features
        self.guided = guided
        self.content_layer = content_layer
        self.content_weight = content_weight
        self.style_weight = style_weight
        self.variation_weight = variation_weight
        self.reward_scale = reward_scale
        self.style: Tensor | None = None
        self.levels = 0
        if features is not None and style is not None:
            self.look(features, style)

    def look(self, features: FeatureNetwork, style: Tensor) -> None:
        """Take this feature network and this style."""
        self.features = features
        self.style = convert_to_tensor(style, track_meta=False)
        with torch.no_grad():
            grams = [gram_matrix(x) for x in features(self.style[None])]
        self.levels = len(grams)
        for level, gram in enumerate(grams):
            self.register_buffer(f"gram_{level}", gram)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what :func:`load_style` fills another task with."""
        network = None if self.features is None else self.features.network
        return {"style": self.style, "network": network} | {name: getattr(self, name) for name in SETTINGS}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take on the style that the Gram matrices beside it are of; the weights stay those of the configuration."""
        self.style = state["style"]

    def reset(self, image: Tensor, label: Tensor | None = None, *, start: Tensor | None = None) -> State:
        """Start from the content image (B, 3, H, W) in [0, 1], or from what it has become already.

        Args:
            image: the content.
            label: there is none.
            start: (B, 3, H, W) in [0, 1]; None starts from the content.

        Raises:
            ValueError: if it has another shape.
            InputError: if it is too small for a policy that is guided.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(image.shape)}")
        if self.guided and min(image.shape[2:]) < LEAST_SIZE:
            found = " x ".join(map(str, image.shape[2:]))
            raise InputError(f"picture: expected at least {LEAST_SIZE} pixels a side, for its features, found {found}")
        image = image.float()
        return {"content": image, "stylised": image if start is None else start.float()}

    def observe(self, state: State) -> Tensor:
        """Return (content, stylised so far), (B, 6, H, W), and if ``guided`` the pull, (B, 9, H, W)."""
        seen = [state["content"], state["stylised"]]
        return torch.cat([*seen, self.pull(state)] if self.guided else seen, dim=1)

    def pull(self, state: State) -> Tensor:
        """Return the change of each pixel by which the task loss falls fastest, (B, 3, H, W).

        Its root mean square is 1 in every item, so that it does not depend on the image's size, nor on how far there
        is to go; no gradient flows back through it.
        """
        device = state["content"].device.type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            x = state["stylised"].detach().clone().requires_grad_()
            losses = self.losses({"content": state["content"].detach().clone(), "stylised": x})
            (slope,) = torch.autograd.grad(torch.stack(list(losses.values())).sum(), x)
        typical = slope.square().mean((1, 2, 3), keepdim=True).sqrt()
        return -slope / typical.clamp(min=torch.finfo(typical.dtype).tiny)

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


def load_style(
    task: StyleTask,
    path: str,
    *,
    feature_weights: str | None = None,
    judge: bool = False,
    map_location: str | torch.device = "cpu",
) -> StyleTask:
    """Give a task the style and the settings that a policy was trained with, from a checkpoint of the training.

    Args:
        task: gets them.
        path: of the checkpoint.
        feature_weights: a file with the feature network's weights; None downloads torchvision's.
        judge: whether the task will be asked for its losses; the feature network is loaded for these and for a policy
            that is guided.
        map_location: where the task goes.

    Raises:
        InputError: if the file is missing, is no checkpoint or holds no style, or the feature network cannot be had.
    """
    checkpoint = load_checkpoint(path)
    kept = checkpoint.get("task", {}).get("_extra_state")
    if not isinstance(kept, dict) or kept.get("style") is None or kept.get("network") is None:
        raise InputError(f"checkpoint {path}: expected one of image style transfer with its style, found none in it")
    for name in SETTINGS:
        setattr(task, name, kept[name])
    if judge or task.guided:
        task.look(FeatureNetwork(kept["network"], weights=feature_weights), kept["style"])
        if not all(
            torch.allclose(task.get_buffer(name), checkpoint["task"][name], rtol=0.05, atol=1e-6)
            for name in (f"gram_{level}" for level in range(task.levels))
        ):
            raise InputError(
                f"checkpoint {path}: expected the weights of {kept['network']} that it was trained with, found others "
                "(name their file with feature_weights)"
            )
    return task.to(map_location)


def gram_matrix(features: Tensor) -> Tensor:
    """Return the Gram matrices (B, C, C) of features (B, C, H, W), per pixel, in fp32."""
    x = features.float().flatten(2)
    with torch.autocast(x.device.type, enabled=False):  # whose fp16 ends at 65504
        return x @ x.transpose(1, 2) / x.shape[2]


def _relative(x: Tensor, goal: Tensor) -> Tensor:
    error = F.mse_loss(x.float(), goal.float().expand_as(x), reduction="none").flatten(1).mean(1)
    return error / goal.float().square().flatten(1).mean(1).clamp(min=1e-12)
