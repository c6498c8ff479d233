"""MONAI Label's tasks, thin: what they do is in :mod:`monai_rl_reg.label_propagation` and its neighbours."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import replace
from typing import Any

from monai.data import MetaTensor
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.transform.writer import Writer

from monai_rl_reg.atlases import Case
from monai_rl_reg.errors import InputError
from monai_rl_reg.label_app.workspace import DOUBT, Workspace
from monai_rl_reg.label_propagation import AUTO
from monai_rl_reg.label_training import LATEST, SCRATCH, train
from monai_rl_reg.metrics import mean_label_dice
from monai_rl_reg.nifti import read_image, read_volume
from monai_rl_reg.request import Options, Pair
from monai_rl_reg.tables import plain

logger = logging.getLogger(__name__)

ALL = "all"
ORIGINAL = DefaultLabelTag.ORIGINAL.value
SLICER_TYPE = "uint8"
"""What 3D Slicer asks for. It takes the names of a draft in the order of their values, and its values for 1, 2, ... in
that order; others go by the values in ``/info/``."""
HOLD = 3600.0
"""Seconds for which an image that was handed out is not handed out again, while there are others."""


class _Task(InferTask):  # type: ignore[misc]
    """An infer task of this app; its labels and options follow the datastore."""

    def __init__(self, workspace: Workspace, kind: InferType, description: str) -> None:
        super().__init__(kind, None, 3, description)
        self.workspace = workspace

    def is_valid(self) -> bool:
        """Return that it can be used: there is always a policy."""
        return True

    def options(self, request: dict[str, Any]) -> Options:
        """Return how to register."""
        steps, refine = _number(request, "steps", 0), _number(request, "refine", 0.0)
        return Options(int(steps) or None, refine)

    def write(self, image: MetaTensor, request: dict[str, Any], figures: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return a file in the format that the client asks for, and the figures."""
        asked = {key: value for key, value in request.items() if key.startswith("result_")}
        asked.setdefault("result_extension", ".nii.gz")
        volume = MetaTensor(image.as_tensor()[0], affine=image.affine)
        path, found = Writer(label="pred", json="result")(asked | {"pred": volume, "result": figures})
        return path, found


class LabelPropagationTask(_Task):
    """The label of an image, as the most similar labelled cases propose it."""

    def __init__(self, workspace: Workspace) -> None:
        what = "Registers labelled cases to the image and fuses their labels there"
        super().__init__(workspace, InferType.SEGMENTATION, what)

    def info(self) -> dict[str, Any]:
        """Return what clients show, with the labels that there are now."""
        self.labels = self.workspace.names()
        return dict(super().info())

    def config(self) -> dict[str, Any]:
        """Return the options that clients offer."""
        labelled = sorted(self.workspace.store.get_labeled_images())
        return {
            "atlas": [AUTO, *labelled],
            "atlases": 3,
            "label": [ALL, *self.workspace.names()],
            "steps": 0,  # the bundle's number
            "refine": 0.0,
            "weights": self.workspace.weights.names(),
            "report": False,
        }

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the file with the label, and the figures."""
        names, label = self.workspace.names(), _choice(request, "label", ALL)
        if label != ALL:
            if label not in names:
                raise InputError(f"label {label}: expected one of {', '.join([ALL, *names])}")
            names = {label: names[label]}
        draft = self.workspace.propagation(_choice(request, "weights", LATEST)).draft(
            request["image"],
            self.workspace.labelled(),
            names,
            atlas=_choice(request, "atlas", AUTO),
            count=int(_number(request, "atlases", 3)),
            options=self.options(request),
        )
        files = draft.save(self.workspace.results(request), report=bool(request.get("report", False)))
        proposed = draft.label
        if request.get("result_dtype") == SLICER_TYPE:
            own, names = names, {name: number for number, name in enumerate(names, start=1)}
            proposed = Case("draft", request["image"], values=own).renumbered(proposed, names)
        return self.write(proposed, request, draft.figures() | {"label_names": names, "files": files})


class RegistrationTask(_Task):
    """One image registered to another, for scripts: clients do not list it."""

    def __init__(self, workspace: Workspace) -> None:
        what = "Registers the image with the id `moving` of the request to the image"
        super().__init__(workspace, InferType.OTHERS, what)

    def config(self) -> dict[str, Any]:
        """Return the options that clients offer."""
        return {"moving": "", "steps": 0, "refine": 0.0, "weights": self.workspace.weights.names(), "report": False}

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the file with the moved image, and the figures."""
        moving = self.workspace.case(str(request.get("moving") or "`moving`"))
        pair = Pair.read(request["image"], moving.image, moving_label=moving.label)
        propagation = self.workspace.propagation(_choice(request, "weights", LATEST))
        with propagation.space.turn:
            result = propagation.registrar.register(pair, self.options(request))
        folder = self.workspace.results(request, moving.name)
        report = bool(request.get("report", False))
        result.save(folder, report=report)
        files = {file.name.split(".")[0]: str(file) for file in sorted(folder.iterdir())}
        return self.write(result.moved, request, plain(result.quality) | {"files": files})


