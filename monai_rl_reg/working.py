"""The pair as the policy sees it: on one working grid, by the bundle's own preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Resize
from monai.utils import ImageMetaKey
from nibabel.orientations import io_orientation
from torch import Tensor

from monai_rl_reg.anatomy import Anatomy
from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import DenseTransform, WorldTransform, carry, reduced, transform_points, world_box
from monai_rl_reg.nifti import name_of
from monai_rl_reg.policy_bundle import PolicyBundle
from monai_rl_reg.tasks.registration import LEAST_SIZE

MOST_VOXELS = 3_000_000
"""A working grid of more voxels would take too much memory: it gets a coarser spacing instead."""
MARGIN = 8
"""Voxels of the moving image beyond the fixed one's box that are looked at too."""
EVERY = 4
"""Voxels from one point of the fixed grid to the next at which an initial field is asked where it leads."""
ANOTHER_SIZE = 1.25
"""Factor between the fixed image's voxel size and that of the training from which the pair is resampled to the latter.
So five hippocampus pairs at 0.6 mm came to a Dice of 0.845, where at their own size to 0.820, at 1.6 mm to 0.835 and
0.788; nearer to the 1 mm of the training it is all the same (0.839 and 0.844 at 0.8 mm, 0.834 and 0.830 at 1.3)."""
LEAST_OVERLAP = 0.75
"""Dice of a label and a structure seen in the same image from which on they are taken for the same. One label over two
structures of equal size overlaps with each by 0.67."""
SAME_SPACING = 0.05
"""Share by which the moving image's spacing may differ from the fixed one's for it to be looked at as it is."""


@dataclass(frozen=True)
class WorkingPair:
    """Fixed and moving image on the working grid.

    Attributes:
        image: (2, *working), fixed and moving with the initial transform applied.
        label: likewise, if both images have a label.
        seen: likewise, the labels that the bundle's witness sees in each image, if it has one.
        structures: (2, K, *working), the probabilities of what the policy itself sees in each, if it sees structures;
            in the moving image those that are recognised are as its label has them.
        coarsened: whether the grid is coarser than the bundle's settings say, to save memory.
        recognised: the value in the moving label of each structure (1 to K) that its label is gone by for.
    """

    image: MetaTensor
    label: Tensor | None
    seen: Tensor | None
    structures: Tensor | None
    coarsened: bool
    recognised: dict[int, int]

    def description(self) -> dict[str, Any]:
        """Return shape, spacing in mm, and whether it was coarsened, for the quality figures."""
        return {
            "shape": list(self.image.shape[1:]),
            "spacing_mm": [round(s, 4) for s in _spacing(self.image)],
            "coarsened_to_save_memory": self.coarsened,
        }


