"""Propagate labels: register labelled cases to an image and fuse their labels there, as a first draft of its label."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from torch import Tensor

from monai_rl_reg.atlases import Case, CommonSpace, has_any
from monai_rl_reg.errors import InputError
from monai_rl_reg.fusion import disagreement, fuse, local_similarity
from monai_rl_reg.nifti import read_image
from monai_rl_reg.registration import Registrar, Registration
from monai_rl_reg.request import Options, Pair
from monai_rl_reg.tables import plain

logger = logging.getLogger(__name__)

AUTO = "auto"
ROLLOUTS = 4
"""Rollouts of sampled plans that tell the uncertainty where there is only one atlas."""
LARGEST_DOUBT = 1e3
"""Of an image on which no label arrives."""


@dataclass(frozen=True)
class Draft:
    """Labels propagated to an image.

    Attributes:
        label: (1, *spatial), integers.
        atlases: names of the cases it comes from, the most similar one first.
        correlations: of the image with each of them after the affine step.
        registration: of the first of them to the image.
        disagreement: of the atlases, see :func:`~monai_rl_reg.fusion.disagreement`; None for one atlas.
        seconds: wall time.
    """

    label: MetaTensor
    atlases: list[str]
    correlations: list[float]
    registration: Registration
    disagreement: float | None
    seconds: float

    def figures(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them; similarity and folds are those of the first atlas."""
        quality = self.registration.quality
        name = quality["similarity"]
        kept = [f"{name}_before", f"{name}_after", "seen_dice_after", "expected_dice", "expected_dice_range"]
        kept += ["folded_percent", "steps", "by_label", "ckpt", "warnings"]
        figures: dict[str, Any] = {"atlas": self.atlases[0], "atlases": self.atlases, "correlations": self.correlations}
        figures |= {key: quality[key] for key in kept if key in quality}
        figures |= {"disagreement": self.disagreement, "seconds": round(self.seconds, 3)}
        return dict(plain(figures))

    def save(self, folder: str | Path, *, report: bool = False) -> dict[str, str]:
        """Write the registration of the first atlas into a folder, and return the paths of its files.

        Raises:
            InputError: if the folder cannot be made or written to.
        """
        self.registration.save(folder, report=report)
        files = {"moved": "moved.nii.gz", "displacement": "displacement.nii.gz", "quality": "quality.json"}
        files |= {"report": "report.html"} if report else {}
        return {key: str(Path(folder) / name) for key, name in files.items()}


@dataclass(frozen=True)
class Vote:
    """What one atlas says about an image.

    Attributes:
        label: (1, *moving), on the atlas's own grid.
        moved_label: (1, *fixed), there.
        displacement: (d, *fixed), RAS millimetres, from the image to the atlas.
        weight: (1, *fixed), how alike they are around every voxel.
    """

    label: MetaTensor
    moved_label: Tensor
    displacement: MetaTensor
    weight: Tensor


def fuse_votes(votes: Sequence[Vote]) -> MetaTensor:
    """Return the label with the most votes at every voxel, see :func:`~monai_rl_reg.fusion.fuse`."""
    return fuse([v.label for v in votes], [v.displacement for v in votes], [v.weight for v in votes])


