"""Where pairs of images come from: a CSV of pairs, or a folder of cases in the Decathlon's layout."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, MetaTensor
from torch.utils.data import Dataset

from monai_rl_reg.errors import InputError
from monai_rl_reg.metrics import UNLABELLED
from monai_rl_reg.phantoms import make_cohort

logger = logging.getLogger(__name__)

Case = dict[str, str]
"""One image: ``image`` and, where there is one, ``label``; both are paths."""
Pair = dict[str, str]
"""``fixed``, ``moving`` and, where there are labels, ``fixed_label``, ``moving_label``; all are paths."""

MOST_PAIRS = 20
"""Validation pairs that are made from cases, at most."""
SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a CSV of pairs: columns ``fixed,moving``, optionally ``fixed_label,moving_label``; paths relative to it.

    Raises:
        InputError: if the file is missing, lacks a column, has no rows, or a row leaves a path empty.
    """
    path = Path(path)
    columns, rows = read_table(path)
    missing = [name for name in ("fixed", "moving") if name not in columns]
    if missing:
        raise InputError(f"pairs {path}: expected the columns fixed and moving, found {', '.join(columns) or 'none'}")
    if not rows:
        raise InputError(f"pairs {path}: expected at least one row below the column names, found none")
    pairs = []
    for line, row in rows:
        values = {key: row.get(key, "") for key in ("fixed", "moving", "fixed_label", "moving_label")}
        if not (values["fixed"] and values["moving"]):
            raise InputError(f"pairs {path}, line {line}: expected a fixed and a moving path, found {row}")
        pairs.append({key: str(path.parent / value) for key, value in values.items() if value})
    return pairs