class GivenPair:
    """Both images preprocessed as the bundle does, each where it was given, before an initial transform is chosen.

    Networks that see structures look at each image by itself, and what they see is moved: not at the moving image as an
    initial transform resampled it, which is blurred, cut off, and goes on as its edge does. So they look at one part of
    an image once, however many initial transforms are tried.

    Args:
        bundle: gives the preprocessing, and what sees.
        fixed: (1, *spatial).
        moving: (1, *spatial).
        fixed_label: on the fixed image's grid.
        moving_label: on the moving image's grid; with both labels a :class:`WorkingPair` has them.
        by_label: let the moving label take the place of what the policy sees in the moving image, for the structures
            that are recognised in it.
    """

    def __init__(
        self,
        bundle: PolicyBundle,
        fixed: MetaTensor,
        moving: MetaTensor,
        fixed_label: MetaTensor | None = None,
        moving_label: MetaTensor | None = None,
        *,
        by_label: bool = False,
    ) -> None:
        self.bundle = bundle
        self.given = {"fixed": fixed, "moving": moving}
        labels = {"fixed": fixed_label, "moving": moving_label}
        both = fixed_label is not None and moving_label is not None
        needed = {"fixed": both, "moving": both or (by_label and moving_label is not None)}
        pixdim = bundle.pixdim if bundle.pixdim is not None else _trained_at(bundle, fixed)
        spacing = _too_fine(fixed, pixdim, MOST_VOXELS)
        self.coarsened = spacing is not None
        transform = bundle.case_transform
        if spacing is not None:
            coarse = None if pixdim is None else [max(size, spacing) for size in _each(pixdim, fixed.ndim - 1)]
            transform = bundle.case_transform_to(coarse)
        elif pixdim is not bundle.pixdim:
            transform = bundle.case_transform_to(pixdim)
        self.cases: dict[str, dict[str, MetaTensor]] = {}
        for role, image in self.given.items():
            volumes: dict[str, Any] = {"image": image} | ({"label": labels[role]} if needed[role] else {})
            if spacing is not None:
                volumes = {key: _coarsen(volume, spacing, key) for key, volume in volumes.items()}
                if "label" in volumes and not (volumes["label"] > 0).any():  # too small for this grid
                    del volumes["label"]
            self.cases[role] = transform(volumes)
        grid = self.cases["fixed"]["image"]
        if min(grid.shape[1:]) < LEAST_SIZE:
            sizes = " x ".join(f"{size:.3g}" for size in _spacing(grid))
            raise InputError(
                f"fixed image {name_of(fixed)}: expected at least {LEAST_SIZE} voxels in every direction where the "
                f"policy works, found {' x '.join(map(str, grid.shape[1:]))} of {sizes} mm, the size it was trained at "
                "or the image's own"
            )
        self.labelled = all("label" in case for case in self.cases.values())
        self.by_label = by_label and "label" in self.cases["moving"]
        self._looks: dict[Any, Tensor] = {}

    def onto_fixed(self, initial: WorldTransform) -> WorkingPair:
        """Bring the moving image onto the fixed one's working grid.

        Args:
            initial: applied to the moving image.

        Raises:
            InputError: if the images do not overlap in space under the initial transform.
        """
        fixed, moving = self.given.values()
        _check_overlap(fixed, moving, initial)
        pair: dict[str, Any] = {"initial": initial}
        recognised: dict[int, int] = {}
        for role, case in self.cases.items():
            box = self._box(initial) if role == "moving" else tuple(slice(0, n) for n in case["image"].shape[1:])
            there = (slice(None), *box)
            part = {key: case[key].as_tensor()[there] for key in ("image", "label") if key in case}
            affine, images = _part_affine(case["image"].affine, box), [part["image"]]
            if self.bundle.anatomy is not None:
                looked = self._look(role, self.bundle.anatomy, box)
                if role == "moving" and self.by_label:
                    recognised = _recognise(looked, part["label"])
                    looked = looked.clone()
                    for structure, value in recognised.items():
                        looked[structure] = (part["label"][0] == value).to(looked)
                images.append(looked[1:])
            pair[role], pair[f"{role}_file"] = MetaTensor(torch.cat(images), affine=affine), name_of(self.given[role])
            labels = [part["label"]] if self.labelled else []
            if self.bundle.witness is not None:
                labels.append(self._look(role, self.bundle.witness, box).argmax(0, keepdim=True).float())
            if labels:
                pair[f"{role}_label"] = MetaTensor(torch.cat(labels), affine=affine)
        made = self.bundle.preprocessing(pair)
        images = made["image"].as_tensor().unflatten(0, (2, -1))
        image = MetaTensor(images[:, 0], affine=made["image"].affine)
        maps = made["label"].as_tensor().unflatten(0, (2, -1)) if "label" in made else None
        label = maps[:, 0] if maps is not None and self.labelled else None
        seen = maps[:, -1] if maps is not None and self.bundle.witness is not None else None
        structures = images[:, 1:] if self.bundle.anatomy is not None else None
        return WorkingPair(image, label, seen, structures, self.coarsened, recognised)

    def _box(self, initial: WorldTransform) -> tuple[slice, ...]:
        """The part of the moving image where the fixed one lies, and a margin: no more of it is looked at, or moved."""
        fixed, moving = (case["image"] for case in self.cases.values())
        d = fixed.ndim - 1
        # an affine leads farthest at the corners, a field wherever it likes
        every = EVERY if isinstance(initial, DenseTransform) else max(fixed.shape[1:])
        along = [torch.tensor([*range(0, n - 1, every), n - 1], dtype=torch.float64) for n in fixed.shape[1:]]
        index = torch.cartesian_prod(*along).T.reshape(d, -1)
        there = carry(initial, transform_points(reduced(fixed.affine.double(), d), index))
        there = transform_points(torch.linalg.inv(reduced(moving.affine.double(), d)), there)
        last = torch.tensor(moving.shape[1:]) - 1
        low = (there.amin(1) - MARGIN).clamp(min=0).minimum(last).long().tolist()
        high = (there.amax(1) + MARGIN).clamp(min=0).minimum(last).long().tolist()
        return tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))

    def _look(self, role: str, network: Anatomy, box: tuple[slice, ...]) -> Tensor:
        """What a network sees in a part of an image, (1 + K, *part)."""
        key = (role, id(network), str(box))
        if key not in self._looks:
            image, spacing = (self.cases[r]["image"] for r in (role, "fixed"))
            there = (slice(None), *box)
            part = image.as_tensor()[there]
            # networks know structures by their size in voxels
            pairs = zip(part.shape[1:], _spacing(image), _spacing(spacing), strict=True)
            size = [max(1, round(n * a / b)) if abs(a / b - 1) > SAME_SPACING else n for n, a, b in pairs]
            self._looks[key] = _resized(self.bundle.see(network, _resized(part, size)), part.shape[1:])
        return self._looks[key]