class LabelPropagation:
    """Makes drafts with one policy; calls from several threads take turns, among all that share a space.

    Args:
        registrar: registers with the weights to use.
        space: how the images lie to each other.
    """

    def __init__(self, registrar: Registrar, space: CommonSpace) -> None:
        self.registrar = registrar
        self.space = space

    def choose(
        self, image: str, cases: Sequence[Case], count: int, names: Mapping[str, int], *, atlas: str = AUTO
    ) -> list[tuple[Case, float]]:
        """Return the labelled cases that are most like an image, itself aside, with their correlation with it.

        Args:
            image: path.
            cases: those that have a label can be chosen.
            count: how many, at most.
            names: labels to propagate, with their values.
            atlas: name of the only one to choose; ``auto`` for the most similar ones that have any of the labels.

        Raises:
            InputError: if there is none.
        """
        if count < 1:
            raise InputError(f"atlases: expected a number from 1 up, found {count}")
        others = [case for case in cases if case.label and Path(case.image) != Path(image)]
        if not others:
            raise InputError("atlas: expected a labelled case besides the image itself, found none: label one first")
        if atlas != AUTO:
            others = [case for case in others if case.name == atlas]
            if not others:
                raise InputError(f"atlas {atlas}: expected {AUTO} or another case that has a label, found none")
        found, failed = [], None
        with self.space.turn:
            for case in others:
                try:
                    found.append((case, self.space.correlation(case.image, image)))
                except InputError as error:  # one that cannot be used is no atlas
                    logger.warning("atlas %s: %s", case.name, error)
                    failed = error
        if failed is not None and not found:
            raise failed
        ranked = sorted(found, key=lambda item: -item[1])
        useful = (one for one in ranked if atlas == AUTO and has_any(one[0], names))
        return list(islice(useful, count)) or ranked[:count]

    def draft(
        self,
        image: str,
        cases: Sequence[Case],
        names: Mapping[str, int],
        *,
        atlas: str = AUTO,
        count: int = 1,
        options: Options | None = None,
    ) -> Draft:
        """Propagate labels to an image.

        Args:
            image: path.
            cases: those that have a label are the atlases to choose from.
            names: labels to propagate, with their values.
            atlas: name of the only one to take; ``auto`` for the most similar ones.
            count: number of atlases.
            options: of the registrations. Where ``initial`` is ``auto``, the affine transforms of both images to
                their common space are used; the field back is not found.

        Raises:
            InputError: if there is no such atlas, it has none of the labels, or an image cannot be read or registered.
        """
        started = time.monotonic()
        with self.space.turn:
            chosen = self.choose(image, cases, count, names, atlas=atlas)
            vote, registration = self.vote(image, chosen[0][0], names, options)
            votes = [vote, *(self.vote(image, case, names, options)[0] for case, _ in chosen[1:])]
        maps = [vote.moved_label for vote in votes]
        return Draft(
            label=fuse_votes(votes),
            atlases=[case.name for case, _ in chosen],
            correlations=[round(correlation, 4) for _, correlation in chosen],
            registration=registration,
            disagreement=disagreement(maps) if len(maps) > 1 else None,
            seconds=time.monotonic() - started,
        )

    def vote(
        self, image: str, case: Case, names: Mapping[str, int], options: Options | None = None
    ) -> tuple[Vote, Registration]:
        """Register one labelled case to an image; arguments and errors are those of :meth:`draft`."""
        fixed = read_image(image, spatial_dims=None, what="image")
        moving = read_image(case.image, spatial_dims=fixed.ndim - 1, what="atlas")
        label = case.read_label(moving, names)
        if not label.any():
            wanted = " or ".join(names) or "of any name"
            raise InputError(f"atlas {case.name}: expected the label {wanted} in {case.label}, found none")
        how = replace(options or Options(), inverse=False)
        with self.space.turn:
            if how.initial == AUTO:
                how = replace(how, initial=self.space.between(image, case.image))
            how = replace(how, by_label=self.registrar.bundle(fixed.ndim - 1).sees)
            result = self.registrar.register(Pair(fixed, moving, moving_label=label), how)
        assert result.moved_label is not None
        weight = local_similarity(result.moved.as_tensor(), fixed.as_tensor())
        return Vote(label, result.moved_label.as_tensor(), result.displacement, weight), result

    def doubt(self, image: str, cases: Sequence[Case], names: Mapping[str, int], *, count: int = 3) -> float:
        """Return how unsure the label of an image is, to be compared between images.

        It is the disagreement of the ``count`` most similar atlases on it. Where there is one atlas alone, it is the
        uncertainty of the displacement, the mean over the propagated label in millimetres.

        Raises:
            InputError: as :meth:`draft` does.
        """
        alone = len(self.choose(image, cases, 2, names)) == 1 or count == 1
        draft = self.draft(image, cases, names, count=count, options=Options(uncertainty=ROLLOUTS if alone else 0))
        spread, inside = draft.registration.uncertainty, draft.label.as_tensor() > 0
        value = float(spread.as_tensor()[inside].mean()) if spread is not None else draft.disagreement
        return value if value is not None and math.isfinite(value) else LARGEST_DOUBT
