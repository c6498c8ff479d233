"""MONAI dictionary transforms: load a case, bring a pair onto one grid, move by a field, finish on the fixed grid."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, ScaleIntensity, ScaleIntensityRange, Transform
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import convert_to_tensor
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.finishing import Correspondence
from monai_rl_reg.geometry import (
    WorldTransform,
    identity_grid,
    landing,
    reduced,
    sample,
    world_box,
)
from monai_rl_reg.nifti import name_of, read_image, read_label
from monai_rl_reg.similarity import Similarity, correlation, mutual_information
from monai_rl_reg.warping import Warp

ALIGNMENTS = ("auto", "world", "centre")


class LoadCased(Transform):
    """Read ``image`` and, where there is one, ``label`` of a case, with every check of :mod:`monai_rl_reg.nifti`.

    Adds ``file``, ``file_of_label`` and ``values``, the label values found. (Names that begin with ``image_`` or
    ``label_`` MONAI's ``Spacingd`` takes for dictionaries of metadata.)

    Args:
        spatial_dims: 2 or 3.
    """

    def __init__(self, spatial_dims: int = 3) -> None:
        self.spatial_dims = spatial_dims

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with tensors (1, *spatial) in place of the paths, or whatever else can be read."""
        case = dict(data)
        path = case["image"]
        case["file"] = name_of(path)
        case["image"] = read_image(path, spatial_dims=self.spatial_dims)
        if "label" in case:
            label, case["file_of_label"] = case["label"], name_of(case["label"])
            case["label"] = read_label(label, case["image"], path, spatial_dims=self.spatial_dims)
            runs = torch.unique_consecutive(case["label"].as_tensor().flatten())  # far fewer to sort than voxels
            case["values"] = [int(v) for v in torch.unique(runs) if v > 0]
        return case


def scale_percentiles_to_unit(image: Tensor, lower: float = 0.5, upper: float = 99.5) -> Tensor:
    """Return an image with two percentiles of its intensities brought to 0 and 1, and what lies beyond them clipped.

    Where both are one value, for the image is nearly everywhere that, its smallest and largest one take their place:
    MONAI's own transform leaves such an image as it is.
    """
    low, high = (float(percentile(image, q)) for q in (lower, upper))
    same = low == high
    scale = ScaleIntensity(0.0, 1.0) if same else ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)
    return convert_to_tensor(scale(image), track_meta=isinstance(image, MetaTensor))