class TrainingTask(TrainTask):  # type: ignore[misc]
    """Trains the policy on all images of the datastore; MONAI Label runs it in a process of its own."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__("Trains the registration on all images, and on the labels that there are")
        self.workspace = workspace

    def config(self) -> dict[str, Any]:
        """Return the options that clients offer."""
        return {"minutes": 10.0, "start": [*self.workspace.weights.names(), SCRATCH]}

    def stats(self) -> dict[str, Any]:
        """Return the figures of the newest training."""
        return self.workspace.weights.stats()

    def check(self) -> None:
        """Refuse a datastore that nothing can be learnt from."""
        count = len(self.workspace.store.list_images())
        if count < 2:
            raise InputError(f"training: expected at least two images in the datastore, found {count}")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, and return the figures."""
        for name in ("ignite", "monai.data.nvimgcodec_pydicom_plugin"):
            logging.getLogger(name).setLevel(logging.ERROR)  # clients show the last twenty lines: let them be figures
        return train(
            [self.workspace.case(name) for name in sorted(datastore.list_images())],
            self.workspace.names(),
            self.workspace.weights,
            minutes=_number(request, "minutes", 10.0),
            start=_choice(request, "start", LATEST),
            bundle=self.workspace.conf.get("bundle"),
            device=self.workspace.conf.get("device"),
            tell=lambda line: print(line, flush=True),
        )


class DisagreementStrategy(Strategy):  # type: ignore[misc]
    """The next image to label is the one on which the atlases disagree most."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__("The unlabelled image on which the propagated labels of the most similar cases disagree most")
        self.workspace = workspace

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Return the id of the next image; None where all are labelled."""
        unlabelled = self.workspace.unlabelled()
        if not unlabelled:
            return None
        handed_out = {name: self._handed_out(datastore, name) for name in unlabelled}
        waiting = [name for name in unlabelled if time.time() - handed_out[name] > HOLD]
        candidates = waiting or unlabelled
        doubts = self.workspace.doubts(candidates, seconds=_number(request, "seconds", 10.0))
        if not doubts:  # nothing is labelled yet, or there was no time for any image
            return {"id": candidates[0], "weight": 0.0}
        chosen = max(doubts, key=lambda name: doubts[name])
        return {"id": chosen, "weight": doubts[chosen]}

    def _handed_out(self, datastore: Datastore, name: str) -> float:
        return float(datastore.get_image_info(name).get("strategy", {}).get(DOUBT, {}).get("ts", 0))


class DisagreementScoring(ScoringMethod):  # type: ignore[misc]
    """How far the atlases disagree on every unlabelled image; the strategy need not compute it then."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__("Disagreement of the propagated labels of the most similar cases on every unlabelled image")
        self.workspace = workspace

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, float]:
        """Return the figure of each image."""
        return self.workspace.doubts(self.workspace.unlabelled())


class DraftDice(ScoringMethod):  # type: ignore[misc]
    """How good the drafts were: Dice of the original labels against the final ones, mean over the labels."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__("Dice of the drafts (original) against the final labels, mean over the labels")
        self.workspace = workspace

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, float]:
        """Return the figure of each image that has both labels."""
        names, found = self.workspace.names(), {}
        for case in self.workspace.labelled():
            draft = datastore.get_label_uri(case.name, ORIGINAL)
            if not draft:
                continue
            try:
                image = read_image(case.image, spatial_dims=None)
                numbers = datastore.get_label_info(case.name, ORIGINAL).get("label_names")
                first = replace(case, values=numbers or None).renumbered(read_volume(draft, spatial_dims=None), names)
                dice = mean_label_dice(first.as_tensor()[None], case.read_label(image, names).as_tensor()[None])
            except (InputError, ValueError, RuntimeError) as error:
                logger.warning("dice of %s: %s", case.name, error)
                continue
            if dice.isfinite().all():  # the final label has one of the names
                found[case.name] = float(dice)
        self.workspace.note("dice", found)
        return found


def _choice(request: dict[str, Any], key: str, default: str) -> str:
    """Return an option that clients show as a list: what was chosen, or the list itself with the choice in front."""
    value = request.get(key)
    value = value[0] if isinstance(value, list) and value else value
    return str(value) if value else default


def _number(request: dict[str, Any], key: str, default: float) -> float:
    value = request.get(key)
    with contextlib.suppress(TypeError, ValueError):
        number = default if value in (None, "") else float(value)
        if math.isfinite(number):
            return number
    raise InputError(f"{key}: expected a number, found {value!r}")
