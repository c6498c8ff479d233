"""A small network that sees the labelled structures in one image, for a registration trained with labels.

Labels say where a structure is, and that can be learnt from every image by itself: far faster than the same knowledge
from pairs. The policy then observes what is seen in both images, and has to bring the one onto the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.errors import InputError


class Anatomy(nn.Module):
    """A U-Net from an image to the probabilities of its structures. Any image size: padded inside, cropped outside.

    Args:
        spatial_dims: 2 or 3.
        structures: number K of structures, the label values 1 to K.
        channels: widths of the levels, finest first; the first one has half the image's resolution.
    """

    def __init__(self, spatial_dims: int, structures: int, *, channels: Sequence[int] = (16, 32, 64, 96)) -> None:
        super().__init__()
        self.stride = 2 ** len(channels)
        self.structures: Tensor
        self.register_buffer("structures", torch.tensor(structures))  # so that a checkpoint says how many
        self.network = UNet(
            spatial_dims,
            1,
            structures + 1,
            channels=channels,
            strides=[2] * (len(channels) - 1),
            num_res_units=2,
            norm="INSTANCE",
        )
        self.dice_cross_entropy = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the scores ``(B, 1 + K, *spatial)`` of background and structures in an image (B, 1, *spatial)."""
        pads = [p for n in image.shape[:1:-1] for p in (0, -n % self.stride)]
        scores: Tensor = self.network(F.pad(image, pads, mode="replicate") if any(pads) else image).float()
        for dim, n in enumerate(image.shape[2:], start=2):
            scores = scores.narrow(dim, 0, n)
        return scores

    @torch.no_grad()
    def see(self, image: Tensor) -> Tensor:
        """Return the probabilities (B, K, *spatial) of the structures in an image (B, 1, *spatial)."""
        return self(image).softmax(1)[:, 1:]

    def loss(self, image: Tensor, label: Tensor) -> Tensor:
        """Return soft Dice plus cross-entropy of an image's scores against its labels (B, 1, *spatial).

        Raises:
            InputError: if there is a label value above K.
        """
        if label.max() > self.structures:
            raise InputError(
                f"anatomy: expected the label values 1 to {int(self.structures)}, as many as the validation cases "
                f"have, found {int(label.max())} (name the values to use with labels)"
            )
        loss: Tensor = self.dice_cross_entropy(self(image), label)
        return loss
