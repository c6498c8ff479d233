"""What is read out of a NIfTI header, and where another program reads something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage

from monai_rl_reg.errors import InputError
from monai_rl_reg.itk_bridge import from_itk
from monai_rl_reg.nifti import place_warnings, read_image, read_label, read_volume
from monai_rl_reg.registration import register

SIZE = (12, 14, 13)


def write(path: Path, *, sform: int = 1, qform: int = 1, shift: float = 0.0, unit: str = "mm") -> Path:
    """Write an image whose sform lies ``shift`` beside its qform, with these codes."""
    data = np.random.default_rng(0).random(SIZE, dtype=np.float32)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (-10, 5, 7)
    file = nib.Nifti1Image(data, affine)
    file.set_qform(affine, code=qform)
    affine[0, 3] += shift
    file.set_sform(affine, code=sform)
    file.header.set_xyzt_units(unit)
    nib.save(file, path)
    return path


@pytest.mark.parametrize(
    ("codes", "shift", "apart"),
    [
        ((1, 1), 0.0, None),
        ((2, 1), 0.0, None),
        ((0, 1), 4.0, None),
        ((2, 0), 0.0, None),
        ((2, 1), 4.0, "4"),
        ((4, 2), 4.0, "4"),
    ],
)
def test_a_header_with_two_places_is_told(
    codes: tuple[int, int], shift: float, apart: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "image.nii.gz", sform=codes[0], qform=codes[1], shift=shift)
    image = read_image(path)
    theirs = from_itk(sitk.ReadImage(str(path)))[1]
    assert torch.allclose(theirs, image.affine, atol=1e-3) == (apart is None)
    warnings = place_warnings(image)
    assert len(warnings) == (apart is not None)
    assert all(f"{path} says in two ways" in text and f"{apart} mm" in text for text in warnings)


def test_the_result_comes_with_the_warning(tmp_path: Path) -> None:
    fixed, moving = write(tmp_path / "fixed.nii.gz"), write(tmp_path / "moving.nii", sform=2, shift=5)
    quality = register(fixed, moving, steps=0, initial="none", device="cpu").quality
    assert [text for text in quality["warnings"] if f"the header of {moving} says in two ways" in text]
    assert not [text for text in quality["warnings"] if str(fixed) in text]


@pytest.mark.parametrize(("unit", "length"), [("mm", 2.0), ("micron", 0.002), ("meter", 2000.0), ("unknown", 2.0)])
def test_lengths_are_millimetres_as_itk_reads_them(unit: str, length: float, tmp_path: Path) -> None:
    path = write(tmp_path / "image.nii", unit=unit)
    image = read_volume(path)
    assert float(image.affine[0, 0]) == pytest.approx(length)
    torch.testing.assert_close(image.affine, from_itk(sitk.ReadImage(str(path)))[1], rtol=1e-4, atol=1e-6)
    assert place_warnings(image) == []
    file: Any = nib.load(path)
    for given in (file, LoadImage(image_only=True)(path)):
        torch.testing.assert_close(read_volume(given).affine, image.affine)


def test_a_slice_is_where_it_is_whatever_its_height(tmp_path: Path) -> None:
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = (-10, 5, 7)
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((30, 40), dtype=np.float32), affine), tmp_path / "a.nii")
    assert place_warnings(read_image(tmp_path / "a.nii", spatial_dims=2)) == []


def test_small_voxels_are_no_singular_affine() -> None:
    affine = np.diag([5e-4, 5e-4, 5e-4, 1.0])
    data = np.random.default_rng(0).random(SIZE, dtype=np.float32)
    assert read_volume(nib.Nifti1Image(data, affine)).shape == (1, *SIZE)
    affine[1] = affine[0]
    with pytest.raises(InputError, match="expected an invertible affine"):
        read_volume(MetaTensor(torch.from_numpy(data), affine=torch.from_numpy(affine)))


def test_a_label_without_a_unit_has_its_image_s(tmp_path: Path) -> None:
    path = write(tmp_path / "image.nii", unit="micron")
    file: Any = nib.load(path)
    nib.save(nib.Nifti1Image(np.ones(SIZE, dtype=np.uint8), file.affine), tmp_path / "label.nii")
    image = read_image(path)
    torch.testing.assert_close(read_label(tmp_path / "label.nii", image, path).affine, image.affine)


def test_labels_that_would_run_together_are_refused(tmp_path: Path) -> None:
    image = read_image(write(tmp_path / "image.nii"))
    data = np.zeros(SIZE, dtype=np.uint32)
    data[3], data[6] = 614454277, 614454278
    path = tmp_path / "label.nii"
    nib.save(nib.Nifti1Image(data, image.affine.numpy()), path)
    with pytest.raises(InputError, match=r"label\.nii: expected values up to 16,777,215, found one of 614,454,2"):
        read_label(path, image, "image")
