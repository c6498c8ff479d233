"""Image translation as a task: a source image becomes its target by a few small corrections.

Two tasks share it: face inpainting, where the source is the photograph with a hole, and photo translation, where it
is a label map.

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

from monai_rl_reg.tasks.task import Act, State, Task

GREY = 0.5
"""What the unknown part of a prediction starts as. A task starts from grey, not noise: randomness is the plan's."""


class TranslationTask(Task):
    """State: source, prediction so far and, where it is known, the target; all in [0, 1].

    The action is a correction that is added to the prediction. The reward of a step is the gain in PSNR::

        reward = reward_scale * (PSNR after - PSNR before),   PSNR in dB

    An episode terminates when the PSNR exceeds ``success``. The task loss is the L1 distance and, with a
    discriminator, a least-squares adversarial term; the discriminator's own term trains it alone, by the same
    backward: give its parameters an optimiser group of their own.

    Args:
        hole: inpainting: the share of height and width that the central hole takes; the source is then the image
            itself with the hole cut out, and the image is the target. None translates the whole image.
        mirror: every other step looks at the mirror image of what there is, and its action is mirrored back. For
            pictures that are as likely as their mirror images, such as faces: what a step gets wrong from one side,
            the next one sees from the other.
        l1_weight: weight of the L1 term.
        adversarial_weight: weight of the adversarial term.
        discriminator: judges source and prediction, (B, 6, H, W) of the region; None goes without.
        reward_scale: factor on the reward.
        success: PSNR in dB above which an episode has reached its goal.
    """

    replay_keys: tuple[str, ...] = ("source", "prediction", "target")

    def __init__(
        self,
        *,
        hole: float | None = None,
        mirror: bool = False,
        l1_weight: float = 10.0,
        adversarial_weight: float = 0.0,
        discriminator: nn.Module | None = None,
        reward_scale: float = 0.1,
        success: float = 40.0,
    ) -> None:
        super().__init__()
        self.hole = hole
        self.mirror = mirror
        if mirror:
            self.replay_keys = (*self.replay_keys, "mirrored")
        self.l1_weight = l1_weight
        self.adversarial_weight = adversarial_weight
        self.discriminator = discriminator
        self.reward_scale = reward_scale
        self.success = success
        self.adversarial_loss = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)

    def reset(self, image: Tensor, label: Tensor | None = None) -> State:
        """Start from grey where the image is to be made.

        Args:
            image: (B, C, H, W) in [0, 1]: the source; for inpainting the photograph, whose hole is cut out here.
            label: (B, 3, H, W), the target; for inpainting it is the image.

        Raises:
            ValueError: if image or label are not of such a shape.
        """
        if image.ndim != 4:
            raise ValueError(f"expected images of shape (B, C, H, W), got {tuple(image.shape)}")
        if label is not None and label.shape[2:] != image.shape[2:]:
            raise ValueError(f"expected a label of the image's size {tuple(image.shape[2:])}, got {tuple(label.shape)}")
        image = image.float()
        state = {"mirrored": torch.zeros(len(image), dtype=torch.bool, device=image.device)} if self.mirror else {}
        if self.hole is None:
            state |= {"source": image, "prediction": torch.full_like(image[:, :3], GREY)}
            return state if label is None else state | {"target": label.float()}
        source = image.clone()
        self.region(source).fill_(GREY)
        return state | {"source": source, "prediction": source, "target": image}

    def region(self, x: Tensor) -> Tensor:
        """Return the part of x (B, C, H, W) that is being made, as a view: the hole, or all of it."""
        if self.hole is None:
            return x
        for dim in (2, 3):
            size = round(x.shape[dim] * self.hole)
            x = x.narrow(dim, (x.shape[dim] - size) // 2, size)
        return x

    def observe(self, state: State) -> Tensor:
        """Return (source, prediction so far), (B, C + 3, H, W), as the step looks at it."""
        return self._turned(torch.cat([state["source"], state["prediction"]], dim=1), state)

    def advance(self, state: State, action: Tensor) -> State:
        """Add the correction ``action``, (B, 3, H, W), where the image is being made; it stays in [0, 1]."""
        prediction = (state["prediction"] + self._turned(action, state)).clamp(0, 1)
        if self.hole is not None:
            filled = state["prediction"].clone()
            self.region(filled).copy_(self.region(prediction))
            prediction = filled
        after = state | {"prediction": prediction}
        return after | {"mirrored": ~state["mirrored"]} if self.mirror else after

    def step(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        """Advance; return also the gain in PSNR, (B,), and whether it has reached ``success``, (B,)."""
        after = self.advance(state, action)
        before, psnr = self._psnr(state), self._psnr(after)
        return after, self.reward_scale * (psnr - before), psnr > self.success

    def loss(self, state: State, action: Tensor, act: Act) -> dict[str, Tensor]:
        """Return L1 and, with a discriminator, the adversarial term and the discriminator's own, after the step."""
        prediction, target = self.region(self.advance(state, action)["prediction"]), self.region(state["target"])
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

    def _turned(self, x: Tensor, state: State) -> Tensor:
        """Return x (B, C, H, W), mirrored where the step looks at the mirror image: there, and back again."""
        return torch.where(state["mirrored"][:, None, None, None], x.flip(3), x) if self.mirror else x

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
