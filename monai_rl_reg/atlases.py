"""Labelled cases as atlases of other images: what their labels are called, and which of them is most like an image."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_rl_reg.affine import align
from monai_rl_reg.errors import InputError
from monai_rl_reg.files import file_stamp, replacing
from monai_rl_reg.geometry import identity_grid, reduced, sample, transform_points
from monai_rl_reg.nifti import read_image, read_label

GENERATED = "label_"
"""What the labels of a map without names are called by, with their values behind it."""
POINTS = 24
"""Images are compared at this many points in every direction."""


@dataclass(frozen=True)
class Case:
    """An image and, where it has one, its label map.

    Attributes:
        name: what people call it.
        image: path.
        label: path.
        values: value of each named label in this label map, where it is known; else the names' own values hold.
    """

    name: str
    image: str
    label: str | None = None
    values: Mapping[str, int] | None = None

    def read_label(self, image: MetaTensor, names: Mapping[str, int]) -> MetaTensor:
        """Return the label map (1, *spatial) with the values that ``names`` gives to the labels; others become 0.

        Raises:
            InputError: if it cannot be read, or is not on the image's grid.
        """
        return self.renumbered(read_label(self.label, image, self.image, spatial_dims=image.ndim - 1), names)

    def renumbered(self, label: MetaTensor, names: Mapping[str, int]) -> MetaTensor:
        """Return a label map (1, *spatial) of this case's values with those that ``names`` gives; others become 0."""
        renumbered = torch.zeros_like(label.as_tensor())
        for name, value in names.items():
            own = value if self.values is None else self.values.get(name)
            if own is not None:
                renumbered[label.as_tensor() == own] = value
        return MetaTensor(renumbered, affine=label.affine, meta=label.meta)


def _generated(name: str) -> int | None:
    """Return N of a name ``label_N``, else None."""
    number = name.removeprefix(GENERATED)
    return int(number) if name.startswith(GENERATED) and number.isdecimal() else None


def label_names(cases: Sequence[Case], given: str | None = None) -> dict[str, int]:
    """Return the labels' names and values, in ascending order.

    Args:
        cases: gives the names that came with the label maps. Where none has names, or some have ``label_1`` or the
            like, the values in the maps without are called so: ``label_N`` is the value N, however a client that saved
            it under this name numbered it.
        given: overrules that: a JSON object of names and values, or names separated by commas, for 1, 2, ...

    Raises:
        InputError: if ``given`` is neither, or two names share a value.
    """
    names: dict[str, int] = {}
    if given:
        try:
            loaded = json.loads(given) if given.lstrip().startswith("{") else None
            listed = [name.strip() for name in given.split(",")]
            if loaded is None and len(set(listed)) < len(listed):
                raise InputError(f"labels {given}: expected each name once, found one twice")
            items = loaded.items() if loaded is not None else ((name, i) for i, name in enumerate(listed, start=1))
            names = {str(name): int(value) for name, value in items}
        except (ValueError, TypeError) as error:
            raise InputError(f"labels {given}: expected names and whole numbers in JSON, found {error}") from error
    else:
        came = {name: value for case in reversed(cases) for name, value in (case.values or {}).items()}
        numbers = {number for name in came if (number := _generated(name)) is not None}
        if numbers or not came:
            numbers = numbers.union(*(_values(case) for case in cases if case.values is None))
        names = {f"{GENERATED}{number}": number for number in sorted(numbers)}
        for case in cases:
            for name in case.values or {}:
                taken = {v for n, v in names.items() if n != name}
                names.setdefault(name, came[name] if came[name] not in taken else max(taken) + 1)
    if len(set(names.values())) < len(names) or "" in names or min(names.values(), default=1) < 1:
        raise InputError(f"labels: expected each name with a whole number of its own from 1 up, found {names}")
    return dict(sorted(names.items(), key=lambda item: item[1]))


def has_any(case: Case, names: Mapping[str, int]) -> bool:
    """Return whether a label map has a voxel of any of these labels."""
    wanted = {value if case.values is None else case.values.get(name) for name, value in names.items()}
    return not wanted.isdisjoint(_values(case))


