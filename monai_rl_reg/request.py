"""What to register, read and checked, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.landmarks import Landmarks, read_landmarks
from monai_rl_reg.nifti import read_image, read_label


@dataclass(frozen=True)
class Options:
    """How to register.

    Attributes:
        steps: number of steps; ``auto`` stops when a step gains too little; None takes the bundle's number.
        refine: seconds of refinement at most, by gradient descent on the task's loss; 0 for none.
        uncertainty: rollouts of sampled plans to tell the uncertainty from, at least 2; 0 for none.
        initial: transform from fixed to moving space to begin with: ``auto`` finds an affine where the images are not
            aligned, ``none`` takes them as they lie; else the path of an ITK transform or of a displacement field, or
            a (4, 4) tensor in RAS millimetres.
        inverse: also find the field back.
        by_label: go by the structures of the moving label, where they are those that the policy sees, instead of what
            it sees of them in the moving image.
    """

    steps: int | str | None = None
    refine: float = 0.0
    uncertainty: int = 0
    initial: str | Path | Tensor | None = "auto"
    inverse: bool = True
    by_label: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        if not (self.steps in (None, "auto") or (whole and int(self.steps or 0) >= 0)):
            raise InputError(f"steps: expected a whole number from 0 up, or auto, found {self.steps!r}")
        if not 0 <= self.refine < math.inf:
            raise InputError(f"refine: expected a number of seconds from 0 up, found {self.refine!r}")
        if self.uncertainty < 0 or self.uncertainty == 1:
            raise InputError(f"uncertainty: expected 0, or at least 2 rollouts, found {self.uncertainty!r}")


@dataclass(frozen=True)
class Pair:
    """Two images, read and checked, and what belongs to them.

    Attributes:
        fixed: (1, *spatial).
        moving: (1, *spatial), on a grid of its own.
        fixed_label: on the fixed image's grid.
        moving_label: on the moving image's grid.
        landmarks: in either image.
    """

    fixed: MetaTensor
    moving: MetaTensor
    fixed_label: MetaTensor | None = None
    moving_label: MetaTensor | None = None
    landmarks: Landmarks | None = None

    @classmethod
    def read(
        cls, fixed: Any, moving: Any, *, fixed_label: Any = None, moving_label: Any = None, landmarks: Any = None
    ) -> Pair:
        """Read images, label maps and landmarks.

        Args:
            fixed: path, DICOM folder, or image of nibabel, SimpleITK, ITK or MONAI.
            moving: likewise; 2D or 3D, as the fixed one.
            fixed_label: likewise, on the fixed image's grid.
            moving_label: likewise, on the moving image's grid.
            landmarks: path of a CSV file, see :func:`~monai_rl_reg.landmarks.read_landmarks`.

        Raises:
            InputError: if anything is wrong with one of them.
        """
        fixed_image = read_image(fixed, spatial_dims=None, what="fixed image")
        d = fixed_image.ndim - 1
        moving_image = read_image(moving, spatial_dims=d, what="moving image")
        labels: list[MetaTensor | None] = [
            None if label is None else read_label(label, image, source, spatial_dims=d)
            for label, image, source in ((fixed_label, fixed_image, fixed), (moving_label, moving_image, moving))
        ]
        points = None if landmarks is None else read_landmarks(landmarks)
        if points is not None:
            points.check(fixed_image, moving_image)
        return cls(fixed_image, moving_image, labels[0], labels[1], points)
