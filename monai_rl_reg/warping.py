"""Moving images by displacement fields: what MONAI's Warp and torch's interpolation give, in half their time."""

from __future__ import annotations

import torch
from monai.networks import blocks
from monai.networks.blocks import warp as monai_warp
from torch import Tensor
from torch.nn import functional as F


class Warp(blocks.Warp):
    """:class:`monai.networks.blocks.Warp`, the same images in half the time.

    MONAI keeps one grid of coordinates, made anew whenever the size changes, and passes over the volume eight times
    before it samples. Here each direction is scaled and shifted in one pass and the grid goes to torch as it lies.
    """

    def forward(self, image: Tensor, ddf: Tensor) -> Tensor:
        """Return the image (B, C, *spatial) moved by a displacement (B, d, *spatial) in voxels.

        Raises:
            ValueError: if the two do not fit together.
        """
        dims = image.ndim - 2
        if monai_warp.USE_COMPILED or dims not in (2, 3) or ddf.shape != (len(image), dims, *image.shape[2:]):
            moved: Tensor = super().forward(image, ddf)  # has its own sampling, or the right words for what is wrong
            return moved
        coordinates = []
        for dim in reversed(range(dims)):  # torch counts from the last direction
            n = image.shape[dim + 2]
            scale = 2 / max(n - 1, 1)
            at_rest = scale * torch.arange(n, dtype=ddf.dtype, device=ddf.device) - 1
            at_rest = at_rest.reshape(-1, *[1] * (dims - 1 - dim))
            coordinates.append(torch.add(at_rest, ddf[:, dim], alpha=scale))
        moved = F.grid_sample(
            image,
            torch.stack(coordinates, dim=1).movedim(1, -1),
            mode=self._interp_mode_native,
            padding_mode=self._padding_mode_native,
            align_corners=True,
        )
        return moved


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Return ``x`` (B, C, *spatial) linearly interpolated to ``factor`` times its size in every direction.

    :func:`torch.nn.functional.interpolate`, in 3D in one direction and then in the other two.
    """
    if x.ndim == 4:
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    batch, channels, *size = x.shape
    first = F.interpolate(x.flatten(3), scale_factor=(factor, 1), mode="bilinear", align_corners=False)
    return enlarge(first.reshape(batch, -1, *size[1:]), factor).reshape(batch, channels, *(factor * n for n in size))
