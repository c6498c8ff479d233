"""The figures by which to trust a registration, or not: what ``quality.json`` holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import SimpleITK as sitk
import torch
from monai import __version__ as monai_version
from monai.utils import convert_to_tensor
from torch import Tensor

from monai_rl_reg import __version__
from monai_rl_reg.geometry import jacobian_determinant
from monai_rl_reg.metrics import folding, label_dice
from monai_rl_reg.similarity import title
from monai_rl_reg.working import ANOTHER_SIZE

MOST_FOLDED = 1.0
"""Percentage of folded voxels above which a registration comes with a warning."""
LEAST_SEEN = 0.8
"""Dice of structures that the policy sees below which it comes with one: on images like those of the training it is
over 0.9, on others was under 0.6. Where there is a judge, :data:`LEAST_EXPECTED` takes its place."""
LEAST_EXPECTED = 0.65
"""Expected Dice below which a registration comes with a warning."""


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    return {
        "monai_rl_reg": __version__,
        "monai": str(monai_version),
        "torch": str(torch.__version__),
        "SimpleITK": str(sitk.Version.VersionString()),
    }


def dice_figures(moved: Tensor, unmoved: Tensor, fixed: Tensor, labels: Sequence[int] | None = None) -> dict[str, Any]:
    """Return ``dice_before``, ``dice_after``, means over the labels, and ``dice_per_label`` after.

    Args:
        moved: label map (1, *spatial) on the fixed grid.
        unmoved: likewise, with the initial transform alone.
        fixed: likewise.
        labels: label values to compare; by default all that the fixed map has.
    """
    *maps, reference = (convert_to_tensor(x, track_meta=False) for x in (unmoved, moved, fixed))
    before, after = (label_dice(x[None], reference[None])[0] for x in maps)
    values = [i + 1 for i in (~after.isnan()).nonzero().flatten().tolist() if labels is None or i + 1 in labels]
    rows = torch.tensor(values, dtype=torch.long) - 1
    return {
        "dice_before": float(before[rows].mean()),
        "dice_after": float(after[rows].mean()),
        "dice_per_label": {str(value): round(float(after[value - 1]), 6) for value in values},
    }


def field_figures(displacement: Tensor, affine: Tensor) -> dict[str, float]:
    """Return ``folded_percent`` and ``sdlogj`` of a field (d, *spatial) in RAS millimetres on a grid."""
    d = len(displacement)
    voxels = torch.tensordot(torch.linalg.inv(affine[:d, :d].double()).float(), displacement, dims=1)[None]
    folded, deviation = folding(jacobian_determinant(voxels))
    return {"folded_percent": float(folded), "sdlogj": float(deviation)}


def warnings_about(quality: dict[str, Any]) -> list[str]:
    """Return in plain words what in the figures speaks against the result.

    A policy that was trained with labels gives up some similarity for structures that agree: while those that it sees
    in both images do, a lower similarity is no fault.
    """
    found = []
    seen, expected = quality.get("seen_dice_after"), quality.get("expected_dice")
    hint = "they may be unlike those that the weights were trained on"
    good = False
    if expected is not None:
        good = expected >= LEAST_EXPECTED
        if not good:
            low, high = quality["expected_dice_range"]
            found.append(
                f"a Dice of {expected:.2f} only ({low:.2f} to {high:.2f}) is to be expected of the labels: {hint}"
            )
    elif seen is not None:
        good = seen >= LEAST_SEEN
        if not good:
            found.append(
                f"the structures that the policy sees in both images agree by a Dice of {seen:.2f} only: {hint}"
            )
    name = quality["similarity"]
    before, after = quality[f"{name}_before"], quality[f"{name}_after"]
    if after < before and not good:
        found.append(
            f"the similarity of the images fell, {title(name)} {before:.3f} to {after:.3f}"
            + ("" if found else f": {hint}")
        )
    if quality.get("dice_after", math.nan) < quality.get("dice_before", math.nan):
        found.append(f"the labels agree less, Dice {quality['dice_before']:.3f} to {quality['dice_after']:.3f}")
    if quality.get("tre_after_mm", math.nan) > quality.get("tre_before_mm", math.nan):
        found.append(
            f"the landmarks lie farther apart, {quality['tre_before_mm']:.2f} to {quality['tre_after_mm']:.2f} mm"
        )
    if quality.get("by_label") == {}:
        found.append("the moving label was not gone by: none of its structures lies where the weights see one")
    worked, trained = quality.get("working_grid", {}).get("spacing_mm", []), quality.get("trained_at_mm", [])
    if any(own / size > ANOTHER_SIZE for own, size in zip(worked, trained, strict=False)):
        sizes = [" x ".join(f"{s:.2g}" for s in spacing) for spacing in (worked, trained)]
        found.append(
            f"registered with voxels of {sizes[0]} mm, to save memory, by weights that were trained with voxels of "
            f"{sizes[1]} mm: weights of a training with a larger pixdim do better"
        )
    if quality["folded_percent"] > MOST_FOLDED:
        found.append(f"{quality['folded_percent']:.2g} % of the voxels are folded")
    return found
