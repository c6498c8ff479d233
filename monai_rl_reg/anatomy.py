"""A small network that sees the labelled structures in one image, for a registration trained with labels.

Labels say where a structure is, and that can be learnt from every image by itself: far faster than the same knowledge
from pairs. The policy then observes what is seen in both images, and has to bring the one onto the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.engines import default_prepare_batch
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.errors import InputError
from monai_rl_reg.metrics import labelled
from monai_rl_reg.networks import channels_last


class Anatomy(nn.Module):
    """A U-Net from an image to the probabilities of its structures. Any image size: padded inside, cropped outside.

    Its first level is at full resolution, and narrow: how well an outline is seen bounds how well it can be met.

    Args:
        spatial_dims: 2 or 3.
        structures: number K of structures, the label values 1 to K.
        channels: widths of the levels, finest first, each at half the resolution of the one before.
    """

    def __init__(self, spatial_dims: int, structures: int, *, channels: Sequence[int] = (8, 32, 64, 96)) -> None:
        super().__init__()
        self.stride = 2 ** (len(channels) - 1)
        self.structures: Tensor
        self.register_buffer("structures", torch.tensor(structures))  # so that a checkpoint says how many
        coarser = [2] * (len(channels) - 1)
        self.unet = DynUNet(
            spatial_dims,
            1,
            structures + 1,
            kernel_size=[3] * len(channels),
            strides=[1, *coarser],
            upsample_kernel_size=coarser,
            filters=list(channels),
            norm_name="instance",
        )
        self.dice_cross_entropy = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the probabilities ``(B, 1 + K, *spatial)`` of background and structures in an image.

        Args:
            image: (B, 1, *spatial).
        """
        # torch's softmax over channels rounds by where its threads' shares end; this one by nothing of the kind
        return self._scores(image).log_softmax(1).exp()

    @torch.no_grad()
    def see(self, image: Tensor) -> Tensor:
        """Return the probabilities (B, K, *spatial) of the structures in an image (B, 1, *spatial)."""
        return self(image)[:, 1:]

    def loss(self, image: Tensor, label: Tensor) -> Tensor:
        """Return soft Dice plus cross-entropy of the scores against labels (B, 1, *spatial).

        Images without labels are left out.

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
        loss: Tensor = self.dice_cross_entropy(self._scores(image[known]), label[known])
        return loss

    def _scores(self, image: Tensor) -> Tensor:
        least = 2 * self.stride  # the coarsest level is normalised over its voxels: there must be several
        pads = [p for n in image.shape[:1:-1] for p in (0, max(least, n + -n % self.stride) - n)]
        padded = F.pad(image, pads, mode="replicate") if any(pads) else image
        scores: Tensor = self.unet(channels_last(padded)).float()
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
