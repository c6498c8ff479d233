"""The step before the first one: bring images together that lie apart, by SimpleITK's affine registration."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_rl_reg.itk_bridge import matrix_of, to_itk
from monai_rl_reg.similarity import correlation, mutual_information

logger = logging.getLogger(__name__)

VOXELS = 60_000
"""About as many voxels has an image that the affine is found on."""
GAIN = 0.02
"""A pair whose correlation no transform raises by this much counts as aligned already."""
STRETCH = 2.0
"""A direction that an affine stretches or shrinks by more than this makes it implausible."""


@dataclass(frozen=True)
class Alignment:
    """An initial transform and what it does for the pair.

    Attributes:
        transform: (4, 4), from fixed to moving space, RAS millimetres.
        kind: ``identity`` (aligned already), ``centre``, ``rigid`` or ``affine``.
        correlation_before: of the intensities as the images lie, coarsely, 0 outside the moving image.
        correlation_after: likewise, with the transform.
    """

    transform: Tensor
    kind: str
    correlation_before: float
    correlation_after: float


def align(fixed: MetaTensor, moving: MetaTensor, *, one_modality: bool = True) -> Alignment:
    """Find an affine from fixed to moving space, unless the pair is aligned already.

    From the best of three starts (as the images lie, centres of the grids, centres of mass) a rigid and then an affine
    transform are found on coarse images, by the correlation of intensities or, of two modalities, by their mutual
    information. Of all these the best by the same measure is taken, if it is better by :data:`GAIN` than the images as
    they lie. Deterministic: all voxels are used, in one thread.

    Args:
        fixed: (1, *spatial).
        moving: (1, *spatial).
        one_modality: whether the images are of one modality.
    """
    d = fixed.ndim - 1
    f, m = (_coarse(image) for image in (fixed, moving))
    score = _Score(f, m, one_modality)
    identity = _rigid(d)
    starts: list[tuple[str, Any]] = [("identity", identity)]
    for operation in ("GEOMETRY", "MOMENTS"):
        mode = getattr(sitk.CenteredTransformInitializerFilter, operation)
        with contextlib.suppress(RuntimeError):  # an image that is black all over has no centre of mass
            starts.append(("centre", _rigid(d, sitk.CenteredTransformInitializer(f, m, _rigid(d), mode))))
    found = [(kind, transform, score(transform)) for kind, transform in starts]
    start = max(found, key=lambda one: one[2])[1]
    rigid = _optimise(f, m, _rigid(d, start), one_modality, end=0.05)
    if rigid is not None:
        found.append(("rigid", rigid, score(rigid)))
    affine = sitk.AffineTransform(d)
    base = rigid or start
    affine.SetMatrix(base.GetMatrix())
    affine.SetTranslation(base.GetTranslation())
    affine.SetCenter(base.GetCenter())
    refined = _optimise(f, m, affine, one_modality, end=0.005)
    if refined is not None and _plausible(refined):
        found.append(("affine", refined, score(refined)))
    best = max(found, key=lambda one: one[2])
    kind, kept, _ = best if best[2] > found[0][2] + GAIN else found[0]
    before, after = (score.correlation(t) for t in (identity, kept))
    logger.info("initial transform: %s, correlation %.3f to %.3f", kind, before, after)
    matrix = torch.eye(4, dtype=torch.float64) if kind == "identity" else matrix_of(kept)
    return Alignment(matrix, kind, before, after)


class _Score:
    """How alike the coarse images are under a transform."""

    def __init__(self, fixed: sitk.Image, moving: sitk.Image, one_modality: bool) -> None:
        self.fixed, self.moving = fixed, moving
        self.values = torch.from_numpy(sitk.GetArrayFromImage(fixed))
        self.measure = correlation if one_modality else mutual_information

    def __call__(self, transform: sitk.Transform) -> float:
        return self.measure(self.values, self._moved(transform))

    def correlation(self, transform: sitk.Transform) -> float:
        return correlation(self.values, self._moved(transform))

    def _moved(self, transform: sitk.Transform) -> Tensor:
        moved = sitk.Resample(self.moving, self.fixed, transform, sitk.sitkLinear, 0.0)
        return torch.from_numpy(sitk.GetArrayFromImage(moved))


def _coarse(image: MetaTensor) -> sitk.Image:
    """Shrink by block means to about :data:`VOXELS`, nearly isotropic; 0.5 to 99.5 percentile to 0 to 1."""
    d = image.ndim - 1
    spacing = image.affine[:3, :d].norm(dim=0)
    extent = spacing * torch.tensor(image.shape[1:])
    target = float(extent.prod() / VOXELS) ** (1 / d)
    factors = [int(min(max(1, round(target / float(s))), n)) for s, n in zip(spacing, image.shape[1:], strict=True)]
    full = to_itk(image.as_tensor(), image.affine)
    coarse = sitk.BinShrink(full, factors) if max(factors) > 1 else full
    low, high = np.percentile(sitk.GetArrayViewFromImage(coarse), [0.5, 99.5])
    return sitk.Clamp((coarse - float(low)) / max(float(high - low), 1e-6), sitk.sitkFloat32, 0.0, 1.0)


def _rigid(d: int, start: sitk.Transform | None = None) -> Any:
    kind = sitk.Euler2DTransform if d == 2 else sitk.Euler3DTransform
    return kind() if start is None else kind(start)


def _optimise(fixed: sitk.Image, moving: sitk.Image, start: Any, one_modality: bool, *, end: float) -> Any:
    """Return the transform that descent by steps of 1 mm (of a voxel, if that is less), and ever smaller, comes to.

    The images are shrunk fourfold and then twofold: what more voxels would add is far less than the policy does.

    Args:
        fixed: the coarse image.
        moving: likewise.
        start: where to begin; changed in place.
        one_modality: as in :func:`align`.
        end: length of the last steps, as a share of the first.

    Returns:
        the transform, or None where the images lose each other.
    """
    room = max(1, min(*fixed.GetSize(), *moving.GetSize()) // 4)
    shrink = [min(4, room), min(2, room)]
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # the order of a sum over threads is not determined
    if one_modality:
        method.SetMetricAsCorrelation()
    else:
        method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetInterpolator(sitk.sitkLinear)
    # the tolerance as ITK has it ends the descent early: near the optimum the gradient of a correlation is small
    first = min(1.0, *fixed.GetSpacing())
    method.SetOptimizerAsRegularStepGradientDescent(
        first, end * first, 100, relaxationFactor=0.7, gradientMagnitudeTolerance=1e-8
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel([s / 4 if s > 1 else 0.0 for s in shrink])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInitialTransform(start, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError as error:
        logger.info("initial transform: %s", str(error).strip().splitlines()[-1])
        return None
    return start


def _plausible(transform: sitk.AffineTransform) -> bool:
    d = transform.GetDimension()
    stretch = np.linalg.svd(np.array(transform.GetMatrix()).reshape(d, d), compute_uv=False)
    return bool(stretch.max() < STRETCH and stretch.min() > 1 / STRETCH)
