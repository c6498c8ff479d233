"""The pair as the policy sees it: on one working grid, by the bundle's own preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Resize
from monai.utils import ImageMetaKey
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import WorldTransform, carry, reduced, transform_points, world_box
from monai_rl_reg.nifti import name_of
from monai_rl_reg.policy_bundle import PolicyBundle

MOST_VOXELS = 3_000_000
"""A working grid of more voxels would take too much memory: it gets a coarser spacing instead."""
MARGIN = 8
"""Voxels of the moving image beyond the fixed one's box that its witness looks at too."""


@dataclass(frozen=True)
class WorkingPair:
    """Fixed and moving image on the working grid.

    Attributes:
        image: (2, *working), fixed and moving with the initial transform applied.
        label: likewise, if both images have a label.
        seen: likewise, what the bundle's witness sees in each image by itself: not in the moving one as it was
            resampled, which is blurred, cut off, and goes on as its edge does.
        coarsened: whether the grid is coarser than the bundle's settings say, to save memory.
    """

    image: MetaTensor
    label: Tensor | None
    seen: Tensor | None
    coarsened: bool

    @classmethod
    def make(
        cls,
        bundle: PolicyBundle,
        fixed: MetaTensor,
        moving: MetaTensor,
        fixed_label: MetaTensor | None,
        moving_label: MetaTensor | None,
        initial: WorldTransform,
    ) -> WorkingPair:
        """Preprocess both images as the bundle does, and bring the moving one onto the fixed one's working grid.

        Args:
            bundle: gives the preprocessing.
            fixed: (1, *spatial).
            moving: (1, *spatial).
            fixed_label: on the fixed image's grid.
            moving_label: on the moving image's grid.
            initial: applied to the moving image.

        Raises:
            InputError: if the images do not overlap in space under the initial transform.
        """
        _check_overlap(fixed, moving, initial)
        spacing = _too_fine(fixed, bundle.pixdim, MOST_VOXELS)
        transform = bundle.case_transform if spacing is None else bundle.keep_spacing()
        pair: dict[str, Any] = {"initial": initial}
        labelled = fixed_label is not None and moving_label is not None
        for role, image, label in (("fixed", fixed, fixed_label), ("moving", moving, moving_label)):
            volumes = {"image": image} | ({"label": label} if label is not None and labelled else {})
            if spacing is not None:
                volumes = {key: _coarsen(volume, spacing, key) for key, volume in volumes.items()}
            case = transform(volumes)
            pair[role], pair[f"{role}_file"] = case["image"], name_of(image)
            if labelled:
                pair[f"{role}_label"] = case["label"]
        witnessed = bundle.witness is not None
        if witnessed:
            _witness(bundle, pair, initial)
        made = bundle.preprocessing(pair)
        maps = made["label"].as_tensor().unflatten(0, (2, -1)) if labelled or witnessed else None
        label = maps[:, 0] if maps is not None and labelled else None
        seen = maps[:, -1] if maps is not None and witnessed else None
        return cls(made["image"], label, seen, spacing is not None)

    def description(self) -> dict[str, Any]:
        """Return shape, spacing in mm, and whether it was coarsened, for the quality figures."""
        d = self.image.ndim - 1
        spacing = self.image.affine[:3, :d].norm(dim=0)
        return {
            "shape": list(self.image.shape[1:]),
            "spacing_mm": [round(float(s), 4) for s in spacing],
            "coarsened_to_save_memory": self.coarsened,
        }


def _witness(bundle: PolicyBundle, pair: dict[str, Any], initial: WorldTransform) -> None:
    """Add what is seen in each image to its label, as the last channel; in the moving one where the fixed one lies."""
    fixed, moving = pair["fixed"], pair["moving"]
    d = fixed.ndim - 1
    corners = torch.cartesian_prod(*(torch.tensor([0.0, n - 1.0], dtype=torch.float64) for n in fixed.shape[1:]))
    there = carry(initial, transform_points(reduced(fixed.affine.double(), d), corners.T.reshape(d, -1)))
    there = transform_points(torch.linalg.inv(reduced(moving.affine.double(), d)), there)
    low = (there.amin(1) - MARGIN).clamp(min=0).minimum(torch.tensor(moving.shape[1:]) - 1)
    high = (there.amax(1) + MARGIN).maximum(low)
    box = [slice(int(a), int(b) + 1) for a, b in zip(low, high, strict=True)]
    for role, part in (("fixed", (...,)), ("moving", (slice(None), *box))):
        image = pair[role].as_tensor()
        seen = torch.zeros_like(image)
        seen[part] = bundle.see(image[part])
        labels = [pair[f"{role}_label"].as_tensor(), seen] if f"{role}_label" in pair else [seen]
        pair[f"{role}_label"] = MetaTensor(torch.cat(labels), affine=pair[role].affine)


def _check_overlap(fixed: MetaTensor, moving: MetaTensor, initial: WorldTransform) -> None:
    d = fixed.ndim - 1
    low, high = world_box(reduced(fixed.affine, d), fixed.shape[1:])
    corners = torch.cartesian_prod(*torch.stack([low, high], dim=1)).T.reshape(d, -1)
    carried = carry(initial, corners)
    low, high = carried.amin(1), carried.amax(1)
    low_m, high_m = world_box(reduced(moving.affine, d), moving.shape[1:])
    if (high < low_m).any() or (high_m < low).any():
        raise InputError(
            f"moving image {name_of(moving)}: expected to overlap in space with the fixed image {name_of(fixed)} under "
            "the initial transform, found no overlap; --initial auto brings them together first"
        )


def _too_fine(fixed: MetaTensor, pixdim: Any, most: int) -> float | None:
    """Return the spacing in mm to coarsen to, or None where the bundle's working grid is small enough."""
    d = fixed.ndim - 1
    own = fixed.affine[:3, :d].norm(dim=0).tolist()
    extent = [n * s for n, s in zip(fixed.shape[1:], own, strict=True)]
    wanted = own if pixdim is None else [float(pixdim)] * d if isinstance(pixdim, int | float) else list(pixdim)

    def voxels(spacing: float) -> float:
        count = 1.0
        for length, s in zip(extent, wanted, strict=True):
            count *= max(1.0, length / max(s, spacing))
        return count

    if voxels(0.0) <= most:
        return None
    low, high = min(wanted), max(extent)
    for _ in range(60):  # halve the interval: finer directions are coarsened first
        middle = (low + high) / 2
        low, high = (middle, high) if voxels(middle) > most else (low, middle)
    return high


def _coarsen(volume: MetaTensor, spacing: float, key: str) -> MetaTensor:
    own = volume.affine[:3, : volume.ndim - 1].norm(dim=0).tolist()
    size = [max(1, int(n * s / max(s, spacing))) for n, s in zip(volume.shape[1:], own, strict=True)]
    if size == list(volume.shape[1:]):
        return volume
    if key == "label":
        resize = Resize(size, mode="nearest-exact")
    else:
        resize = Resize(size, mode="trilinear" if len(size) == 3 else "bilinear", anti_aliasing=True)
    smaller: Any = resize(volume)
    return MetaTensor(smaller.as_tensor(), affine=smaller.affine, meta={ImageMetaKey.FILENAME_OR_OBJ: name_of(volume)})