_known_values: dict[str, tuple[dict[str, Any], frozenset[int]]] = {}


def _values(case: Case) -> frozenset[int]:
    """Return the values in a label map; none where it has none, or cannot be read. Read once for every version."""
    if case.label is None or not Path(case.label).is_file():
        return frozenset()
    stamp = file_stamp(case.label)
    if _known_values.get(case.label, ({}, None))[0] != stamp:
        try:
            label = read_label(case.label, read_image(case.image, spatial_dims=None), case.image, spatial_dims=None)
            found = frozenset(int(v) for v in torch.unique(label.as_tensor()) if v > 0)
        except InputError:
            found = frozenset()
        _known_values[case.label] = (stamp, found)
    return _known_values[case.label][1]


class CommonSpace:
    """Affine transforms from one image's space, the reference, to all others': one for each image, not for each pair.

    Of two images whose transforms are known the one between them is a product, and comparing them takes no more than
    sampling both at the same points of the reference.

    Args:
        file: where the transforms are kept, so that they are found once for every version of an image.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.turn = threading.RLock()  # for whoever uses the space from several threads
        self.reference: str | None = None
        self._transforms: dict[str, dict[str, Any]] = {}
        self._samples: dict[str, tuple[dict[str, Any], Tensor]] = {}
        if self.file.is_file():
            known = json.loads(self.file.read_text(encoding="utf-8"))
            self.reference, self._transforms = known["reference"], known["transforms"]

    def between(self, fixed: str, moving: str) -> Tensor:
        """Return the affine (4, 4) from the fixed image's space to the moving one's, RAS millimetres."""
        to_fixed, to_moving = self._transform(fixed), self._transform(moving)
        return to_moving @ torch.linalg.inv(to_fixed)

    def correlation(self, a: str, b: str) -> float:
        """Return the normalised cross-correlation of two images after the affine step, -1 to 1."""
        return float(self._sampled(a) @ self._sampled(b))

    def _transform(self, path: str) -> Tensor:
        if self.reference is None or not self._current(self.reference):
            self.reference = path
            self._transforms = {path: {"stamp": file_stamp(path), "matrix": torch.eye(4).tolist()}}
            self._samples = {}
        if not self._current(path):
            image = read_image(path, spatial_dims=None)
            fixed = read_image(self.reference, spatial_dims=image.ndim - 1)
            self._transforms[path] = {"stamp": file_stamp(path), "matrix": align(fixed, image).transform.tolist()}
            self._save()
        return torch.tensor(self._transforms[path]["matrix"], dtype=torch.float64)

    def _current(self, path: str) -> bool:
        return Path(path).exists() and self._transforms.get(path, {}).get("stamp") == file_stamp(path)

    def _save(self) -> None:
        self._transforms = {path: known for path, known in self._transforms.items() if Path(path).exists()}
        self._samples = {path: known for path, known in self._samples.items() if path in self._transforms}
        text = json.dumps({"reference": self.reference, "transforms": self._transforms})
        with replacing(self.file) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _sampled(self, path: str) -> Tensor:
        """Return an image's intensities at the points of the reference, with mean 0 and norm 1."""
        to_image = self._transform(path)
        if self._samples.get(path, ({}, None))[0] != file_stamp(path):
            image = read_image(path, spatial_dims=None)
            reference = image if path == self.reference else read_image(self.reference, spatial_dims=image.ndim - 1)
            d = image.ndim - 1
            step = (torch.tensor(reference.shape[1:], dtype=torch.float64) - 1) / (POINTS - 1)
            index = identity_grid([POINTS] * d) * step.reshape(-1, *[1] * d)
            world = transform_points(reduced(to_image @ reference.affine.double(), d), index)
            voxel = transform_points(reduced(torch.linalg.inv(image.affine.double()), d), world)
            values = sample(image.as_tensor(), voxel.float()).flatten()
            values = values.clamp(*torch.quantile(values, torch.tensor([0.005, 0.995])))
            values = values - values.mean()
            self._samples[path] = (file_stamp(path), values / values.norm().clamp(min=1e-6))
        return self._samples[path][1]
