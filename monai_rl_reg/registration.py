"""Register two images: paths or images in; the moved image, the field and figures of trust out."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor
from tqdm import tqdm

from monai_rl_reg.errors import InputError, bare_input_errors
from monai_rl_reg.files import replacing_folder
from monai_rl_reg.finishing import Correspondence
from monai_rl_reg.initial import initial_transform
from monai_rl_reg.itk_bridge import write_transform
from monai_rl_reg.landmarks import Landmarks
from monai_rl_reg.nifti import name_of, place_warnings, write_displacement, write_image
from monai_rl_reg.policy_bundle import PolicyBundle, policy_files
from monai_rl_reg.quality import dice_figures, field_figures, versions, warnings_about
from monai_rl_reg.request import Options, Pair
from monai_rl_reg.stepping import deviation, take_steps
from monai_rl_reg.tables import write_json
from monai_rl_reg.working import GivenPair

logger = logging.getLogger(__name__)

FILES = {
    "moved.nii.gz",
    "moved_label.nii.gz",
    "displacement.nii.gz",
    "inverse_displacement.nii.gz",
    "uncertainty.nii.gz",
    "transform.h5",
    "transform.tfm",
    "landmarks.csv",
    "quality.json",
    "report.html",
}
"""All files that :meth:`Registration.save` may write."""


@dataclass(frozen=True)
class Registration:
    """The result of a registration. Displacements lead from the grid they lie on to the other image.

    Attributes:
        fixed: ``(1, *fixed)``, as given.
        moving: ``(1, *moving)``, as given.
        moved: ``(1, *fixed)``, the moving image resampled once, from the original; outside it 0, or its
            least value where that is below.
        displacement: ``(d, *fixed)``, RAS millimetres, from fixed to moving space, the initial transform inside.
        inverse_displacement: ``(d, *moving)``, RAS millimetres, from moving to fixed space.
        moved_label: ``(1, *fixed)``, integers, if a moving label was given.
        unmoved_label: likewise, by the initial transform alone.
        fixed_label: ``(1, *fixed)``, if given.
        uncertainty: ``(1, *fixed)``, standard deviation of the displacement in millimetres, if asked for.
        landmarks: where the given ones lie in the other image.
        quality: the figures of ``quality.json``.
        working: ``(2, *working)``, fixed and moving as the policy saw them at its start.
        history: the policy's displacement ``(d, *working)`` in working voxels after 0, 1, ... steps; after the last
            step comes the refined one, if asked for.
        curve: for each of these, the similarity under its name; where both labels are given, ``dice``; where the
            policy or its judge's witness sees structures, ``seen_dice``.
    """

    fixed: MetaTensor
    moving: MetaTensor
    moved: MetaTensor
    displacement: MetaTensor
    working: MetaTensor
    inverse_displacement: MetaTensor | None = None
    moved_label: MetaTensor | None = None
    unmoved_label: MetaTensor | None = None
    fixed_label: MetaTensor | None = None
    uncertainty: MetaTensor | None = None
    landmarks: Landmarks | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    history: list[Tensor] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def save(self, folder: str | Path, *, tfm: bool = False, report: bool = False) -> None:
        """Write all results into a folder; they appear together, in place of those of an earlier run.

        Args:
            folder: where to; what else lies there stays, and of the earlier run's what its ``quality.json`` names goes.
            tfm: also write the transform as text, ``transform.tfm``.
            report: also write ``report.html``.

        Raises:
            InputError: if the folder cannot be made or written to.
        """
        with replacing_folder(folder, _written_before(Path(folder))) as staging:
            affine = self.fixed.affine
            images = {"moved": self.moved, "moved_label": self.moved_label, "uncertainty": self.uncertainty}
            for name, image in images.items():
                if image is not None:
                    write_image(staging / f"{name}.nii.gz", image.as_tensor(), affine)
            write_displacement(staging / "displacement.nii.gz", self.displacement.as_tensor(), affine)
            if (inverse := self.inverse_displacement) is not None:
                write_displacement(staging / "inverse_displacement.nii.gz", inverse.as_tensor(), inverse.affine)
            for suffix in (".h5", ".tfm") if tfm else (".h5",):
                write_transform(staging / f"transform{suffix}", self.displacement.as_tensor(), affine)
            if self.landmarks is not None:
                self.landmarks.save(staging / "landmarks.csv")
            if report:
                from monai_rl_reg.report import write_report  # matplotlib only where it is needed

                write_report(self, staging / "report.html")
            written = sorted({"quality.json", *(file.name for file in staging.iterdir())})
            write_json(staging / "quality.json", self.quality | {"files": written})


def _written_before(folder: Path) -> set[str]:
    """The files of an earlier run: those that its ``quality.json`` names."""
    try:
        quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
        return FILES & {str(name) for name in quality["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def keep_inputs(folder: str | Path, *paths: Any) -> None:
    """Check that what is given is not what :meth:`Registration.save` would replace in a folder.

    Raises:
        InputError: if it is.
    """
    folder = Path(folder).resolve()
    for path in paths:
        if not isinstance(path, str | Path):
            continue
        itself = Path(path).parent.resolve() / Path(path).name, Path(path).resolve()  # a link, and what it leads to
        if any(file.name in FILES and file.parent == folder for file in itself):
            raise InputError(
                f"output {folder}: expected a folder whose results are none of what is given, found {path}, which "
                "would be replaced"
            )


class Registrar:
    """Registers pairs with one policy: the bundle is loaded once.

    Args:
        bundle: its folder; by default the package's ``rl_reg``.
        ckpt: weights; by default the bundle's own.
        device: where to compute, for example ``cpu`` or ``cuda:0``; by default the bundle's choice.
    """

    def __init__(
        self,
        *,
        bundle: str | Path | None = None,
        ckpt: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {"folder": bundle, "ckpt": ckpt, "device": device}
        self._loaded: dict[int, PolicyBundle] = {}

    def bundle(self, spatial_dims: int = 3) -> PolicyBundle:
        """Return the bundle for 2D or 3D images, loaded at the first call.

        Raises:
            InputError: if the bundle or its weights cannot be used, or not for images of so many dimensions.
        """
        if spatial_dims not in self._loaded:
            try:
                self._loaded[spatial_dims] = PolicyBundle(**self.settings, spatial_dims=spatial_dims)
            except InputError as error:
                other = 5 - spatial_dims
                if not self.serves(other):
                    raise
                ckpt = self._loaded[other].ckpt
                raise InputError(
                    f"checkpoint {ckpt}: expected images of {other} dimensions, found some of {spatial_dims}"
                ) from error
        return self._loaded[spatial_dims]

    def serves(self, spatial_dims: int) -> bool:
        """Return whether bundle and weights can be used for images of so many dimensions."""
        if spatial_dims not in self._loaded:
            with contextlib.suppress(InputError):
                self._loaded[spatial_dims] = PolicyBundle(**self.settings, spatial_dims=spatial_dims)
        return spatial_dims in self._loaded

    def made_by(self) -> dict[str, Any]:
        """Return what tells this policy from another one: its files, each with its size and time of change.

        Raises:
            InputError: if the bundle cannot be used.
        """
        return policy_files(self.settings["folder"], self.settings["ckpt"])

    def register(self, pair: Pair, options: Options | None = None, *, progress: bool = False) -> Registration:
        """Register a pair.

        Args:
            pair: read by :meth:`Pair.read`.
            options: how.
            progress: show a progress bar.

        Raises:
            InputError: if the images, the initial transform, or the weights cannot be used.
        """
        options = options or Options()
        started = time.monotonic()
        bundle = self.bundle(pair.fixed.ndim - 1)
        with bare_input_errors():
            if options.by_label:
                _check_by_label(bundle, pair)
            given = GivenPair(
                bundle, pair.fixed, pair.moving, pair.fixed_label, pair.moving_label, by_label=options.by_label
            )
            initial, kind = initial_transform(given, options.initial, alone=options.steps == 0)
            working = given.onto_fixed(initial)
        limit = bundle.steps if options.steps is None else options.steps
        total = 2 * bundle.steps if limit == "auto" else int(limit)
        with tqdm(total=total, desc="registering", unit="step", disable=not progress, leave=False) as bar:
            steps = take_steps(bundle, working, limit, refine_seconds=options.refine, tick=bar.update)
            bar.set_description("finishing")
            way = Correspondence.on_fixed_grid(steps.history[-1], working.image.affine, initial, pair.fixed)
            uncertainty = None
            if options.uncertainty:
                spread = deviation(bundle, working, initial, steps.taken, options.uncertainty)
                uncertainty = way.spread(spread, working.image.affine)
            moved_label = unmoved_label = None
            if pair.moving_label is not None:
                moved_label = way.move(pair.moving_label, nearest=True)
                unmoved_label = way.move(pair.moving_label, nearest=True, initial_only=True)
            moved = way.move(pair.moving)
            inverse, *errors = way.inverse(pair.moving) if options.inverse else (None,)
        quality: dict[str, Any] = {"fixed": name_of(pair.fixed), "moving": name_of(pair.moving)}
        name = bundle.similarity.name
        quality["similarity"] = name
        for key in (name, "seen_dice"):
            if key in steps.curve[0]:
                quality |= {f"{key}_before": steps.curve[0][key], f"{key}_after": steps.curve[-1][key]}
        if bundle.judge is not None and "seen_dice_after" in quality:
            expected = bundle.judge.expect(quality["seen_dice_after"])
            quality |= {"expected_dice": expected.dice, "expected_dice_range": [expected.low, expected.high]}
        if moved_label is not None and unmoved_label is not None and pair.fixed_label is not None:
            quality |= dice_figures(moved_label, unmoved_label, pair.fixed_label)
        if pair.landmarks is not None:
            quality |= pair.landmarks.errors(way)
        quality |= field_figures(way.displacement.displacement, way.displacement.affine)
        quality |= dict(zip(("inverse_error_mm", "inverse_error_max_mm"), errors, strict=False))
        quality |= {"steps": steps.taken, "stopped_by_itself": limit == "auto" and steps.taken < total}
        if bundle.voxel_size is not None:
            quality["trained_at_mm"] = [round(s, 4) for s in bundle.voxel_size]
        quality |= {"initial": kind, "working_grid": working.description(), "refinement": steps.refinement}
        if options.by_label:
            quality["by_label"] = {str(structure): value for structure, value in sorted(working.recognised.items())}
        quality |= {"uncertainty_rollouts": options.uncertainty, "bundle": bundle.version(), "ckpt": bundle.ckpt}
        quality["warnings"] = warnings_about(quality) + place_warnings(pair.fixed, pair.moving)
        for text in quality["warnings"]:
            logger.warning("%s: %s", quality["moving"], text)
        quality |= {"seconds": round(time.monotonic() - started, 3), "versions": versions()}
        return Registration(
            fixed=pair.fixed,
            moving=pair.moving,
            moved=moved,
            displacement=MetaTensor(way.displacement.displacement, affine=pair.fixed.affine),
            inverse_displacement=inverse,
            moved_label=moved_label,
            unmoved_label=unmoved_label,
            fixed_label=pair.fixed_label,
            uncertainty=uncertainty,
            landmarks=None if pair.landmarks is None else pair.landmarks.carried(way),
            quality=quality,
            working=working.image,
            history=steps.history,
            curve=steps.curve,
        )


def _check_by_label(bundle: PolicyBundle, pair: Pair) -> None:
    if pair.moving_label is None:
        raise InputError(f"by label: expected a label of the moving image {name_of(pair.moving)}, found none")
    if not bundle.sees:
        raise InputError(f"by label: expected weights that see structures, found {bundle.ckpt}, trained without labels")


def register(
    fixed: Any,
    moving: Any,
    *,
    moving_label: Any = None,
    fixed_label: Any = None,
    landmarks: str | Path | None = None,
    steps: int | str | None = None,
    refine: float = 0.0,
    uncertainty: int = 0,
    initial: str | Path | None = "auto",
    by_label: bool = False,
    bundle: str | Path | None = None,
    ckpt: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Registration:
    """Register a moving image to a fixed one; each may lie on a grid of its own, 2D or 3D.

    For several pairs keep a :class:`Registrar`: it loads the weights once.

    Args:
        fixed: path, folder of a DICOM series, or image of nibabel, SimpleITK, ITK or MONAI (a MetaTensor).
        moving: likewise.
        moving_label: label map on the moving image's grid, to be moved.
        fixed_label: label map on the fixed image's grid, to measure Dice with.
        landmarks: CSV file of points to carry to the other image.
        steps: number of steps; ``auto`` stops when a step gains too little; None takes the bundle's number.
        refine: seconds of refinement at most.
        uncertainty: rollouts of sampled plans; 0 for none.
        initial: ``auto``, ``none``, or the path of an ITK transform.
        by_label: go by the moving label's structures instead of what the policy sees of them in the moving image.
        bundle: folder of the bundle; by default the package's ``rl_reg``.
        ckpt: weights; by default the bundle's own.
        device: where to compute, for example ``cpu`` or ``cuda:0``.
        progress: show a progress bar.

    Raises:
        InputError: if anything is wrong with what was given, in one sentence.
    """
    options = Options(steps, refine, uncertainty, initial, by_label=by_label)
    pair = Pair.read(fixed, moving, fixed_label=fixed_label, moving_label=moving_label, landmarks=landmarks)
    return Registrar(bundle=bundle, ckpt=ckpt, device=device).register(pair, options, progress=progress)
