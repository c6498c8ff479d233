"""The transform that a registration begins with: given, read from a file, or found where the policy needs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_rl_reg.affine import align
from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import WorldTransform
from monai_rl_reg.itk_bridge import read_transform
from monai_rl_reg.quality import LEAST_SEEN
from monai_rl_reg.stepping import take_steps
from monai_rl_reg.working import GivenPair

TRIAL_STEPS = 2
"""The policy's own steps that tell whether it needs an alignment."""
SEEN_ENOUGH = 0.88
"""Dice of seen structures after these from which on none is looked for. Of 77 registrations of the hippocampus above
it none gained more than 0.025 of true Dice by one, and the mean was -0.001."""
TRIAL_GAIN = 0.02
"""Dice of seen structures by which one must be ahead after these to be of use."""


def initial_transform(
    pair: GivenPair, wanted: str | Path | Tensor | None, *, alone: bool = False
) -> tuple[WorldTransform, dict[str, Any]]:
    """Return the transform to begin with, from fixed to moving space, and what ``quality.json`` says of it.

    An alignment raises the correlation of the images whether or not the policy needs it. So where the policy sees
    structures it tries by its own steps first, and takes an alignment only if it gets on better with it.

    Args:
        pair: the images.
        wanted: as :attr:`~monai_rl_reg.request.Options.initial`.
        alone: whether no steps follow: then it is of use wherever it raises the correlation.

    Raises:
        InputError: if a file cannot be read, or holds no transform of these dimensions.
    """
    here = torch.eye(4, dtype=torch.float64)
    if isinstance(wanted, Tensor):
        return wanted.double(), {"kind": "given"}
    if wanted in (None, "none"):
        return here, {"kind": "none"}
    fixed, moving = pair.given.values()
    if wanted != "auto":
        return read_transform(Path(str(wanted)), fixed), {"kind": "file", "file": str(wanted)}
    without = None if alone else _seen_after_trial(pair, here)
    if without is not None and without >= SEEN_ENOUGH:
        return here, {"kind": "identity"}
    found = align(fixed, moving, one_modality=pair.bundle.similarity.one_modality)
    before, after = round(found.correlation_before, 6), round(found.correlation_after, 6)
    if found.kind != "identity" and without is not None and without >= LEAST_SEEN:
        aligned = _seen_after_trial(pair, found.transform)
        if aligned is None or aligned <= without + TRIAL_GAIN:
            figures = {"correlation_before": before, "correlation_after": before}
            return here, {"kind": "identity", "given_up": found.kind} | figures
    return found.transform, {"kind": found.kind, "correlation_before": before, "correlation_after": after}


def _seen_after_trial(pair: GivenPair, initial: Tensor) -> float | None:
    """The seen Dice after the trial's steps; None of a policy that sees nothing, or of images that do not overlap."""
    if not pair.bundle.sees:
        return None
    try:
        return take_steps(pair.bundle, pair.onto_fixed(initial), TRIAL_STEPS).curve[-1]["seen_dice"]
    except InputError:
        return None
