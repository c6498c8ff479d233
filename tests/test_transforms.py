"""Real files on real grids: oblique, anisotropic, of different sizes, against ITK's own reading of what we write."""

from __future__ import annotations

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import CONFIGS
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import ScaleIntensityRangePercentiles, Spacingd
from oblique_pair import oblique
from torch.nn import functional as F

from monai_rl_reg.errors import InputError
from monai_rl_reg.transforms import (
    FinishOnFixedGridd,
    LoadCased,
    MovingToFixedGridd,
    ScaleToUnitd,
    scale_percentiles_to_unit,
)
from monai_rl_reg.writers import write_result


def textured(shape: tuple[int, ...], affine: np.ndarray, seed: int) -> np.ndarray:
    """Smooth blobs in world coordinates, so that both grids show the same scene, and noise of their own."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    scene = sum(np.cos(world @ np.array(k)) for k in ([0.2, 0.1, 0], [0, 0.25, 0.1], [0.15, 0, 0.3]))
    return (100 * scene + 400 + 3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    """A pair with different sizes, spacings and oblique directions."""
    grids = {
        "fixed": ((21, 26, 18), ((10, -15, 25), (1.1, 0.9, 1.4), (3, -2, 1), True)),
        "moving": ((25, 19, 23), ((-20, 8, 12), (0.9, 1.3, 1.0), (0, 0, 2), False)),
    }
    files = {}
    for seed, (role, (shape, geometry)) in enumerate(grids.items()):
        affine = oblique(shape, *geometry)
        data = textured(shape, affine, seed)
        files[role] = str(tmp_path / f"{role}.nii.gz")
        nib.save(nib.Nifti1Image(data, affine), files[role])
        files[f"{role}_label"] = str(tmp_path / f"{role}_label.nii.gz")
        nib.save(nib.Nifti1Image((1 + (data > 400)).astype(np.int16), affine), files[f"{role}_label"])
    return files


@pytest.fixture(params=["world", "centre"])
def result(pair: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, str], Path]:
    """The files that come out for a made displacement on the working grid, by the bundle's own transforms."""
    parser = ConfigParser()
    parser.read_config(CONFIGS / "inference.json")
    parser.update({"align": request.param, **pair})
    item = parser.get_parsed_content("dataset")[0]
    noise = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    item["pred"] = 1.5 * F.interpolate(noise, item["image"].shape[1:], mode="trilinear")[0]
    write_result(tmp_path / "out", FinishOnFixedGridd()(item))
    return pair, tmp_path / "out"


def test_a_case_can_be_resampled_by_monai(cohort: Path) -> None:
    case = LoadCased()({key: cohort / f"{key}sTr" / "phantom_001.nii.gz" for key in ("image", "label")})
    coarse = Spacingd(["image", "label"], [2.0, 2.0, 2.0], mode=["bilinear", "nearest"])(case)
    assert coarse["image"].shape == coarse["label"].shape
    assert np.allclose(coarse["image"].affine[:3, :3].norm(dim=0), 2.0, atol=1e-4)
    assert coarse["file"].endswith("phantom_001.nii.gz")
    assert set(coarse["label"].unique().int().tolist()) <= {0, *coarse["values"]}


def test_simpleitk_reproduces_the_moved_image(result: tuple[dict[str, str], Path]) -> None:
    pair, out = result
    fixed = sitk.ReadImage(pair["fixed"], sitk.sitkFloat32)
    moving = sitk.ReadImage(pair["moving"], sitk.sitkFloat64)
    field = sitk.Cast(sitk.ReadImage(str(out / "displacement.nii.gz")), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0))
    moved = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "moved.nii.gz")))
    inside = (expected != 0) & (moved != 0)
    assert inside.mean() > 0.5
    assert np.abs(moved - expected)[inside].max() < 0.05  # of intensities up to 700: float32 rounding of the field
    assert ((expected != 0) == (moved != 0)).mean() > 0.999


def test_simpleitk_reproduces_the_moved_label(result: tuple[dict[str, str], Path]) -> None:
    pair, out = result
    fixed = sitk.ReadImage(pair["fixed"])
    label = sitk.ReadImage(pair["moving_label"])
    field = sitk.Cast(sitk.ReadImage(str(out / "displacement.nii.gz")), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    expected = sitk.GetArrayFromImage(sitk.Resample(label, fixed, transform, sitk.sitkNearestNeighbor, 0))
    moved = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "moved_label.nii.gz")))
    assert (moved == expected).mean() > 0.999
    assert set(np.unique(moved)) <= {0, 1, 2}


def test_a_result_without_a_label_leaves_none_of_an_earlier_pair(tmp_path: Path) -> None:
    def volume(channels: int) -> MetaTensor:
        return MetaTensor(torch.rand(channels, 4, 5, 6), affine=torch.eye(4, dtype=torch.float64))

    result = {"displacement": volume(3), "moved": volume(1), "moved_label": volume(1).round().to(torch.uint8)}
    write_result(tmp_path / "out", result)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    del result["moved_label"]
    write_result(tmp_path / "out", result)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "displacement.nii.gz", "moved.nii.gz", "notes.txt",
    ]  # fmt: skip


