"""Train the policy on the cases of an annotator: every image, and the labels as far as there are any."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from monai_rl_reg.atlases import Case, has_any
from monai_rl_reg.checkpoints import guided_in, load_policy, setting_in, structures_in
from monai_rl_reg.engine import scalars
from monai_rl_reg.errors import InputError, bare_input_errors
from monai_rl_reg.files import file_stamp
from monai_rl_reg.finishing import label_dtype
from monai_rl_reg.handlers import TrainingTime
from monai_rl_reg.nifti import read_image, write_image
from monai_rl_reg.policy_bundle import DEFAULT_BUNDLE, WITH_LABELS
from monai_rl_reg.resuming import prepare_output
from monai_rl_reg.tables import write_json
from monai_rl_reg.working import coarser_voxels

LATEST, SHIPPED, SCRATCH = "latest", "shipped", "scratch"
LEAST_LABELLED = 2
"""From as many labelled cases on, labels are learnt from: one of them is kept back to validate with."""
MOST_VALIDATION = 10
"""Pairs to validate with, at most."""
QUIET = ("TrainingProgress", "TensorBoardStatsHandler", "RegistrationPictures")
"""Handlers of the bundle that show progress elsewhere."""
FINE_TUNING = 0.1
"""Share of the bundle's learning rate for weights that are trained already."""
MOST_VOXELS = 1_000_000
"""Larger images are trained on with larger voxels: a hundred states of several structures have to fit into memory."""
KEPT = {"intensity_range": "intensity_range", "similarity": "similarity::_target_", "field_stride": "field_stride"}
KEPT |= {name: f"network_def::{name}" for name in ("channels", "plan_channels", "action_bound")}
"""Settings that go on with weights, and their ids in the configuration."""
MOST_EPOCHS = 1_000_000
"""The minutes end a training."""