class ScaleToUnitd(MapTransform):
    """Bring the intensities of the images under some keys to 0 to 1: a range of them, or each image's percentiles.

    Args:
        keys: of the images.
        intensity_range: what becomes 0 and 1, clipped beyond, as the window of a CT; None goes by percentiles, as
            :func:`scale_percentiles_to_unit` does.
        lower: percentile.
        upper: likewise.

    Raises:
        InputError: if the range is not two rising numbers.
    """

    def __init__(
        self,
        keys: KeysCollection,
        intensity_range: Sequence[float] | None = None,
        *,
        lower: float = 0.5,
        upper: float = 99.5,
    ) -> None:
        super().__init__(keys)
        self.scale: Callable[[Any], Any] = partial(scale_percentiles_to_unit, lower=lower, upper=upper)
        if intensity_range is not None:
            low, high = _rising(intensity_range)
            self.scale = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dictionary with the images scaled.

        Raises:
            InputError: if an image has nothing inside the range.
        """
        scaled = dict(data)
        for key in self.key_iterator(data):
            scaled[key] = self.scale(data[key])
            if scaled[key].min() == scaled[key].max():
                raise InputError(
                    f"image {name_of(data[key])}: expected contrast inside the intensity range, found values from "
                    f"{float(data[key].min()):g} to {float(data[key].max()):g}"
                )
        return scaled


def _rising(intensity_range: Any) -> tuple[float, float]:
    with contextlib.suppress(TypeError, ValueError):
        low, high = map(float, intensity_range)
        if -math.inf < low < high < math.inf:
            return low, high
    raise InputError(f"intensity_range: expected two rising numbers, such as [-160, 240], found {intensity_range!r}")


class MovingToFixedGridd(Transform):
    """Bring moving image and label onto the fixed image's grid, and stack the pair as ``image`` and ``label``.

    Each image lies where its affine says. ``align`` says how the pair is brought together first: ``world`` takes the
    affines at their word, ``centre`` shifts the moving image so that the two grids' centres meet, and ``auto`` takes
    the one of the two with the higher correlation of intensities or, of two modalities, mutual information. The shift
    becomes part of the final displacement.

    Out of ``fixed, moving[, fixed_label, moving_label]`` come ``image`` (2, *spatial), ``label`` (2, *spatial),
    and ``initial``, the (4, 4) world transform from fixed to moving space that was applied. With ``spatial_size`` in
    the dictionary the fixed grid is cropped or padded to it, around its centre; with ``initial`` in it, a
    :data:`~monai_rl_reg.geometry.WorldTransform`, that one is applied and ``align`` is not asked.

    Args:
        align: ``auto``, ``world`` or ``centre``.
        similarity: says whether the images are of one modality; by default they are.

    Raises:
        InputError: if the images do not overlap in space (and ``align`` is not ``centre``).
    """

    def __init__(self, align: str = "auto", similarity: Similarity | None = None) -> None:
        if align not in ALIGNMENTS:
            raise InputError(f"align: expected one of {', '.join(ALIGNMENTS)}, found {align!r}")
        self.align = align
        self.measure = correlation if similarity is None or similarity.one_modality else mutual_information

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the pair on one grid."""
        pair = dict(data)
        fixed, moving = pair.pop("fixed"), pair.pop("moving")
        d = fixed.ndim - 1
        size = pair.pop("spatial_size", None) or tuple(fixed.shape[1:])
        offset = torch.tensor([(n - m) // 2 for n, m in zip(fixed.shape[1:], size, strict=True)], dtype=torch.float64)
        grid_affine = fixed.affine.double().clone()
        grid_affine[:3, 3] += grid_affine[:3, :d] @ offset

        def of_fixed(volume: Tensor, **how: Any) -> Tensor:
            if tuple(size) == tuple(fixed.shape[1:]):
                return volume.float()
            return sample(volume, (identity_grid(size) + offset.reshape(-1, *[1] * d)).float(), **how)

        fixed_on_grid = of_fixed(fixed.as_tensor())
        given: WorldTransform | None = pair.get("initial")
        candidates = self._candidates(fixed, moving, pair) if given is None else [given]
        to_moving = reduced(torch.linalg.inv(moving.affine.double()), d)
        best = None
        for initial in candidates:
            moving_index = landing(reduced(grid_affine, d), size, initial, to_moving).float()
            moving_on_grid = sample(moving.as_tensor(), moving_index)
            score = self.measure(fixed_on_grid, moving_on_grid) if len(candidates) > 1 else 0.0
            if best is None or score > best[0] + 1e-6:
                best = (score, initial, moving_index, moving_on_grid)
        assert best is not None
        _, initial, moving_index, moving_on_grid = best
        pair["image"] = MetaTensor(torch.cat([fixed_on_grid, moving_on_grid]), affine=grid_affine)
        pair["initial"] = initial
        if "fixed_label" in pair:
            fixed_label, moving_label = (pair.pop(f"{role}_label").as_tensor() for role in ("fixed", "moving"))
            how = {"mode": "nearest", "outside": "zeros"}
            labels = [of_fixed(fixed_label, **how), sample(moving_label, moving_index, **how)]
            pair["label"] = MetaTensor(torch.cat(labels), affine=grid_affine)
        return pair

    def _candidates(self, fixed: MetaTensor, moving: MetaTensor, pair: dict[Hashable, Any]) -> list[WorldTransform]:
        d = fixed.ndim - 1
        identity = torch.eye(4, dtype=torch.float64)
        centred = identity.clone()
        centres = [
            a.affine.double()[:3, :d] @ torch.tensor([(n - 1) / 2 for n in a.shape[1:]], dtype=torch.float64)
            + a.affine.double()[:3, 3]
            for a in (fixed, moving)
        ]
        centred[:3, 3] = centres[1] - centres[0]
        if self.align == "centre":
            return [centred]
        low_f, high_f = world_box(reduced(fixed.affine.double(), d), fixed.shape[1:])
        low_m, high_m = world_box(reduced(moving.affine.double(), d), moving.shape[1:])
        if (high_f < low_m).any() or (high_m < low_f).any():
            raise InputError(
                f"moving image {pair.get('moving_file', '')}: expected to overlap in space with the fixed image "
                f"{pair.get('fixed_file', '')} ({_box(low_f, high_f)}), found it at {_box(low_m, high_m)}; "
                "align=centre brings their centres together first"
            )
        return [identity] if self.align == "world" else [identity, centred]


class WarpByDisplacementd(MapTransform):
    """Move the channel ``moving`` of a (fixed, moving) stack by the displacement field ``pred`` of the same grid.

    For each key (``image``, ``label``) adds the parts of the pair by name: ``fixed``, ``moving``, ``moved`` and
    ``fixed_label``, ``moving_label``, ``moved_label``. Labels move by nearest neighbour.
    """

    def __init__(self, keys: Sequence[str] = ("image", "label")) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the moved parts added."""
        out = dict(data)
        field = convert_to_tensor(out[Keys.PRED], track_meta=False)[None].float()
        for key in self.key_iterator(out):
            if out[key] is None:
                continue
            stack = convert_to_tensor(out[key], track_meta=False)
            suffix = "_label" if key == "label" else ""
            mode = "nearest" if key == "label" else "bilinear"
            out[f"fixed{suffix}"], out[f"moving{suffix}"] = stack[:1], stack[1:]
            out[f"moved{suffix}"] = Warp(mode, "border")(stack[None, 1:].to(field), field)[0]
        return out


class FinishOnFixedGridd(Transform):
    """Bring the result home: onto the fixed file's own grid, the moving files resampled once, from the original.

    The field ``pred`` (d, *spatial) is in voxels of the working grid. The files are read again, since intensities were
    scaled and grids changed on the way in. Adds ``displacement`` (d, *spatial) in RAS millimetres with the initial
    shift inside, ``moved`` and, where there is one, ``moved_label``; for pairs with both labels also ``fixed_label``
    and ``unmoved_label`` (the initial shift alone).

    Args:
        spatial_dims: 2 or 3.
    """

    def __init__(self, spatial_dims: int = 3) -> None:
        self.spatial_dims = spatial_dims

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the finished parts added."""
        out = dict(data)
        d = self.spatial_dims
        fixed = read_image(out["fixed_file"], spatial_dims=d)
        moving = read_image(out["moving_file"], spatial_dims=d)
        grid_affine, initial = (
            out["image"].affine.double(),
            convert_to_tensor(out["initial"], track_meta=False).double(),
        )
        field = convert_to_tensor(out[Keys.PRED], track_meta=False)
        way = Correspondence.on_fixed_grid(field, grid_affine, initial, fixed)
        out["displacement"] = MetaTensor(way.displacement.displacement, affine=fixed.affine)
        out["moved"] = way.move(moving)
        if "moving_label_file" in out:
            label = read_label(out["moving_label_file"], moving, out["moving_file"], spatial_dims=d)
            out["moved_label"] = way.move(label, nearest=True)
            if "fixed_label_file" in out:
                out["fixed_label"] = read_label(out["fixed_label_file"], fixed, out["fixed_file"], spatial_dims=d)
                out["unmoved_label"] = way.move(label, nearest=True, initial_only=True)
        return out


def _box(low: Tensor, high: Tensor) -> str:
    return " x ".join(f"{a:.0f}..{b:.0f}" for a, b in zip(low.tolist(), high.tolist(), strict=True)) + " mm"