def test_files_lie_on_the_fixed_grid(result: tuple[dict[str, str], Path]) -> None:
    pair, out = result
    fixed = nib.load(pair["fixed"])
    for name in ("moved", "moved_label", "displacement"):
        file = nib.load(out / f"{name}.nii.gz")
        assert file.shape[:3] == fixed.shape
        assert np.allclose(file.affine, fixed.affine, atol=1e-5)
    assert nib.load(out / "displacement.nii.gz").header["intent_code"] == 1007
    assert nib.load(out / "displacement.nii.gz").shape[3:] == (1, 3)


def test_itk_reads_the_field_as_vectors(result: tuple[dict[str, str], Path]) -> None:
    field = itk.imread(str(result[1] / "displacement.nii.gz"))
    assert field.GetImageDimension() == 3
    assert field.GetNumberOfComponentsPerPixel() == 3


def test_no_displacement_is_the_moving_image_where_it_lies(pair: dict[str, str]) -> None:
    parser = ConfigParser()
    parser.read_config(CONFIGS / "inference.json")
    parser.update({"align": "world", **pair})
    item = parser.get_parsed_content("dataset")[0]
    item["pred"] = torch.zeros(3, *item["image"].shape[1:])
    finished = FinishOnFixedGridd()(item)
    assert finished["displacement"].abs().max() < 1e-9
    fixed, moving = sitk.ReadImage(pair["fixed"]), sitk.ReadImage(pair["moving"], sitk.sitkFloat64)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed)).T
    assert np.abs(finished["moved"][0].numpy() - expected).max() < 0.05


@pytest.mark.parametrize("shift", [0.0, 6.0])
def test_auto_takes_the_better_of_world_and_centre(shift: float, tmp_path: Path) -> None:
    affine, files = np.eye(4), {}
    data = textured((24, 24, 24), affine, 0)
    for role, at in (("fixed", 0.0), ("moving", shift)):
        affine[:3, 3] = at
        files[role] = str(tmp_path / f"{role}.nii.gz")
        nib.save(nib.Nifti1Image(data, affine), files[role])
    parser = ConfigParser()
    parser.read_config(CONFIGS / "inference.json")
    parser.update(files)
    item = parser.get_parsed_content("dataset")[0]
    assert item["initial"][:3, 3].tolist() == [shift] * 3
    assert torch.allclose(item["image"][0], item["image"][1], atol=1e-4)


def test_size_is_cropped_or_padded_about_the_centre() -> None:
    from monai.data import MetaTensor

    image = MetaTensor(torch.rand(1, 9, 6, 7), affine=torch.eye(4))
    out = MovingToFixedGridd("world")({"fixed": image, "moving": image, "spatial_size": [5, 10, 7]})
    assert out["image"].shape == (2, 5, 10, 7)
    assert torch.equal(out["image"][0], out["image"][1])
    assert torch.allclose(out["image"].as_tensor()[0, :, 2:8], image.as_tensor()[0, 2:7], atol=1e-6)
    assert out["image"].affine[:3, 3].tolist() == [2, -2, 0]


def test_an_image_that_is_nearly_everywhere_the_same_is_scaled_too() -> None:
    image = torch.rand(1, 20, 20, 20) * 900 + 50
    usual = ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True)(image)
    torch.testing.assert_close(scale_percentiles_to_unit(image), usual)
    spots = torch.full((1, 20, 20, 20), -7.0)
    spots[0, 3:5, 3:5, 3:5] = torch.rand(2, 2, 2) * 9e5
    scaled = ScaleToUnitd("image")({"image": spots, "file": "x"})
    assert (float(scaled["image"].min()), float(scaled["image"].max()), scaled["file"]) == (0.0, 1.0, "x")


def test_a_range_of_intensities_is_what_becomes_0_and_1() -> None:
    air, water, bone = -1000.0, 0.0, 1500.0
    ct = torch.tensor([air, -160.0, water, 40.0, 240.0, bone]).reshape(1, 6, 1, 1)
    scaled = ScaleToUnitd("image", [-160, 240])({"image": ct})["image"]
    torch.testing.assert_close(scaled.flatten(), torch.tensor([0, 0, 0.4, 0.5, 1, 1]))


@pytest.mark.parametrize("wrong", [[240, -160], [1], "window", [0, float("nan")], [1, 1], 5])
def test_a_range_of_intensities_rises(wrong: object) -> None:
    with pytest.raises(InputError, match="intensity_range: expected two rising numbers"):
        ScaleToUnitd("image", wrong)  # type: ignore[arg-type]


def test_an_image_outside_the_range_of_intensities_is_refused() -> None:
    image = MetaTensor(torch.rand(1, 4, 4, 4), affine=torch.eye(4), meta={"filename_or_obj": "mr.nii.gz"})
    with pytest.raises(InputError, match=r"mr.nii.gz: expected contrast inside the intensity range, found values from"):
        ScaleToUnitd("image", [100, 200])({"image": image})