class Weights:
    """The weights that trainings left, each in a folder named by its time; the shipped ones stay as they are.

    Args:
        folder: of all trainings.
        shipped: file that takes the place of the bundle's own weights.
    """

    def __init__(self, folder: str | Path, shipped: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.shipped = None if shipped is None else Path(shipped)

    def names(self) -> list[str]:
        """Return what can be asked for: the latest, each by its name, newest first, the shipped ones."""
        return [LATEST, *(path.parent.name for path in self._files()), SHIPPED]

    def path(self, name: str = LATEST) -> Path | None:
        """Return the file of these weights; None for the bundle's own.

        Raises:
            InputError: if there are none of this name.
        """
        files = {path.parent.name: path for path in self._files()}
        if name == SHIPPED or (name == LATEST and not files):
            return self.shipped
        if name == LATEST:
            return next(iter(files.values()))
        if name not in files:
            raise InputError(f"weights {name}: expected one of {', '.join(self.names())}, found none")
        return files[name]

    def start(self) -> Path:
        """Return the folder for a new training."""
        return self.folder / time.strftime("%Y%m%d-%H%M%S")

    def stats(self) -> dict[str, Any]:
        """Return the figures of the newest training, finished or not; none where there was no training."""
        found = sorted(self.folder.glob("*/stats.json"), reverse=True)
        return dict(json.loads(found[0].read_text(encoding="utf-8"))) if found else {}

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*/model.pt"), reverse=True)


def split_cases(cases: Sequence[Case], folder: Path, names: Mapping[str, int]) -> dict[str, list[dict[str, str]]]:
    """Return the data of training, all images, and of validation, pairs: what the bundle's ``splits`` is.

    With at least :data:`LEAST_LABELLED` labelled cases, every fifth of them (at least one) keeps its label for
    validation, where others are registered to it; its image stays in training, without the label. With fewer, labels
    are left out and the pairs to validate by similarity are of the training images themselves: what is learnt
    from images alone cannot know more of these than of others.

    Args:
        cases: all that there are.
        folder: gets label maps whose values had to be changed to those of ``names``.
        names: label names and values.

    Raises:
        InputError: if there are fewer than two images.
    """
    if len(cases) < 2:
        raise InputError(f"training: expected at least two images, found {len(cases)}")
    labelled = [case for case in cases if case.label and has_any(case, names)]
    if len(labelled) < LEAST_LABELLED:
        every = itertools.permutations([case.image for case in cases[:MOST_VALIDATION]], 2)
        pairs = [{"fixed": fixed, "moving": moving} for fixed, moving in every]
        step = max(1, len(pairs) // MOST_VALIDATION)
        return {"training": [{"image": case.image} for case in cases], "validation": pairs[::step][:MOST_VALIDATION]}
    held_out = labelled[:: min(5, len(labelled))]
    labels = {case.name: _label_file(case, folder, names) for case in labelled}
    training = []
    for case in cases:
        known = case in labelled and case not in held_out
        training.append({"image": case.image} | ({"label": labels[case.name]} if known else {}))
    validation = []
    for fixed, moving in itertools.product(held_out, (case for case in labelled if case not in held_out)):
        pair = {"fixed": fixed.image, "moving": moving.image}
        validation.append(pair | {"fixed_label": labels[fixed.name], "moving_label": labels[moving.name]})
    step = max(1, len(validation) // MOST_VALIDATION)
    return {"training": training, "validation": validation[::step][:MOST_VALIDATION]}


def train(
    cases: Sequence[Case],
    names: Mapping[str, int],
    weights: Weights,
    *,
    minutes: float = 10.0,
    start: str = LATEST,
    bundle: str | Path | None = None,
    device: str | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train by the bundle's own configuration and return the figures, which lie in ``stats.json`` at any time.

    The weights that it starts with are validated first, and ``model.pt`` in the training's folder is always the best
    so far: a training that is stopped leaves what it has reached, and one that does not help what it began with.

    Args:
        cases: all cases.
        names: label names and values.
        weights: get a new folder.
        minutes: to train for.
        start: weights to go on from: ``latest``, ``shipped``, a training's name; ``scratch`` for none. Where they see
            another number of structures than there are labels, the shipped ones that see as many, else none.
        bundle: its folder; by default the package's ``rl_reg``.
        device: where to compute; by default the configuration's choice.
        tell: gets a line an epoch.

    Raises:
        InputError: if there are fewer than two images, one cannot be used, or the weights to go on from would lose
            what they learnt from labels.
    """
    if not minutes > 0:
        raise InputError(f"minutes: expected a number above 0, found {minutes}")
    root = Path(bundle) if bundle is not None else DEFAULT_BUNDLE
    folder = weights.start()
    splits = split_cases(cases, folder, names)
    labelled = "fixed_label" in splits["validation"][0]
    values: dict[str, Any] = {"bundle_root": str(root), "output_dir": str(folder), "splits": splits}
    values |= {"minutes": minutes, "max_epochs": MOST_EPOCHS, "epoch_length": 4, "val_interval": 1, "amp": "@half"}
    values |= {"train::dataset::progress": False, "validate::dataset::progress": False}
    if labelled:
        values["labels"] = list(names.values())
    by_size = sorted((case.image for case in cases), key=lambda path: file_stamp(path).get("size", 0))
    largest = read_image(by_size[-1], spatial_dims=None)
    values["spatial_dims"] = largest.ndim - 1
    if (pixdim := coarser_voxels(largest, MOST_VOXELS)) is not None:
        tell(f"large images: training with voxels of {' x '.join(f'{size:.2g}' for size in pixdim)} mm")
        values["pixdim"] = pixdim
    if device is not None:
        values["device"] = f"$torch.device({device!r})"
    parser = ConfigParser()
    parser.read_config([root / "configs" / name for name in ("train.json", WITH_LABELS)[: 1 + labelled]])
    config: Any = parser.config
    count = sum(case.label is not None and has_any(case, names) for case in cases)
    if not labelled and start != SCRATCH and structures_in(str(weights.path(start) or root / "models" / "model.pt")):
        raise InputError(
            f"training: expected at least {LEAST_LABELLED} labelled cases, found {count}: the weights to go on from "
            f"see labelled structures, and would lose them (images alone teach {SCRATCH}, or weights without labels)"
        )
    began = _first_weights(weights, start, root, structures=len(names) if labelled else 0)
    if began is not None:
        values["learning_rate"] = FINE_TUNING * config["learning_rate"]
        values["guided"] = guided_in(str(began))
        for name, key in KEPT.items():
            if (setting := setting_in(str(began), name)) is not None:
                values[key] = setting
    parser.update(values)
    for handler in [*config["train"]["handlers"], *config["validate"]["handlers"]]:
        if isinstance(handler, dict) and handler["_target_"].rpartition(".")[2] in QUIET:
            handler["_disabled_"] = True
    with bare_input_errors():
        prepare_output(str(folder))
        network, anatomy = (parser.get_parsed_content(i) for i in ("network", "anatomy"))
        if began is not None:
            load_policy(network, str(began), anatomy=anatomy)
        # after the weights are there: what is validated is a copy of the network
        trainer, evaluator = (parser.get_parsed_content(i) for i in ("train::trainer", "validate::evaluator"))
        parser.get_parsed_content("validate::early_stop").set_trainer(trainer)
        figures = _Figures(folder / "stats.json", parser.get_parsed_content("training_time"), evaluator, tell)
        figures.stats |= {"images": len(cases), "labelled": count}
        figures.stats |= {"learnt_from_labels": labelled, "start": str(began or SCRATCH)}
        figures.attach(trainer)
        evaluator.run()
        figures.note(trainer)
        trainer.run()
    return figures.stats


class _Figures:
    """Writes what a training has reached after every epoch, in the form that MONAI Label's clients read."""

    def __init__(self, file: Path, clock: TrainingTime, evaluator: Any, tell: Callable[[str], None]) -> None:
        self.file, self.clock, self.evaluator, self.tell = file, clock, evaluator, tell
        self.started = time.time()
        self.stats: dict[str, Any] = {"start_ts": int(self.started)}

    def attach(self, trainer: Engine) -> None:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.note)
        trainer.add_event_handler(Events.COMPLETED, self.note)

    def note(self, trainer: Engine) -> None:
        share, epoch, state = self.clock.progress(), trainer.state.epoch, self.evaluator.state
        metrics = {name: round(float(value), 4) for name, value in state.metrics.items()}
        self.stats.setdefault("metrics_before", metrics)
        output: Any = trainer.state.output
        losses = {name: round(value, 4) for name, value in scalars(output).items()} if output else {}
        ended = epoch > 0 and epoch == trainer.state.max_epochs
        self.stats |= {
            "epoch": epoch,
            "total_epochs": epoch if ended else max(epoch + 1, round(epoch / max(share, 1e-3))),
            "total_time" if ended else "current_time": str(timedelta(seconds=int(time.time() - self.started))),
            "best_metric": round(float(state.best_metric), 4),
            "train": {"metrics": losses},
            "eval": {
                "metrics": metrics,
                "key_metric_name": state.key_metric_name,
                "best_metric": round(float(state.best_metric), 4),
                "best_metric_epoch": state.best_metric_epoch,
            },
        }
        write_json(self.file, self.stats)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in (losses | metrics).items() if math.isfinite(value))
        self.tell(f"{100 * min(1.0, share):.0f} %, epoch {epoch}: {shown}")


def _first_weights(weights: Weights, start: str, root: Path, structures: int) -> Path | None:
    """Return the first weights that see so many structures: those asked for, the shipped ones; None if none does."""
    if start == SCRATCH:
        return None
    shipped = [root / "models" / name for name in ("model.pt", "model_without_labels.pt")]
    for path in [weights.path(start), weights.shipped, *shipped]:
        if path is not None and path.is_file() and structures_in(str(path)) == structures:
            return path
    return None


def _label_file(case: Case, folder: Path, names: Mapping[str, int]) -> str:
    """Return the path of a label map with the values of ``names``: its own, unless its values differ from them."""
    assert case.label is not None
    if case.values is None or all(names.get(name) == value for name, value in case.values.items()):
        return case.label
    label = case.read_label(read_image(case.image, spatial_dims=None), names)
    path = folder / "labels" / f"{case.name}.nii.gz"
    write_image(path, label.as_tensor().to(label_dtype(label)), label.affine)
    return str(path)