def _recognise(looked: Tensor, label: Tensor) -> dict[int, int]:
    """Find structures that a network sees, (1 + K, *part), among a label's values, by where they lie: values are free.

    Args:
        looked: probabilities.
        label: (1, *part).
    """
    values, index = torch.unique(label[0], return_inverse=True)
    shape = len(values), len(looked)
    counts = torch.bincount((index * shape[1] + looked.argmax(0)).flatten(), minlength=shape[0] * shape[1])
    counts = counts.reshape(shape)
    overlaps = 2 * counts / (counts.sum(0) + counts.sum(1, keepdim=True))
    same = overlaps >= LEAST_OVERLAP  # over two thirds: of one structure and one value at most
    return {k: int(values[i]) for i, k in same.nonzero().tolist() if k > 0 and values[i] > 0}


def _part_affine(affine: Tensor, box: Sequence[slice]) -> Tensor:
    """Return the affine (4, 4) of a part of a grid."""
    part = affine.double().clone()
    part[:3, 3] += part[:3, : len(box)] @ torch.tensor([float(along.start) for along in box], dtype=torch.float64)
    return part


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
            "the initial transform, found no overlap; --initial auto finds one where the intensities tell"
        )


def _trained_at(bundle: PolicyBundle, fixed: MetaTensor) -> list[float] | None:
    """Return the voxel size that the policy was trained at, where the fixed image's is another one."""
    trained = bundle.voxel_size
    if trained is None:
        return None
    pairs = zip(_along_ras(fixed)[1], trained, strict=True)
    if all(1 / ANOTHER_SIZE <= own / size <= ANOTHER_SIZE for own, size in pairs):
        return None
    return trained


def coarser_voxels(image: MetaTensor, most: int) -> list[float] | None:
    """Return the voxel size in mm, in RAS order, at which an image has no more voxels; None where it has not now."""
    spacing = _too_fine(image, None, most)
    return None if spacing is None else [max(own, spacing) for own in _along_ras(image)[1]]


def _too_fine(fixed: MetaTensor, pixdim: Any, most: int) -> float | None:
    """Return the spacing in mm to coarsen to, or None where the bundle's working grid is small enough."""
    d = fixed.ndim - 1
    shape, own = _along_ras(fixed)
    extent = [n * s for n, s in zip(shape, own, strict=True)]
    wanted = own if pixdim is None else _each(pixdim, d)

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


def _each(pixdim: Any, d: int) -> list[float]:
    return [float(pixdim)] * d if isinstance(pixdim, int | float) else list(pixdim)


def _coarsen(volume: MetaTensor, spacing: float, key: str) -> MetaTensor:
    size = [max(1, int(n * s / max(s, spacing))) for n, s in zip(volume.shape[1:], _spacing(volume), strict=True)]
    if size == list(volume.shape[1:]):
        return volume
    smaller: Any = Resize(size, mode="nearest-exact")(volume) if key == "label" else _resized(volume, size)
    return MetaTensor(smaller.as_tensor(), affine=smaller.affine, meta={ImageMetaKey.FILENAME_OR_OBJ: name_of(volume)})


def _resized(volume: Tensor, size: Sequence[int]) -> Tensor:
    if list(size) == list(volume.shape[1:]):
        return volume
    resized: Tensor = Resize(size, mode="trilinear" if len(size) == 3 else "bilinear", anti_aliasing=True)(volume)
    return resized


def _along_ras(image: MetaTensor) -> tuple[list[int], list[float]]:
    """Return shape and spacing in the order of axes that the case transform brings an image to."""
    d = image.ndim - 1
    axes = io_orientation(reduced(image.affine, d).numpy())[:, 0].argsort()
    spacing = _spacing(image)
    return [image.shape[1 + i] for i in axes], [spacing[i] for i in axes]


def _spacing(image: MetaTensor) -> list[float]:
    spacing: list[float] = image.affine[:3, : image.ndim - 1].norm(dim=0).tolist()
    return spacing