def read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a CSV file of pairs: its columns, and each row with the line that it ends in; spaces at the ends go.

    Raises:
        InputError: if there is no such file, or it is no text.
    """
    if not path.is_file():
        raise InputError(f"pairs {path}: expected a CSV file, found none")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restkey="", restval="")
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [
                (reader.line_num, {key: value.strip() for key, value in row.items() if isinstance(value, str)})
                for row in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"pairs {path}: expected a CSV file of text, found: {error}") from error
    return columns, rows


def read_cases(folder: str | Path) -> list[Case]:
    """List the cases of a folder in the Decathlon's layout: ``imagesTr`` and, where a case has one, ``labelsTr``.

    Raises:
        InputError: if there is no ``imagesTr`` or fewer than two images in it.
    """
    folder = Path(folder)
    if not (folder / "imagesTr").is_dir():
        raise InputError(f"dataset {folder}: expected a folder with imagesTr (and labelsTr) in it, found none")
    images = sorted(p for p in (folder / "imagesTr").iterdir() if p.name.endswith(SUFFIXES) and p.name[0] != ".")
    if len(images) < 2:
        raise InputError(f"dataset {folder}: expected at least two images in imagesTr, found {len(images)}")
    cases = []
    for image in images:
        label = folder / "labelsTr" / image.name
        cases.append({"image": str(image)} | ({"label": str(label)} if label.exists() else {}))
    others = sorted(p.name for p in (folder / "labelsTr").glob("*") if p.name.endswith(SUFFIXES) and p.name[0] != ".")
    if others and not any("label" in case for case in cases):
        raise InputError(
            f"dataset {folder}: expected labels in labelsTr that are called as their images, found {others[0]} and "
            f"{images[0].name}"
        )
    return cases


def split_data(
    *,
    pairs: str | None = None,
    dataset_dir: str | None = None,
    val_pairs: str | None = None,
    val_cases: Sequence[str] | None = None,
    phantom_dir: str = "phantoms",
    spatial_dims: int = 3,
) -> dict[str, list[dict[str, str]]]:
    """Return the data of ``training`` (pairs or cases) and ``validation`` (pairs).

    The first of these that is given is used: ``pairs``, ``dataset_dir``, a synthetic cohort made in ``phantom_dir``.
    Validation takes ``val_pairs``; else pairs (of ``pairs``, its rows) among ``val_cases``; else pairs among the last
    fifth of the cases, of the labelled ones if more than two are (at least two), or the last tenth of the rows of
    ``pairs``. Cases of ``val_pairs`` or ``val_cases`` are left out of training; rows of ``pairs`` alone may share
    images with each other.

    Args:
        pairs: CSV of training pairs.
        dataset_dir: folder in the Decathlon's layout, from whose cases training pairs are drawn.
        val_pairs: CSV of validation pairs.
        val_cases: names of cases (file names, with or without suffix) to leave out for validation.
        phantom_dir: where the synthetic cohort is kept.
        spatial_dims: 2 or 3, for the synthetic cohort.

    Raises:
        InputError: if nothing is left to train on, a name in ``val_cases`` is not there, or a file is bad.
    """
    validation = read_pairs(val_pairs) if val_pairs else None
    processes = int(os.environ.get("WORLD_SIZE", 1))  # of torchrun, each of which validates a pair at least
    if validation is not None and len(validation) < processes:
        raise InputError(
            f"pairs {val_pairs}: expected a validation pair for each of {processes} processes, found {len(validation)}"
        )
    if pairs:
        rows = read_pairs(pairs)
        kept_back: set[str] = set()
        if validation is not None:
            kept_back = {_identity(pair[key]) for pair in validation for key in ("fixed", "moving")}
        elif val_cases is not None:
            validation, kept_back = _rows_among(rows, val_cases, pairs)
        else:  # rows that may share images with the others
            count = max(processes, len(rows) // 10)
            validation, rows = (rows[-count:], rows[:-count]) if len(rows) > 1 else (rows, rows)
        training = [p for p in rows if not {_identity(p["fixed"]), _identity(p["moving"])} & kept_back]
        if not training:
            raise InputError(f"pairs {pairs}: expected pairs of cases that validation does not use, found none")
        return {"training": training, "validation": validation}
    if not dataset_dir:
        dataset_dir = str(make_cohort(phantom_dir, spatial_dims=spatial_dims))
    cases = read_cases(dataset_dir)
    if validation is None:
        held_out = _held_out(cases, val_cases, dataset_dir)
        validation = _pairs_among(held_out, MOST_PAIRS)
    kept_back = {_identity(pair[key]) for pair in validation for key in ("fixed", "moving")}
    kept = [case for case in cases if _identity(case["image"]) not in kept_back]
    if len(kept) < 2:
        raise InputError(
            f"dataset {dataset_dir}: expected at least two cases left for training, found {len(kept)} of {len(cases)}"
        )
    return {"training": kept, "validation": validation}


def tell_data(splits: Mapping[str, Sequence[Mapping[str, str]]] | None) -> None:
    """Print what is trained on and validated with; of several processes the first one does.

    Args:
        splits: of :func:`split_data`; None, as of a task that makes its data, says nothing.
    """
    if splits is None:
        return
    training, pairs = splits["training"], "fixed" in splits["training"][0]
    labelled = sum(("fixed_label" if pairs else "label") in row for row in training)
    what = f"{len(training)} {'pairs' if pairs else 'cases'}, {labelled} of them with labels"
    if os.environ.get("RANK", "0") == "0":
        print(f"Training on {what}; validating on {len(splits['validation'])} pairs")


def evaluation_pairs(*, pairs: str | None = None, val_pairs: str | None = None, **source: Any) -> list[Pair]:
    """Return the pairs to evaluate: those of a CSV, else the validation pairs of :func:`split_data`."""
    chosen = pairs or val_pairs
    return read_pairs(chosen) if chosen else split_data(**source)["validation"]


def one_pair(
    *,
    fixed: str | None = None,
    moving: str | None = None,
    fixed_label: str | None = None,
    moving_label: str | None = None,
    phantom_dir: str = "phantoms",
    spatial_dims: int = 3,
) -> list[Pair]:
    """Return the pair to register; two cases of the synthetic cohort where neither image is given.

    Raises:
        InputError: if only one of the images is given.
    """
    if not fixed and not moving:
        cases = read_cases(make_cohort(phantom_dir, spatial_dims=spatial_dims))
        print(f"No pair given: registering {cases[1]['image']} to {cases[0]['image']}")
        fixed, moving = cases[0]["image"], cases[1]["image"]
        fixed_label, moving_label = cases[0]["label"], cases[1]["label"]
    if not fixed or not moving:
        raise InputError(f"registration: expected a fixed and a moving image, found fixed={fixed}, moving={moving}")
    files = {"fixed": fixed, "moving": moving, "fixed_label": fixed_label, "moving_label": moving_label}
    return [{role: str(path) for role, path in files.items() if path}]


class PairDataset(Dataset[Any]):
    """Pairs of cases, each case loaded and preprocessed once.

    ``data`` is a list of pairs, or a list of cases, of which every ordered pair is an item (with a shuffling loader
    and a limited epoch length, pairs are thus drawn at random). Label values become 0, 1, 2, ... in the order of
    ``labels``.

    Args:
        data: pairs (``fixed``, ``moving``, ...) or cases (``image`` and, if there is one, ``label``).
        case_transform: applied once to each case, before it is cached.
        transform: applied to each pair: a dictionary with ``fixed``, ``moving`` and, where both cases have one,
            ``fixed_label`` and ``moving_label``.
        augment: applied to each case, a dictionary with ``image`` and, where there is one, ``label``, every time it
            becomes part of a pair. It changes the anatomy, not where the image lies: the affine stays.
        labels: label values to use, or the only one; others become background. By default every value found.
        allow_unlabelled: where only some cases have a label, give the others a map of
            :data:`~monai_rl_reg.metrics.UNLABELLED`; False leaves all labels out then.
        image_size: one size for all pairs, so that they can be batched: a size, or ``auto`` for the smallest multiple
            of 16 that holds every case. It goes to the transform as ``spatial_size``. None keeps each pair's own.
        progress: show a progress bar while loading.

    Raises:
        InputError: if the two label files of a pair disagree on the values they hold (see :meth:`check_labels`), or
            no case has any of ``labels``.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, str]],
        case_transform: Callable[[Any], Any],
        transform: Callable[[Any], Any],
        *,
        augment: Callable[[Any], Any] | None = None,
        labels: Sequence[int] | int | None = None,
        allow_unlabelled: bool = False,
        image_size: str | Sequence[int] | None = None,
        progress: bool = True,
    ) -> None:
        self.pairs: list[tuple[int, int]] | None = None
        cases = [dict(row) for row in data]
        if "fixed" in cases[0]:
            cases, self.pairs = _cases_of(cases)
        self.transform = transform
        self.augment = augment
        self.cases = CacheDataset(cases, case_transform, num_workers=1, progress=progress and len(cases) > 8)
        count = sum("label" in case for case in cases)
        self.mixed = allow_unlabelled and 0 < count < len(cases)
        self.labelled = count == len(cases) or self.mixed
        if not self.labelled and count > 0 and len(cases) > 2:
            logger.warning("labels are not compared: %d of %d cases have one, expected all or none", count, len(cases))
        self.labels: list[int] = []
        if self.labelled:
            found = [set(self.cases[i].get("values", [])) for i in range(len(cases))]
            if labels is None:
                self.check_labels(found)
            there = sorted(set().union(*found))
            self.labels = there if labels is None else [labels] if isinstance(labels, int) else list(labels)
            if there and not set(self.labels) & set(there):  # some that no case has are no mistake: they may come
                raise InputError(f"labels: expected one of {_listed(set(there))}, found {_listed(set(self.labels))}")

        self.image_size = image_size
        if image_size == "auto":
            shapes = [self.cases[i]["image"].shape[1:] for i in range(len(cases))]
            self.image_size = [16 * math.ceil(max(sizes) / 16) for sizes in zip(*shapes, strict=True)]

    def __len__(self) -> int:
        return len(self.pairs) if self.pairs is not None else len(self.cases) * (len(self.cases) - 1)

    def __getitem__(self, index: int) -> Any:
        if self.pairs is not None:
            i, j = self.pairs[index]
        else:
            i, j = divmod(index, len(self.cases) - 1)
            j += j >= i
        item: dict[str, Any] = {} if self.image_size is None else {"spatial_size": self.image_size}
        for role, case in (("fixed", self.cases[i]), ("moving", self.cases[j])):
            if self.augment is not None:
                case = self._augmented(case)
            item[role] = case["image"]
            item[f"{role}_file"] = case["file"]
            if "label" in case and not self.mixed:  # the items of a batch have the same keys
                item[f"{role}_label_file"] = case["file_of_label"]
            if self.labelled:
                known = "label" in case
                item[f"{role}_label"] = (
                    self._indexed(case["label"]) if known else torch.full_like(case["image"], UNLABELLED)
                )
        return self.transform(item)

    def _augmented(self, case: dict[str, Any]) -> dict[str, Any]:
        assert self.augment is not None
        given = {key: case[key] for key in ("image", "label") if key in case}
        made = self.augment(dict(given))
        return case | {key: MetaTensor(made[key].as_tensor(), affine=given[key].affine) for key in given}

    @property
    def voxel_size(self) -> list[float]:
        """The voxel size in mm in each direction, the median over the cases."""
        images = [self.cases[i]["image"] for i in range(len(self.cases))]
        sizes = torch.stack([image.affine[:3, : image.ndim - 1].norm(dim=0) for image in images])
        found: list[float] = sizes.median(dim=0).values.tolist()
        return found

    @property
    def num_classes(self) -> int:
        """Number of label values with the background."""
        return len(self.labels) + 1

    @property
    def structures(self) -> int:
        """Number of label values, for a training with labels.

        Raises:
            InputError: if not every case has a label.
        """
        if not self.labels:
            bare = {Path(case["image"]).name for case in self.cases.data if "label" not in case}
            raise InputError(
                f"training with labels: expected a label for each of the {len(self.cases)} validation cases, found "
                f"none for {_listed(bare)} (name others with val_cases or val_pairs)"
            )
        return len(self.labels)

    def check_labels(self, found: list[set[int]]) -> None:
        """Refuse pairs whose labels do not match: a value that only one image has cannot be compared.

        Up to one value in twenty may be missing from one of the two, as happens to small structures in fine
        parcellations; such a value scores a Dice of 0 where the fixed image has it.

        Raises:
            InputError: naming both files and the values.
        """
        if self.pairs is not None:
            checked = self.pairs
        else:  # drawn pairs: each case against the one with most labels
            fullest = max(range(len(found)), key=lambda i: len(found[i]))
            checked = [(fullest, i) for i in range(len(found))]
        for i, j in checked:
            if not (found[i] and found[j]):
                continue
            alone = found[i] ^ found[j]
            if len(alone) > 0.05 * len(found[i] | found[j]):
                raise InputError(
                    f"labels {self.cases.data[i]['label']} and {self.cases.data[j]['label']}: expected the same label "
                    f"values in both, found {_listed(alone)} in one only (name the values to use with labels)"
                )

    def _indexed(self, label: Any) -> Any:
        values = torch.tensor(self.labels, dtype=torch.float32)
        order = values.argsort()
        position = torch.searchsorted(values[order], label.as_tensor().contiguous()).clamp(max=len(values) - 1)
        known = values[order][position] == label.as_tensor()
        indexed = label.clone()
        indexed.as_tensor().copy_(torch.where(known, order[position] + 1, 0))
        return indexed


