"""Pairs of cases as a dataset: each case loaded and preprocessed once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, MetaTensor
from torch.utils.data import Dataset

from monai_rl_reg.data import Case, Pair, listed
from monai_rl_reg.errors import InputError
from monai_rl_reg.metrics import UNLABELLED

logger = logging.getLogger(__name__)


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
                raise InputError(f"labels: expected one of {listed(set(there))}, found {listed(set(self.labels))}")

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
                f"none for {listed(bare)} (name others with val_cases or val_pairs)"
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
                    f"values in both, found {listed(alone)} in one only (name the values to use with labels)"
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
