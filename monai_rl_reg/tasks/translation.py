"""Image translation as a task: a source image, such as a label map, becomes its target by a few small corrections.

References:
    SAEC, arXiv 2112.07403; RL-I2IT, arXiv 2309.13672, sections on inpainting and photo translation; spectral
    normalisation, arXiv 1802.05957; least-squares adversarial loss, arXiv 1611.04076.
"""

from __future__ import annotations

import torch
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from monai_rl_reg.errors import InputError
from monai_rl_reg.tasks.task import Act, State, Task

GREY = 0.5
LEAST_SIZE = 12
"""Pixels a side that the discriminator needs, and SSIM in validation nearly as many."""
"""What the unknown part of a prediction starts as. A task starts from grey, not noise: randomness is the plan's."""


class TranslationTask(Task):
    """State: source, prediction so far and, where it is known, the target; all in [0, 1].

    The action is a correction that is added to the prediction. The reward of a step is the gain in PSNR::

        reward = reward_scale * (PSNR after - PSNR before),   PSNR in dB

    An episode terminates when the PSNR exceeds ``success``. The task loss is the L1 distance and, with a
    discriminator, a least-squares adversarial term; the discriminator's own term trains it alone, by the same
    backward: give its parameters an optimiser group of their own.

    Args:
        l1_weight: weight of the L1 term.
        adversarial_weight: weight of the adversarial term; at 0 there is no discriminator to train either.
        discriminator: judges source and prediction, (B, 6, H, W) of the region; None goes without.
        reward_scale: factor on the reward.
        success: PSNR in dB above which an episode has reached its goal.
    """

    replay_keys: tuple[str, ...] = ("source", "prediction", "target")

    def __init__(
        self,
        *,
        l1_weight: float = 10.0,
        adversarial_weight: float = 0.0,
        discriminator: nn.Module | None = None,
        reward_scale: float = 0.1,
        success: float = 40.0,
    ) -> None:
        super().__init__()
        self.l1_weight = l1_weight
        self.adversarial_weight = adversarial_weight
        self.discriminator = discriminator if adversarial_weight else None
        self.reward_scale = reward_scale
        self.success = success
        self.adversarial_loss = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)

    def reset(self, image: Tensor, label: Tensor | None = None) -> State:
        """Start from grey.

        Args:
            image: (B, C, H, W) in [0, 1], the source.
            label: (B, 3, H, W), the target.

        Raises:
            ValueError: if image or label are not of such a shape.
        """
        if image.ndim != 4:
            raise ValueError(f"expected images of shape (B, C, H, W), got {tuple(image.shape)}")
        if label is not None and label.shape[2:] != image.shape[2:]:
            raise ValueError(f"expected a label of the image's size {tuple(image.shape[2:])}, got {tuple(label.shape)}")
        image = image.float()
        state = {"source": image, "prediction": image.new_full((len(image), 3, *image.shape[2:]), GREY)}
        return state if label is None else state | {"target": label.float()}

    def region(self, x: Tensor) -> Tensor:
        """Return the part of x (B, C, H, W) that is being made, as a view: all of it."""
        return x

    def observe(self, state: State) -> Tensor:
        """Return (source, prediction so far), (B, C + 3, H, W)."""
        return torch.cat([state["source"], state["prediction"]], dim=1)

    def proposal(self, state: State, action: Tensor) -> Tensor:
        """Return what the step makes of the image, (B, 3, H, W) in [0, 1]: the prediction with the correction added."""
        return (state["prediction"] + action).clamp(0, 1)

    def advance(self, state: State, action: Tensor) -> State:
        """Take the proposal, with the correction ``action`` (B, 3, H, W), as the prediction."""
        return state | {"prediction": self.proposal(state, action)}

    def step(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        """Advance; return also the gain in PSNR, (B,), and whether it has reached ``success``, (B,)."""
        after = self.advance(state, action)
        before, psnr = self._psnr(state), self._psnr(after)
        return after, self.reward_scale * (psnr - before), psnr > self.success

    def loss(self, state: State, action: Tensor, act: Act) -> dict[str, Tensor]:
        """Return L1 and, with a discriminator, the adversarial term and the discriminator's own, of the proposal."""
        prediction, target = self.region(self.proposal(state, action)), self.region(state["target"])
        terms = {"l1": self.l1_weight * F.l1_loss(prediction, target)}
        if self.discriminator is not None:
            source = self.region(state["source"])
            made, real = torch.cat([source, prediction], 1), torch.cat([source, target], 1)
            # frozen by detached parameters, so that one backward serves both sides
            frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            terms["adversarial"] = self.adversarial_weight * self.adversarial_loss(
                functional_call(self.discriminator, frozen, (made,))[-1], True, False
            )
            terms["discriminator"] = 0.5 * (
                self.adversarial_loss(self.discriminator(made.detach())[-1], False, True)
                + self.adversarial_loss(self.discriminator(real)[-1], True, True)
            )
        return terms

    def output(self, state: State) -> Tensor:
        """Return the prediction, (B, 3, H, W) in [0, 1]."""
        return state["prediction"]

    def _psnr(self, state: State) -> Tensor:
        error = self.region(self.output(state)) - self.region(state["target"])
        return -10 * torch.log10(error.square().flatten(1).mean(1).clamp(min=1e-10))


class SpectralDiscriminator(PatchDiscriminator):
    """MONAI's patch discriminator in 2D with spectral normalisation of every convolution.

    Args:
        in_channels: channels of source and prediction together.
        channels: width of the first layer.
        layers: further layers; every one but the last halves the resolution, as the first does.
    """

    def __init__(self, in_channels: int = 6, *, channels: int = 32, layers: int = 2) -> None:
        super().__init__(2, channels, in_channels, num_layers_d=layers, norm=("INSTANCE", {}), bias=True)
        for module in list(self.modules()):
            if isinstance(module, nn.Conv2d):
                parametrizations.spectral_norm(module)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of every layer, and last the judgements of patches.

        Raises:
            InputError: if what it judges is smaller than :data:`LEAST_SIZE`.
        """
        if min(x.shape[2:]) < LEAST_SIZE:
            found = " x ".join(map(str, x.shape[2:]))
            raise InputError(
                f"picture: expected at least {LEAST_SIZE} pixels a side to be made, for the discriminator to judge, "
                f"found {found} (a larger image_size, or hole)"
            )
        features: list[Tensor] = super().forward(x)
        return features
