"""Registration figures that MONAI lacks, one number a pair: a configuration makes metrics of them by ``loss_fn``."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_rl_reg.geometry import jacobian_determinant
from monai_rl_reg.losses import BoxLocalNormalizedCrossCorrelationLoss

UNLABELLED = -1
"""Value of a label map that stands for none: such an image is left out of whatever is computed from labels."""


def labelled(*labels: Tensor) -> Tensor:
    """Return which images of a batch, (B,), have all of these label maps (B, 1, *spatial)."""
    return torch.stack([label.flatten(1).amin(1) > UNLABELLED for label in labels]).all(0)


def label_dice(moved: Tensor, fixed: Tensor, *, nested: bool = False) -> Tensor:
    """Dice of every label value by counting, for label maps with any number of labels.

    Equal to :func:`monai.metrics.compute_dice` on one-hot maps, in one pass over the voxels instead of one a label.

    Args:
        moved: (B, 1, *spatial), integer label values, 0 background.
        fixed: likewise.
        nested: the region of a value is what has this value or a higher one.

    Returns:
        (B, L) for the values 1..L, L the largest value found; NaN where the fixed map lacks the label.
    """
    m, f = moved.flatten(1).long(), fixed.flatten(1).long()
    count = int(torch.maximum(m.amax(), f.amax())) + 1
    offset = torch.arange(len(m), device=m.device)[:, None] * count

    def histogram(values: Tensor) -> Tensor:
        counts = torch.bincount(values, minlength=len(m) * count).reshape(len(m), count)[:, 1:].float()
        return counts.flip(1).cumsum(1).flip(1) if nested else counts

    in_fixed = histogram((f + offset).flatten())
    in_moved = histogram((m + offset).flatten())
    in_both = histogram(((torch.minimum(f, m) if nested else torch.where(f == m, f, 0)) + offset).flatten())
    return torch.where(in_fixed > 0, 2 * in_both / (in_fixed + in_moved), torch.nan)


def mean_label_dice(moved: Tensor, fixed: Tensor, *, nested: bool = False) -> Tensor:
    """Mean over the labels that the fixed map has, (B,); NaN where it has none. Arguments as :func:`label_dice`."""
    return label_dice(moved, fixed, nested=nested).nanmean(1)


def folded_percent(displacement: Tensor) -> Tensor:
    """Percentage of voxels with a Jacobian determinant of zero or less, (B,), of a field (B, d, *spatial) in voxels."""
    return folding(jacobian_determinant(displacement))[0]


def log_jacobian_std(displacement: Tensor) -> Tensor:
    """Standard deviation of the log Jacobian determinant (SDlogJ), (B,), of a field (B, d, *spatial) in voxels.

    Determinants are clamped to [1e-9, 1e9] first, as in the Learn2Reg evaluation.
    """
    return folding(jacobian_determinant(displacement))[1]


def folding(determinant: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`folded_percent` and :func:`log_jacobian_std`, (B,) each, of a Jacobian determinant (B, *spatial)."""
    folded = 100 * (determinant <= 0).flatten(1).float().mean(1)
    return folded, determinant.clamp(1e-9, 1e9).log().flatten(1).std(1, correction=0)


def local_ncc(moved: Tensor, fixed: Tensor, kernel_size: int = 9, every: int = 1) -> Tensor:
    """Mean squared local NCC in [0, 1], (B,), of images (B, C, *spatial) scaled to [0, 1].

    Over the windows around every voxel or, in each direction, every second, third, ...
    """
    loss = BoxLocalNormalizedCrossCorrelationLoss(moved.ndim - 2, kernel_size, reduction="none", every=every)
    return -loss(moved, fixed).flatten(1).mean(1)
