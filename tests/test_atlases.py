from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_rl_reg.atlases import Case, CommonSpace, label_names
from monai_rl_reg.data import read_cases
from monai_rl_reg.errors import InputError
from monai_rl_reg.nifti import read_image


def cases_of(cohort: Path, labelled: int = 6) -> list[Case]:
    """The cohort as cases, of which the first few have their label."""
    rows = read_cases(cohort)
    return [
        Case(Path(row["image"]).name.split(".")[0], row["image"], row["label"] if i < labelled else None)
        for i, row in enumerate(rows)
    ]


def test_names_given_come_first_in_either_form(cohort: Path) -> None:
    cases = [Case("a", "a.nii", "a_label.nii", {"tail": 2, "head": 1})]
    assert label_names(cases, "left, right") == {"left": 1, "right": 2}
    assert list(label_names(cases, '{"core": 3, "edge": 1}').items()) == [("edge", 1), ("core", 3)]


def test_names_come_from_the_labels_else_from_their_values(cohort: Path) -> None:
    first = Case("a", "a.nii", "a_label.nii", {"tail": 2, "head": 1})
    other = Case("b", "b.nii", "b_label.nii", {"head": 1, "body": 2})  # of a client that numbers what it has
    assert label_names([first, other]) == {"head": 1, "tail": 2, "body": 3}
    assert label_names(cases_of(cohort, labelled=1)) == {f"label_{i}": i for i in range(1, 5)}
    assert label_names(cases_of(cohort, labelled=0)) == {}


def test_names_made_from_values_mean_these_values_however_a_client_numbers_them(cohort: Path) -> None:
    copied, saved = cases_of(cohort)[:2]
    saved = Case(saved.name, saved.image, saved.label, {"label_2": 1, "label_1": 2, "cyst": 3})
    names = label_names([copied, saved])
    assert names == {"label_1": 1, "label_2": 2, "label_3": 3, "label_4": 4, "cyst": 5}
    image = read_image(saved.image)
    own, read = (
        Case("own", saved.image, saved.label).read_label(image, {"a": 1, "b": 2}),
        saved.read_label(image, names),
    )
    assert torch.equal(read.as_tensor() == 2, own.as_tensor() == 1)
    assert torch.equal(read.as_tensor() == 1, own.as_tensor() == 2)
    assert set(label_names([saved])) == {"label_1", "label_2", "cyst"}


@pytest.mark.parametrize("given", ["{", '{"a": "x"}', '{"a": 1, "b": 1}', '{"a": 0}', "a,,b", "a,a"])
def test_names_that_cannot_be_are_refused(given: str) -> None:
    with pytest.raises(InputError, match="labels"):
        label_names([], given)


def test_a_label_map_is_read_by_names(cohort: Path) -> None:
    case = cases_of(cohort)[0]
    image = read_image(case.image)
    plain = case.read_label(image, {"a": 1, "b": 3}).as_tensor()
    assert torch.unique(plain).tolist() == [0, 1, 3]
    swapped = Case(case.name, case.image, case.label, {"b": 1, "a": 3})
    named = swapped.read_label(image, {"a": 1, "b": 3, "c": 2}).as_tensor()
    assert torch.equal(named == 1, plain == 3)
    assert torch.equal(named == 3, plain == 1)


def moved_copy(source: str, path: Path, shift: float) -> str:
    """The same image, in a world shifted by so many millimetres."""
    image = nib.load(source)
    affine = image.affine.copy()
    affine[:3, 3] += shift
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
    return str(path)


def test_transforms_lead_from_one_image_to_another(cohort: Path, tmp_path: Path) -> None:
    source = cases_of(cohort)[0].image
    a, b = (moved_copy(source, tmp_path / f"{i}.nii.gz", shift) for i, shift in enumerate((20.0, -30.0)))
    space = CommonSpace(tmp_path / "affines.json")
    space.between(source, a)  # the reference
    found = space.between(a, b)
    expected = torch.eye(4, dtype=torch.float64)
    expected[:3, 3] = -50
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2)
    assert space.correlation(a, b) > 0.99


def test_the_same_image_is_more_alike_than_others(cohort: Path, tmp_path: Path) -> None:
    cases = cases_of(cohort)
    space = CommonSpace(tmp_path / "affines.json")
    copy = moved_copy(cases[2].image, tmp_path / "copy.nii.gz", 15.0)
    found = {case.name: space.correlation(copy, case.image) for case in cases}
    assert max(found, key=lambda name: found[name]) == cases[2].name


def test_transforms_are_kept_and_found_anew_for_a_new_version(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cases_of(cohort)[0].image
    image = moved_copy(source, tmp_path / "image.nii.gz", 20.0)
    first = CommonSpace(tmp_path / "affines.json").between(source, image)
    assert set(json.loads((tmp_path / "affines.json").read_text())["transforms"]) == {source, image}
    with monkeypatch.context() as patch:
        patch.setattr("monai_rl_reg.atlases.align", None)  # is not called
        torch.testing.assert_close(CommonSpace(tmp_path / "affines.json").between(source, image), first)
    moved_copy(source, tmp_path / "image.nii.gz", -20.0)
    again = CommonSpace(tmp_path / "affines.json").between(source, image)
    assert float(again[0, 3] - first[0, 3]) == pytest.approx(-40, abs=0.2)
