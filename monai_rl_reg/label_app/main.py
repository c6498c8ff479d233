"""What MONAI Label loads: the app with its tasks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.tasks.activelearning.random import Random

from monai_rl_reg import __version__
from monai_rl_reg.label_app.tasks import (
    DisagreementScoring,
    DisagreementStrategy,
    DraftDice,
    LabelPropagationTask,
    RegistrationTask,
    TrainingTask,
)
from monai_rl_reg.label_app.workspace import FINAL, Workspace, http_errors
from monai_rl_reg.nifti import read_image

logger = logging.getLogger(__name__)


class RegistrationApp(MONAILabelApp):  # type: ignore[misc]
    """Labels of annotated cases, propagated to all others by registration.

    Args:
        app_dir: this folder.
        studies: folder of images, or a DICOMweb address.
        conf: ``labels``, ``output``, ``bundle``, ``ckpt`` and ``device``; see ``docs/monai_label.md``.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        super().__init__(
            app_dir,
            studies,
            conf,
            name="monai_rl_reg",
            description="Propagates the labels of annotated cases to all others by stepwise deformable registration",
            version=__version__,
        )

    def init_datastore(self) -> Any:
        """Return MONAI Label's datastore, which refuses images and labels that cannot be used."""
        store = super().init_datastore()
        self.workspace = Workspace(store, self.conf)
        store.add_image = _checked(store.add_image, self._check_image)
        store.save_label = _checked(store.save_label, self._check_label)
        return store

    def init_infers(self) -> dict[str, Any]:
        """Return the tasks that clients list as models, and `registration` for scripts."""
        return {
            "label_propagation": LabelPropagationTask(self.workspace),
            "registration": RegistrationTask(self.workspace),
        }

    def init_trainers(self) -> dict[str, Any]:
        """Return the training."""
        return {"rl_reg": TrainingTask(self.workspace)}

    def init_strategies(self) -> dict[str, Any]:
        """Return the ways to choose the next image to label."""
        return {"registration_disagreement": DisagreementStrategy(self.workspace), "random": Random()}

    def init_scoring_methods(self) -> dict[str, Any]:
        """Return the figures that are noted with the images."""
        return {
            "registration_disagreement": DisagreementScoring(self.workspace),
            "dice": DraftDice(self.workspace),
        }

    def init_batch_infer(self) -> Any:
        """Return MONAI Label's batch inference, which goes on after an image that cannot be used."""
        return BatchPropagation()

    def infer(self, request: dict[str, Any], datastore: Any = None) -> Any:
        """Run an infer task; what the request gets wrong becomes an HTTP error of one sentence."""
        request = {key: value for key, value in request.items() if key != "image_id"}  # clients name no folders
        model, image = request.get("model"), request.get("image")
        if model not in self._infers:
            raise HTTPException(404, f"model {model}: expected one of {', '.join(self._infers)}")
        if isinstance(image, str) and not os.path.exists(image):
            if image not in self.datastore().list_images():
                raise HTTPException(404, f"image {image}: expected the id of an image in the datastore, found none")
            request = request | {"image_id": image}
        with http_errors():
            return super().infer(request, datastore)

    def next_sample(self, request: dict[str, Any]) -> Any:
        """Choose the next image to label, with the same errors."""
        with http_errors():
            return super().next_sample(request)

    def bundle_path(self, model: str | None) -> None:
        """Refuse training that cannot start: MONAI Label asks this before it starts a process for it."""
        if model in self._trainers:
            with http_errors():
                self._trainers[model].check()

    def _check_image(self, image_id: str, file: str, *_: Any) -> None:
        read_image(file, spatial_dims=None, what=f"image {image_id},")

    def _check_label(self, image_id: str, file: str, tag: str, *_: Any) -> None:
        if image_id not in self.datastore().list_images():
            raise HTTPException(404, f"image {image_id}: expected the id of an image in the datastore, found none")
        if tag == FINAL:  # a draft may be empty
            self.workspace.check_label(image_id, file)


class BatchPropagation(BatchInferTask):  # type: ignore[misc]
    """Infers all images; one that cannot be used is logged and left out."""

    def __call__(self, request: dict[str, Any], datastore: Any, infer: Callable[..., Any]) -> dict[str, Any]:
        """Return the answer for each image, empty for those left out."""

        def guarded(one: dict[str, Any], store: Any) -> Any:
            try:
                return infer(one, store)
            except HTTPException as error:
                logger.warning("%s: %s", one.get("image"), error.detail)
                return {}

        return dict(super().__call__(request, datastore, guarded))


def _checked(save: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """Return a method of the datastore that checks first: what is refused leaves the datastore as it was."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        with http_errors():
            check(*args, **kwargs)
        return save(*args, **kwargs)

    return checked