def _cases_of(pairs: list[Pair]) -> tuple[list[Case], list[tuple[int, int]]]:
    cases: dict[tuple[str, str | None], int] = {}
    index = []
    for pair in pairs:
        keys = [(pair[role], pair.get(f"{role}_label")) for role in ("fixed", "moving")]
        index.append((cases.setdefault(keys[0], len(cases)), cases.setdefault(keys[1], len(cases))))
    return [{"image": image} | ({"label": label} if label else {}) for image, label in cases], index


def _identity(path: str) -> str:
    return str(Path(path).resolve())


def _stem(path: str) -> str:
    name = Path(path).name
    return next((name[: -len(s)] for s in SUFFIXES if name.endswith(s)), name)


def _several(names: Sequence[str] | str) -> Sequence[str]:
    """Return names that are given as a list, or as one word with commas, as command lines have them."""
    return names.replace(" ", "").split(",") if isinstance(names, str) else names


def _held_out(cases: list[Case], names: Sequence[str] | None, folder: str) -> list[Case]:
    if names is None:
        labelled = [case for case in cases if "label" in case]
        pool = labelled if len(labelled) > 2 else cases  # to be judged by, and some left to learn from
        return pool[-max(2, len(pool) // 5) :]
    wanted = {_stem(name) for name in _several(names)}
    held_out = [case for case in cases if _stem(case["image"]) in wanted]
    lacking = wanted - {_stem(case["image"]) for case in held_out}
    if len(held_out) == 1 and not lacking:
        raise InputError(f"dataset {folder}: expected at least two validation cases, to make pairs of, found one name")
    if lacking:
        raise InputError(f"dataset {folder}: expected the validation cases {_listed(lacking)} in imagesTr, found none")
    return held_out


def _rows_among(rows: list[Pair], names: Sequence[str], file: str) -> tuple[list[Pair], set[str]]:
    """Return the rows whose images are both among the named ones, and all of the named ones' files."""
    wanted = {_stem(name) for name in _several(names)}
    files = {_identity(row[role]) for row in rows for role in ("fixed", "moving") if _stem(row[role]) in wanted}
    lacking = wanted - {_stem(path) for path in files}
    among = [row for row in rows if {_stem(row["fixed"]), _stem(row["moving"])} <= wanted]
    if lacking or not among:
        found = f"no row of {_listed(lacking)}" if lacking else "no row with two of them"
        raise InputError(f"pairs {file}: expected rows of the validation cases {_listed(wanted)}, found {found}")
    return among, files


def _pairs_among(cases: list[Case], most: int) -> list[Pair]:
    every = [(a, b) for a in cases for b in cases if a is not b]
    step = max(1, len(every) / most)
    chosen = [every[int(i * step)] for i in range(min(most, len(every)))]
    pairs = []
    for fixed, moving in chosen:
        pair = {"fixed": fixed["image"], "moving": moving["image"]}
        if "label" in fixed and "label" in moving:
            pair |= {"fixed_label": fixed["label"], "moving_label": moving["label"]}
        pairs.append(pair)
    return pairs


def _listed(values: set[Any]) -> str:
    ordered = sorted(values)
    return ", ".join(str(v) for v in ordered[:8]) + (", ..." if len(ordered) > 8 else "")
