from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_rl_reg.errors import InputError
from monai_rl_reg.phantoms import make_case, make_cohort


def test_cohort_is_made_once_and_whole(tmp_path: Path) -> None:
    folder = make_cohort(tmp_path, count=3, size=16)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}
    assert len(written) == 6
    assert make_cohort(tmp_path, count=3, size=16) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")} == written


def test_cohort_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected room to write it"):
        make_cohort(tmp_path / "file" / "phantoms", count=1)


def test_cohort_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second = (make_cohort(tmp_path / name, count=2, size=16) / "imagesTr" for name in ("a", "b"))
    for path in first.iterdir():
        assert np.array_equal(nib.load(path).get_fdata(), nib.load(second / path.name).get_fdata())


def test_case_has_nested_labels_of_every_value() -> None:
    random = torch.Generator().manual_seed(1)
    for oblique in (False, True):
        image, label, affine = make_case(random, size=32, oblique=oblique)
        assert image.shape == label.shape
        assert torch.unique(label).tolist() == [0, 1, 2, 3, 4]
        spacing = affine[:3, :3].norm(dim=0)
        off_axis = (affine[:3, :3] - torch.diag(torch.diagonal(affine[:3, :3]))).abs().max()
        assert bool(off_axis > 0.01) == oblique
        assert torch.allclose(spacing, torch.ones(3, dtype=torch.float64)) != oblique
