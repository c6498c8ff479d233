"""Small networks that see the labelled structures in one image, for a registration trained with labels.

Labels say where a structure is, and that can be learnt from every image by itself: far faster than the same knowledge
from pairs. The policy then observes what is seen in both images, and has to bring the one onto the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.engines import default_prepare_batch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.errors import InputError
from monai_rl_reg.metrics import labelled


class Anatomy(nn.Module):
    """U-Nets from an image to the probabilities of its structures. Any image size: padded inside, cropped outside.

    Its members learn from different images. In training one of them sees, drawn anew for every batch, so that the
    policy does not come to trust what is no more than one network's habit; otherwise what is seen is their mean.

    Args:
        spatial_dims: 2 or 3.
        structures: number K of structures, the label values 1 to K.
        members: number of U-Nets.
        channels: widths of the levels, finest first; the first one has half the image's resolution.
    """

    def __init__(
        self, spatial_dims: int, structures: int, *, members: int = 2, channels: Sequence[int] = (16, 32, 64, 96)
    ) -> None:
        super().__init__()
        self.stride = 2 ** len(channels)
        self.structures: Tensor
        self.register_buffer("structures", torch.tensor(structures))  # so that a checkpoint says how many
        self.members = nn.ModuleList(
            UNet(
                spatial_dims,
                1,
                structures + 1,
                channels=channels,
                strides=[2] * (len(channels) - 1),
                num_res_units=2,
                norm="INSTANCE",
            )
            for _ in range(members)
        )
        self.dice_cross_entropy = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the probabilities ``(B, 1 + K, *spatial)`` of background and structures in an image, mean of members.

        Args:
            image: (B, 1, *spatial).
        """
        return torch.stack([self._scores(member, image).softmax(1) for member in self.members]).mean(0)

    @torch.no_grad()
    def see(self, image: Tensor) -> Tensor:
        """Return the probabilities (B, K, *spatial) of the structures in an image (B, 1, *spatial)."""
        if not self.training:
            return self(image)[:, 1:]
        member = self.members[int(torch.randint(len(self.members), ()))]
        return self._scores(member, image).softmax(1)[:, 1:]

    def loss(self, image: Tensor, label: Tensor) -> Tensor:
        """Return soft Dice plus cross-entropy of scores against labels (B, 1, *spatial), mean of members.

        Images without labels are left out. The others are dealt out among the members, who all get the same where
        there are not enough.

        Raises:
            InputError: if there is a label value above K.
        """
        if label.max() > self.structures:
            raise InputError(
                f"anatomy: expected the label values 1 to {int(self.structures)}, as many as the validation cases "
                f"have, found {int(label.max())} (name the values to use with labels)"
            )
        known = labelled(label)
        if not known.any():
            return 0 * self(image[:1]).sum()
        image, label, count = image[known], label[known], len(self.members)
        parts = [slice(i, None, count) if len(image) >= count else slice(None) for i in range(count)]
        losses = [
            self.dice_cross_entropy(self._scores(member, image[part]), label[part])
            for member, part in zip(self.members, parts, strict=True)
        ]
        return torch.stack(losses).mean()

    def _scores(self, member: nn.Module, image: Tensor) -> Tensor:
        pads = [p for n in image.shape[:1:-1] for p in (0, -n % self.stride)]
        scores: Tensor = member(F.pad(image, pads, mode="replicate") if any(pads) else image).float()
        for dim, n in enumerate(image.shape[2:], start=2):
            scores = scores.narrow(dim, 0, n)
        return scores


def single_images(batch: Any, device: Any, non_blocking: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``prepare_batch`` of MONAI's engines: every image and label of a batch of pairs, each ``(2 B, 1, *spatial)``."""
    image, label = (
        convert_to_tensor(x, track_meta=False).transpose(0, 1).flatten(0, 1)[:, None]
        for x in default_prepare_batch(batch, device, non_blocking, **kwargs)[:2]
    )
    return image, label


def fixed_images(batch: Any, device: Any, non_blocking: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``prepare_batch`` of an evaluator, which wants one image an item: fixed ones, labels, ``(B, 1, *spatial)``."""
    pair: Any = default_prepare_batch(batch, device, non_blocking, **kwargs)
    return pair[0][:, :1], pair[1][:, :1]
