"""Between MONAI Label's datastore and this package: its cases, label names and weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from monai_rl_reg.atlases import Case, CommonSpace, label_names
from monai_rl_reg.errors import InputError, bare_input_errors
from monai_rl_reg.label_propagation import LabelPropagation
from monai_rl_reg.label_training import LATEST, Weights
from monai_rl_reg.nifti import read_image, read_label
from monai_rl_reg.policy_bundle import CONFIG
from monai_rl_reg.registration import Registrar

logger = logging.getLogger(__name__)

FINAL = DefaultLabelTag.FINAL.value
DOUBT = "registration_disagreement"
ATLASES = 3
"""Atlases whose disagreement is asked for."""


class Workspace:
    """What all tasks of the app share.

    Args:
        store: MONAI Label's datastore.
        conf: of the server: ``labels``, names of the labels; ``output``, folder for results and weights, by default
            beside the studies, with ``_rl_reg`` behind their name; ``bundle``, ``device``, and ``ckpt``, weights that
            take the place of the bundle's own.

    Raises:
        InputError: if a file or folder of these is not there.
    """

    def __init__(self, store: Datastore, conf: dict[str, str]) -> None:
        self.store = store
        self.conf = conf
        own = getattr(store, "_datastore_path", None)  # of local folders, and of the cache of DICOMweb studies
        if not conf.get("output") and own is None:
            raise InputError("expected --conf output FOLDER: these studies have no folder of their own")
        beside = Path(f"{str(own).rstrip('/')}_rl_reg")  # folders that come and go inside stop the datastore's watcher
        self.folder = Path(conf.get("output") or beside)
        self.weights = Weights(self.folder / "weights", conf.get("ckpt"))
        self.space = CommonSpace(self.folder / "affines.json")
        self._propagations: dict[str, LabelPropagation] = {}
        if self.weights.shipped is not None and not self.weights.shipped.is_file():
            raise InputError(f"--conf ckpt {self.weights.shipped}: expected a file, found none")
        if (bundle := conf.get("bundle")) and not (Path(bundle) / CONFIG).is_file():
            raise InputError(f"--conf bundle {bundle}: expected a folder with {CONFIG} in it, found none")

    def case(self, name: str) -> Case:
        """Return an image, with its final label and the label's names where there is one.

        From a DICOMweb store this downloads the image, so it is asked only for those that are needed.

        Raises:
            InputError: if there is none of this id.
        """
        if name not in self.store.list_images():
            raise InputError(f"image {name}: expected the id of an image in the datastore, found none")
        label, values = self.store.get_label_uri(name, FINAL) or None, None
        if label is not None:
            named = self.store.get_label_info(name, FINAL).get("label_info") or []
            values = {str(entry["name"]): int(entry["idx"]) for entry in named if {"name", "idx"} <= entry.keys()}
        return Case(name, self.store.get_image_uri(name), label, values or None)

    def labelled(self) -> list[Case]:
        """Return the cases that have a final label."""
        return [self.case(name) for name in sorted(self.store.get_labeled_images())]

    def unlabelled(self) -> list[str]:
        """Return the ids of the images that have none."""
        return sorted(self.store.get_unlabeled_images())

    def names(self) -> dict[str, int]:
        """Return label names and values: those of ``--conf labels``, else those of the saved labels."""
        return label_names(self.labelled(), self.conf.get("labels"))

    def propagation(self, weights: str = LATEST) -> LabelPropagation:
        """Return the propagation with these weights.

        Raises:
            InputError: if there are none of this name.
        """
        path = self.weights.path(weights)
        version = "" if path is None else f"{path} {path.stat().st_mtime_ns}"  # training writes anew
        with self.space.turn:
            if version not in self._propagations:
                self._propagations = {key: made for key, made in self._propagations.items() if not key}
                registrar = Registrar(bundle=self.conf.get("bundle"), ckpt=path, device=self.conf.get("device"))
                self._propagations[version] = LabelPropagation(registrar, self.space)
            return self._propagations[version]

    def results(self, request: dict[str, Any], *further: str) -> Path:
        """Return the folder for what a task finds for the image of a request."""
        return self.folder.joinpath("results", request["model"], request.get("image_id", "uploaded"), *further)

    def doubts(self, images: Sequence[str], *, seconds: float = math.inf) -> dict[str, float]:
        """Return how unsure the labels of images are, see :meth:`LabelPropagation.doubt`, and note it in the datastore.

        What was noted before holds as long as the atlases, their labels and the weights are the same. Images that
        cannot be used, and those that time does not suffice for, are left out.

        Args:
            images: ids.
            seconds: to spend at most.
        """
        started, propagation, names = time.monotonic(), self.propagation(), self.names()
        labelled = self.labelled()
        weights = self.weights.path()
        found: dict[str, float] = {}
        for image in images if labelled else ():
            late = time.monotonic() - started > seconds
            known = self.store.get_image_info(image).get(DOUBT, {})
            if late and not known:
                continue
            try:
                path = self.case(image).image
                chosen = propagation.choose(path, labelled, ATLASES, names)
                files = [str(weights), *(str(case.label) for case, _ in chosen)]
                key = [[file, Path(file).stat().st_mtime if Path(file).exists() else 0] for file in files]
                if known.get("of") != key:
                    if late:
                        continue
                    value = propagation.doubt(path, [case for case, _ in chosen], names, count=ATLASES)
                    known = {"value": round(value, 4), "of": key}
                    self.note(DOUBT, {image: known})  # at once: a server that is stopped keeps what it has found
                found[image] = float(known["value"])
            except InputError as error:
                logger.warning("%s of %s: %s", DOUBT, image, error)
        return found

    def note(self, key: str, values: Mapping[str, Any]) -> None:
        """Write values into the datastore's information on images."""
        if values:
            self.store.refresh()  # what another process has written meanwhile stays
        for image, value in values.items():
            self.store.update_image_info(image, {key: value})

    def check_label(self, image_id: str, file: str) -> None:
        """Refuse a label map that is not one of this image.

        Raises:
            InputError: saying why.
        """
        path = self.store.get_image_uri(image_id)
        read_label(file, read_image(path, spatial_dims=None), path, spatial_dims=None)


@contextmanager
def http_errors() -> Iterator[None]:
    """Turn an :class:`InputError` into an HTTP error, status 400, with its sentence."""
    try:
        with bare_input_errors():
            yield
    except InputError as error:
        raise HTTPException(400, str(error)) from error
