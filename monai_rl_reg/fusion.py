"""Fuse label maps that several atlases propagated to one image, and tell how far they disagree.

References:
    X. Artaechevarria, A. Munoz-Barrutia, C. Ortiz-de-Solorzano, "Combination strategies in multi-atlas image
    segmentation: application to brain MR data", IEEE TMI 28, 2009: votes weighted by local similarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_rl_reg.finishing import label_dtype
from monai_rl_reg.geometry import reduced, sample, slabs, transform_points
from monai_rl_reg.losses import BoxLocalNormalizedCrossCorrelationLoss
from monai_rl_reg.metrics import label_dice
from monai_rl_reg.transforms import scale_percentiles_to_unit

LEAST_WEIGHT = 1e-3
"""Of a vote: where an image is flat, and no atlas is like it or unlike it, they count alike."""


def local_similarity(moved: Tensor, fixed: Tensor, window: int = 9) -> Tensor:
    """Return the squared local NCC around every voxel, in [0, 1], of images (1, *spatial) of any intensities."""
    a, b = (torch.as_tensor(scale_percentiles_to_unit(image))[None] for image in (moved, fixed))
    return -BoxLocalNormalizedCrossCorrelationLoss(moved.ndim - 1, window, reduction="none")(a, b)[0]


def fuse(labels: Sequence[MetaTensor], displacements: Sequence[MetaTensor], weights: Sequence[Tensor]) -> MetaTensor:
    """Return the label with the most votes at every voxel of the fixed image's grid, (1, *fixed).

    An atlas votes with the share of each label at the place that its displacement leads to (linear interpolation),
    times its weight there; with what is left it votes for the background.

    Args:
        labels: label map (1, *moving) of each atlas.
        displacements: (d, *fixed) in RAS millimetres, from the fixed image to each atlas.
        weights: (1, *fixed), of each atlas; less than :data:`LEAST_WEIGHT` counts as that.
    """
    weights = [weight.clamp(min=LEAST_WEIGHT) for weight in weights]
    places = [_landing(displacement, label.affine) for displacement, label in zip(displacements, labels, strict=True)]
    background = torch.stack(weights).sum(0)
    most = torch.zeros_like(background)
    fused = torch.zeros_like(background, dtype=torch.int32)
    for value in sorted({int(v) for label in labels for v in torch.unique(label.as_tensor()) if v > 0}):
        votes = torch.zeros_like(background)  # one label at a time: memory does not grow with their number
        for label, place, weight in zip(labels, places, weights, strict=True):
            there, share = _shares(label.as_tensor() == value, place)
            votes[:, there] += weight[:, there] * share
        background -= votes
        fused[votes > most] = value
        most = torch.maximum(votes, most)
    fused[background > most] = 0
    return MetaTensor(fused.to(label_dtype(fused)), affine=displacements[0].affine)


def _landing(displacement: MetaTensor, affine: Tensor) -> Tensor:
    """Return where the voxels of a field's grid come to lie, (d, *fixed), in voxels of a grid with this affine."""
    d, shape = len(displacement), displacement.shape[1:]
    to_moving, place = reduced(torch.linalg.inv(affine.double()), d), torch.empty(d, *shape)
    for rows, world in slabs(reduced(displacement.affine.double(), d), shape):
        place[:, rows] = transform_points(to_moving, world + displacement.as_tensor()[:, rows]).float()
    return place


def _shares(region: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return which voxels (*fixed) may come to lie in a region (1, *moving), and the share of it at each, (1, N).

    Only these are looked up, in the region's own box: with many labels a whole volume for each would take minutes.
    """
    found = region[0].nonzero()
    if not len(found):
        return torch.zeros(place.shape[1:], dtype=torch.bool), torch.zeros(1, 0)
    low, high = found.amin(0), found.amax(0)
    column = (-1, *[1] * (place.ndim - 1))
    there = ((place > (low - 1).reshape(column)) & (place < (high + 1).reshape(column))).all(0)
    begin = (low - 1).clamp(min=0)  # a margin of a voxel, but where the image ends the region ends as the image does
    box = tuple(slice(int(a), int(b) + 2) for a, b in zip(begin, high, strict=True))
    return there, sample(region[0][box][None].float(), place[:, there] - begin[:, None], outside="zeros")


def disagreement(maps: Sequence[Tensor]) -> float:
    """Return 1 - Dice, the mean over all pairs of label maps (1, *spatial) and over the labels of a pair, 0 to 1.

    NaN for maps without any label.
    """
    found = []
    for a, b in combinations(maps, 2):
        forth, back = label_dice(a[None], b[None]), label_dice(b[None], a[None])
        found.append(torch.where(forth.isnan() & ~back.isnan(), 0.0, forth).nanmean())  # only one map has the label
    return 1 - float(torch.stack(found).nanmean())
