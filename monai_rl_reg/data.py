"""Where pairs of images come from: a CSV of pairs, or a folder of cases in the Decathlon's layout."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_rl_reg.errors import InputError
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
        raise InputError(f"dataset {folder}: expected the validation cases {listed(lacking)} in imagesTr, found none")
    return held_out


def _rows_among(rows: list[Pair], names: Sequence[str], file: str) -> tuple[list[Pair], set[str]]:
    """Return the rows whose images are both among the named ones, and all of the named ones' files."""
    wanted = {_stem(name) for name in _several(names)}
    files = {_identity(row[role]) for row in rows for role in ("fixed", "moving") if _stem(row[role]) in wanted}
    lacking = wanted - {_stem(path) for path in files}
    among = [row for row in rows if {_stem(row["fixed"]), _stem(row["moving"])} <= wanted]
    if lacking or not among:
        found = f"no row of {listed(lacking)}" if lacking else "no row with two of them"
        raise InputError(f"pairs {file}: expected rows of the validation cases {listed(wanted)}, found {found}")
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


def listed(values: set[Any]) -> str:
    """Return the first of some values in their order, for a message."""
    ordered = sorted(values)
    return ", ".join(str(v) for v in ordered[:8]) + (", ..." if len(ordered) > 8 else "")
