"""Whatever form an image has, a registration reads the same one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.finishing import Correspondence
from monai_rl_reg.geometry import DenseTransform
from monai_rl_reg.nifti import read_image, read_volume
from monai_rl_reg.registration import Registration, register


def as_nibabel(path: str) -> Any:
    return nib.load(path)


def as_metatensor(path: str) -> Any:
    return MetaTensor(torch.from_numpy(nib.load(path).get_fdata()), affine=nib.load(path).affine)


def other_file(suffix: str) -> Callable[[str], Any]:
    def convert(path: str) -> str:
        new = path.replace(".nii.gz", suffix)
        sitk.WriteImage(sitk.ReadImage(path), new)
        return new

    return convert


def scaled(path: str) -> str:
    """The image as 16-bit integers with slope and intercept in the header."""
    image = nib.load(path)
    new = nib.Nifti1Image(image.get_fdata(), image.affine)
    new.header.set_data_dtype(np.int16)
    nib.save(new, path.replace(".nii.gz", "_scaled.nii.gz"))
    written = nib.load(path.replace(".nii.gz", "_scaled.nii.gz"))
    assert written.header["scl_slope"] not in (0, 1)
    return path.replace(".nii.gz", "_scaled.nii.gz")


def dicom(path: str) -> str:
    return str(
        write_series(sitk.ReadImage(path), Path(path.replace(".nii.gz", "_dicom")), "1.2.826.0.1.3680043.2.1125.1")
    )


def write_series(image: sitk.Image, folder: Path, uid: str, description: str = "T1") -> Path:
    """Write a DICOM series of 16-bit slices."""
    folder.mkdir(exist_ok=True)
    image = sitk.Cast(sitk.Round(image), sitk.sitkInt16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = image.GetDirection()
    orientation = "\\".join(f"{direction[i]:.12g}" for i in (0, 3, 6, 1, 4, 7))
    for k in range(image.GetDepth()):
        piece = image[:, :, k]
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        tags = {
            "0008|0060": "MR",
            "0008|103e": description,
            "0020|000d": "1.2.826.0.1.3680043.2.1125",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{k + 1}",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{x:.12g}" for x in position),
            "0020|0037": orientation,
            "0018|0050": f"{image.GetSpacing()[2]:.12g}",
        }
        for key, value in tags.items():
            piece.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}.{k:03d}.dcm"))
        writer.Execute(piece)
    return folder


@pytest.mark.parametrize(
    ("convert", "tolerance"),
    [
        (Path, 0.0),
        (as_nibabel, 0.0),
        (sitk.ReadImage, 1e-3),
        (lambda path: itk.imread(path, itk.F), 1e-3),
        (as_metatensor, 1e-3),
        (other_file(".nrrd"), 1e-3),
        (other_file(".mha"), 1e-3),
        (scaled, 0.02),
        (dicom, 1.0),
    ],
    ids=["path", "nibabel", "SimpleITK", "ITK", "MetaTensor", "nrrd", "mha", "scaled", "DICOM"],
)
def test_every_kind_of_input_is_the_same_image(
    convert: Callable[[str], Any], tolerance: float, oblique_files: dict[str, str]
) -> None:
    expected, found = read_volume(oblique_files["moving"]), read_volume(convert(oblique_files["moving"]))
    assert found.shape == expected.shape
    assert torch.allclose(found.affine, expected.affine, atol=1e-4)
    assert (found.as_tensor() - expected.as_tensor()).abs().max() <= tolerance


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".tif", ".nii.gz"])
def test_pictures_of_every_format_are_the_same_image(suffix: str, tmp_path: Path) -> None:
    values = np.arange(30, dtype=np.float32).reshape(5, 6)
    picture = sitk.GetImageFromArray(values)
    picture.SetSpacing((2.0, 0.5))
    picture.SetOrigin((3.0, -4.0))
    sitk.WriteImage(picture, str(tmp_path / f"picture{suffix}"))
    found, expected = read_volume(tmp_path / f"picture{suffix}", spatial_dims=2), read_volume(picture, spatial_dims=2)
    assert np.array_equal(found.as_tensor()[0].numpy(), values.T)
    assert found.affine.shape == (4, 4)
    if suffix != ".tif":  # which has neither origin nor direction
        assert torch.allclose(found.affine[:2], expected.affine[:2], atol=1e-5)


def test_objects_register_as_files_do(registration: Registration, oblique_files: dict[str, str], demons: Path) -> None:
    again = register(
        nib.load(oblique_files["fixed"]),
        sitk.ReadImage(oblique_files["moving"]),
        moving_label=as_metatensor(oblique_files["moving_label"]),
        steps=4,
        bundle=demons,
        device="cpu",
    )
    assert torch.allclose(again.displacement.as_tensor(), registration.displacement.as_tensor(), atol=0.2)
    assert again.quality["fixed"] == "given as Nifti1Image"
    assert "dice_after" not in again.quality
    assert again.moved_label is not None


def test_several_series_are_listed_and_one_can_be_named(oblique_files: dict[str, str], tmp_path: Path) -> None:
    image = sitk.ReadImage(oblique_files["moving"])
    for i in (1, 2):
        write_series(image, tmp_path / "scan", f"1.2.826.0.1.3680043.2.1125.{i}", f"series {i}")
    with pytest.raises(InputError) as raised:
        register(oblique_files["fixed"], tmp_path / "scan")
    sentence = str(raised.value)
    assert f"moving image {tmp_path / 'scan'}: expected one DICOM series, found 2" in sentence
    for i in (1, 2):
        assert f"1.2.826.0.1.3680043.2.1125.{i} (series {i}, {image.GetDepth()} files)" in sentence
    named = read_volume(tmp_path / "scan" / "1.2.826.0.1.3680043.2.1125.2")
    assert named.shape[1:] == image.GetSize()


def test_a_series_that_lacks_a_slice_is_refused(oblique_files: dict[str, str], tmp_path: Path) -> None:
    uid = "1.2.826.0.1.3680043.2.1125.1"
    folder = write_series(sitk.ReadImage(oblique_files["fixed"]), tmp_path / "scan", uid)
    read_image(folder)
    slices = sitk.ImageSeriesReader().GetGDCMSeriesFileNames(str(folder))
    Path(slices[len(slices) // 2]).unlink()
    with pytest.raises(InputError, match=r"slices at equal distances, found from .* mm \(is one missing"):
        read_image(folder)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colour_pictures_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(np.random.randint(0, 255, (20, 30, 3), dtype=np.uint8), isVector=True), path)
    with pytest.raises(InputError, match="expected one channel, found 3: a colour picture"):
        read_image(path, spatial_dims=None)


def test_complex_volumes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kspace.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.complex64), np.eye(4)), path)
    with pytest.raises(InputError, match="expected real numbers, found complex ones"):
        read_image(path)


def test_outside_a_ct_is_air(tmp_path: Path) -> None:
    ct = MetaTensor(torch.full((1, 8, 8, 8), 40.0), affine=torch.eye(4))
    ct[0, 0, 0, 0] = -1000
    field = torch.zeros(3, 8, 8, 8)
    field[0] = 4.0
    still = DenseTransform(torch.zeros(3, 8, 8, 8), torch.eye(4, dtype=torch.float64))
    way = Correspondence(torch.eye(4, dtype=torch.float64), still, DenseTransform(field, still.affine))
    assert way.move(ct)[0, :, 4, 4].tolist() == [40.0] * 4 + [-1000.0] * 4
    assert way.move(ct + 1000)[0, :, 4, 4].tolist() == [1040.0] * 4 + [0.0] * 4


def test_a_folder_without_dicom_files(tmp_path: Path, oblique_files: dict[str, str]) -> None:
    with pytest.raises(InputError, match="expected a file or a folder with a DICOM series, found none"):
        register(tmp_path, oblique_files["moving"])


@pytest.mark.parametrize("given", [np.zeros((4, 4, 4)), torch.zeros(4, 4, 4), None])
def test_arrays_without_an_affine_are_refused(given: Any, oblique_files: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"fixed image given as .* expected a path or an image of"):
        register(given, oblique_files["moving"])
