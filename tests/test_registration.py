"""One call: any image in, results that ITK reads the same way out, all in place together or not at all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from demons import demons_bundle
from monai.data import MetaTensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.itk_bridge import read_transform, to_itk
from monai_rl_reg.nifti import read_volume
from monai_rl_reg.phantoms import make_case
from monai_rl_reg.quality import warnings_about
from monai_rl_reg.registration import FILES, Registrar, Registration, register
from monai_rl_reg.request import Options, Pair

GRIDS = {
    "fixed": ((28, 33, 19), (10, -15, 25), (1.1, 0.9, 1.7), (103, -52, 31)),
    "moving": ((34, 27, 31), (-20, 8, 12), (0.9, 1.3, 1.0), (100, -50, 32)),
}


def scene(points: np.ndarray, bend: float) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of nested ellipsoids about (100, -50, 30) at world points (..., 3), bent by some millimetres."""
    p = points - np.array([100, -50, 30])
    p = p + bend * np.sin(p[..., [1, 2, 0]] / 5)
    r = np.sqrt((p / np.array([11, 9, 10])) ** 2 @ np.ones(3))
    r = r + 0.1 * np.sin(p @ np.array([0.5, 0.3, 0.2]))
    label = (r < 1).astype(np.int16) + (r < 0.6) + 5 * (r < 0.3).astype(np.int16)
    image = 800 / (1 + np.exp(12 * (r - 1))) - 400 / (1 + np.exp(14 * (r - 0.6))) + 300 / (1 + np.exp(14 * (r - 0.3)))
    return (image + 100).astype(np.float32), label


def grid(role: str) -> tuple[np.ndarray, np.ndarray]:
    """The oblique, anisotropic affine of an image, and the world coordinates of its voxels."""
    from test_transforms import oblique

    shape, angles, spacing, centre = GRIDS[role]
    affine = oblique(shape, angles, spacing, centre, flip=role == "fixed")
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return affine, index @ affine[:3, :3].T + affine[:3, 3]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    made = {}
    for role, bend in (("fixed", 0.0), ("moving", 1.5)):
        affine, world = grid(role)
        for name, data in zip((role, f"{role}_label"), scene(world, bend), strict=True):
            made[name] = str(folder / f"{name}.nii.gz")
            nib.save(nib.Nifti1Image(data, affine), made[name])
    made["landmarks"] = str(folder / "points.csv")
    Path(made["landmarks"]).write_text("x,y,z,name\n-100,50,30,centre\n-104,52,33,side\n-97,48,27,other\n")
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demons_bundle(tmp_path_factory.mktemp("bundle") / "demons")


@pytest.fixture(scope="module")
def registrar(bundle: Path) -> Registrar:
    return Registrar(bundle=bundle, device="cpu")


@pytest.fixture(scope="module")
def result(files: dict[str, str], registrar: Registrar) -> Registration:
    return registrar.register(Pair.read(**files), Options(steps=4, uncertainty=3))


@pytest.fixture(scope="module")
def out(result: Registration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "out"
    result.save(folder, tfm=True)
    return folder


def read_field(path: Path) -> sitk.DisplacementFieldTransform:
    return sitk.DisplacementFieldTransform(sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkVectorFloat64))


def points_inside(image: sitk.Image, count: int = 60) -> list[tuple[float, ...]]:
    """Physical points in the middle half of an image."""
    random, size = np.random.default_rng(0), np.array(image.GetSize())
    return [
        image.TransformContinuousIndexToPhysicalPoint(list(size * (0.25 + 0.5 * random.random(len(size)))))
        for _ in range(count)
    ]


def test_it_registers(result: Registration, files: dict[str, str]) -> None:
    quality = result.quality
    assert quality["ncc_after"] > quality["ncc_before"] + 0.02
    assert quality["folded_percent"] < 0.5
    assert result.moved_label is not None
    for value in (1, 2, 7):
        a, b = result.moved_label[0].numpy() == value, nib.load(files["fixed_label"]).get_fdata() == value
        assert quality["dice_per_label"][str(value)] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-5)
    assert quality["dice_after"] == pytest.approx(np.mean(list(quality["dice_per_label"].values())), abs=1e-5)
    assert quality["steps"] == 4
    assert len(result.history) == len(result.curve) == 5
    assert set(result.curve[0]) == {"ncc", "dice"}
    assert [quality["ncc_before"], quality["ncc_after"]] == [result.curve[i]["ncc"] for i in (0, -1)]
    assert set(quality["dice_per_label"]) == {"1", "2", "7"}
    assert np.array_equal(result.fixed[0].numpy(), nib.load(files["fixed"]).get_fdata(dtype=np.float32))
    assert np.array_equal(result.moving[0].numpy(), nib.load(files["moving"]).get_fdata(dtype=np.float32))


def test_all_files_are_there(out: Path) -> None:
    assert {file.name for file in out.iterdir()} == FILES - {"report.html"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    quality = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    for key in ("ncc_before", "folded_percent", "sdlogj", "inverse_error_mm", "seconds", "versions", "warnings"):
        assert quality[key] is not None


@pytest.mark.parametrize("name", ["displacement.nii.gz", "transform.h5", "transform.tfm"])
def test_simpleitk_and_itk_carry_points_as_we_do(name: str, out: Path, result: Registration) -> None:
    fixed = to_itk(result.fixed.as_tensor(), result.fixed.affine)
    points = points_inside(fixed)
    ras = np.array(points).T * np.array([[-1], [-1], [1]])
    index = np.linalg.inv(result.fixed.affine.numpy()) @ np.vstack([ras, np.ones(len(points))])
    from monai_rl_reg.geometry import sample

    expected = ras + sample(result.displacement.as_tensor(), torch.from_numpy(index[:3])).numpy()
    expected = (expected * np.array([[-1], [-1], [1]])).T
    if name.startswith("displacement"):
        ours = read_field(out / name)
        vectors = itk.imread(str(out / name), itk.Vector[itk.F, 3])
        theirs = itk.DisplacementFieldTransform[itk.F, 3].New(DisplacementField=vectors)
    else:
        ours = sitk.ReadTransform(str(out / name))
        theirs = itk.transformread(str(out / name))[0]
    for point, at in zip(points, expected, strict=True):
        assert np.allclose(ours.TransformPoint(point), at, atol=1e-3)
        assert np.allclose(list(theirs.TransformPoint(point)), at, atol=1e-3)


def test_the_transform_moves_the_image_and_its_label(out: Path, files: dict[str, str]) -> None:
    transform = sitk.ReadTransform(str(out / "transform.h5"))
    fixed = sitk.ReadImage(files["fixed"], sitk.sitkFloat32)
    moving = sitk.ReadImage(files["moving"], sitk.sitkFloat64)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0))
    moved = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "moved.nii.gz")))
    inside = (expected != 0) & (moved != 0)
    assert inside.mean() > 0.5
    assert np.abs(moved - expected)[inside].max() < 0.2  # of intensities up to 900
    label = sitk.Resample(sitk.ReadImage(files["moving_label"]), fixed, transform, sitk.sitkNearestNeighbor, 0)
    moved_label = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "moved_label.nii.gz")))
    assert (moved_label == sitk.GetArrayFromImage(label)).mean() > 0.999
    assert set(np.unique(moved_label)) <= {0, 1, 2, 7}


def test_there_and_back_by_the_files(out: Path, result: Registration, files: dict[str, str]) -> None:
    forth, back = read_field(out / "displacement.nii.gz"), read_field(out / "inverse_displacement.nii.gz")
    moving, off = sitk.ReadImage(files["moving"]), []
    for point in points_inside(sitk.ReadImage(files["fixed"])):
        there = forth.TransformPoint(point)
        index = np.array(moving.TransformPhysicalPointToContinuousIndex(there))
        if (index >= 0).all() and (index <= np.array(moving.GetSize()) - 1).all():
            off.append(np.linalg.norm(np.array(back.TransformPoint(there)) - point))
    assert len(off) > 50
    assert max(off) < 0.5 * 0.9  # half of the smallest voxel
    assert result.quality["inverse_error_mm"] < 0.02
    assert result.quality["inverse_error_max_mm"] >= result.quality["inverse_error_mm"]


def test_landmarks_go_there_and_back(out: Path, files: dict[str, str], registrar: Registrar) -> None:
    forth = read_field(out / "displacement.nii.gz")
    lines = (out / "landmarks.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "x,y,z,name,image,space"
    given = [(-100, 50, 30), (-104, 52, 33), (-97, 48, 27)]
    for line, point in zip(lines[1:], given, strict=True):
        assert np.allclose([float(x) for x in line.split(",")[:3]], forth.TransformPoint(point), atol=1e-3)
        assert line.split(",")[4:] == ["moving", "LPS"]
    again = registrar.register(Pair.read(**files | {"landmarks": str(out / "landmarks.csv")}), Options(steps=4))
    assert again.landmarks is not None
    back = again.landmarks.points.T.numpy() * np.array([-1, -1, 1])
    assert np.abs(back - np.array(given)).max() < 0.45


def test_uncertainty_is_a_length_and_the_same_every_time(
    result: Registration, files: dict[str, str], registrar: Registrar
) -> None:
    assert result.uncertainty is not None
    assert result.uncertainty.shape == result.fixed.shape
    assert result.uncertainty.min() >= 0
    assert result.uncertainty.max() > 0
    before = torch.get_rng_state()
    again = registrar.register(Pair.read(**files), Options(steps=4, uncertainty=3))
    assert torch.equal(again.uncertainty, result.uncertainty)
    assert torch.equal(again.displacement, result.displacement)
    assert torch.equal(torch.get_rng_state(), before)


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
    convert: Callable[[str], Any], tolerance: float, files: dict[str, str]
) -> None:
    expected, found = read_volume(files["moving"]), read_volume(convert(files["moving"]))
    assert found.shape == expected.shape
    assert torch.allclose(found.affine, expected.affine, atol=1e-4)
    assert (found.as_tensor() - expected.as_tensor()).abs().max() <= tolerance


def test_objects_register_as_files_do(result: Registration, files: dict[str, str], bundle: Path) -> None:
    again = register(
        nib.load(files["fixed"]),
        sitk.ReadImage(files["moving"]),
        moving_label=as_metatensor(files["moving_label"]),
        steps=4,
        bundle=bundle,
        device="cpu",
    )
    assert torch.allclose(again.displacement.as_tensor(), result.displacement.as_tensor(), atol=0.2)
    assert again.quality["fixed"] == "given as Nifti1Image"
    assert "dice_after" not in again.quality
    assert again.moved_label is not None


def test_several_series_are_listed_and_one_can_be_named(files: dict[str, str], tmp_path: Path) -> None:
    image = sitk.ReadImage(files["moving"])
    for i in (1, 2):
        write_series(image, tmp_path / "scan", f"1.2.826.0.1.3680043.2.1125.{i}", f"series {i}")
    with pytest.raises(InputError) as raised:
        register(files["fixed"], tmp_path / "scan")
    sentence = str(raised.value)
    assert f"moving image {tmp_path / 'scan'}: expected one DICOM series, found 2" in sentence
    for i in (1, 2):
        assert f"1.2.826.0.1.3680043.2.1125.{i} (series {i}, {image.GetDepth()} files)" in sentence
    named = read_volume(tmp_path / "scan" / "1.2.826.0.1.3680043.2.1125.2")
    assert named.shape[1:] == image.GetSize()


def test_a_folder_without_dicom_files(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(InputError, match="expected a file or a folder with a DICOM series, found none"):
        register(tmp_path, files["moving"])


@pytest.mark.parametrize("given", [np.zeros((4, 4, 4)), torch.zeros(4, 4, 4), None])
def test_arrays_without_an_affine_are_refused(given: Any, files: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"fixed image given as .* expected a path or an image of"):
        register(given, files["moving"])


def test_no_step_and_no_transform_is_plain_resampling(files: dict[str, str], registrar: Registrar) -> None:
    still = registrar.register(Pair.read(files["fixed"], files["moving"]), Options(steps=0, initial="none"))
    assert still.displacement.abs().max() < 1e-4
    fixed, moving = sitk.ReadImage(files["fixed"]), sitk.ReadImage(files["moving"], sitk.sitkFloat64)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed)).T
    inside = (expected != 0) & (still.moved[0].numpy() != 0)
    assert np.abs(still.moved[0].numpy() - expected)[inside].max() < 0.2
    assert still.quality["initial"] == {"kind": "none"}


def turned(files: dict[str, str]) -> sitk.Transform:
    return sitk.Euler3DTransform((-100.0, 50.0, 30.0), 0.1, -0.05, 0.2, (2.0, -3.0, 1.0))


def bent(files: dict[str, str]) -> sitk.Transform:
    fixed = sitk.ReadImage(files["fixed"])
    field = sitk.TransformToDisplacementField(
        turned(files),
        sitk.sitkVectorFloat64,
        fixed.GetSize(),
        fixed.GetOrigin(),
        fixed.GetSpacing(),
        fixed.GetDirection(),
    )
    return sitk.DisplacementFieldTransform(field)


def composite(files: dict[str, str]) -> sitk.Transform:
    both = sitk.CompositeTransform(3)
    both.AddTransform(sitk.TranslationTransform(3, (1.0, 0.5, -0.5)))
    both.AddTransform(turned(files))
    return both


@pytest.mark.parametrize(("make", "suffix"), [(turned, ".tfm"), (turned, ".h5"), (composite, ".h5"), (bent, ".h5")])
def test_an_initial_transform_is_composed_in(
    make: Callable[[dict[str, str]], sitk.Transform],
    suffix: str,
    files: dict[str, str],
    registrar: Registrar,
    tmp_path: Path,
) -> None:
    path, expected = tmp_path / f"initial{suffix}", make(files)
    sitk.WriteTransform(expected, str(path))
    pair = Pair.read(files["fixed"], files["moving"])
    alone = registrar.register(pair, Options(steps=0, initial=path))
    alone.save(tmp_path / "out")
    found = sitk.ReadTransform(str(tmp_path / "out" / "transform.h5"))
    fixed = sitk.ReadImage(files["fixed"])
    for point in points_inside(fixed):
        assert np.allclose(found.TransformPoint(point), expected.TransformPoint(point), atol=2e-3)
    assert alone.quality["initial"] == {"kind": "file", "file": str(path)}
    assert alone.quality["inverse_error_mm"] < 0.05
    # a field file that we wrote is an initial transform, too; its steps go on from there
    further = registrar.register(pair, Options(steps=2, initial=tmp_path / "out" / "displacement.nii.gz"))
    assert further.quality["ncc_before"] == pytest.approx(alone.quality["ncc_after"], abs=0.02)
    assert further.quality["ncc_after"] > further.quality["ncc_before"]
    assert further.quality["inverse_error_mm"] < 0.05


def test_an_initial_transform_may_be_a_tensor_and_the_field_back_left_out(
    files: dict[str, str], registrar: Registrar
) -> None:
    pair = Pair.read(files["fixed"], files["moving"])
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.tensor([2.0, -1.0, 0.5])
    alone = registrar.register(pair, Options(steps=0, initial=matrix, inverse=False))
    expected = matrix[:3, 3].reshape(3, 1, 1, 1).float().expand_as(alone.displacement)
    torch.testing.assert_close(alone.displacement.as_tensor(), expected, rtol=0, atol=1e-4)
    assert alone.inverse_displacement is None
    assert not any("inverse" in key for key in alone.quality)
    assert alone.quality["initial"] == {"kind": "given"}


def test_bad_initial_transforms(files: dict[str, str], tmp_path: Path) -> None:
    fixed = read_volume(files["fixed"])
    broken, flat, plane = (tmp_path / f"{name}.tfm" for name in ("broken", "flat", "plane"))
    broken.write_text("not a transform")
    plane.write_text("")
    sitk.WriteTransform(sitk.Euler2DTransform(), str(plane))
    singular = sitk.AffineTransform(3)
    singular.SetMatrix([1, 0, 0, 0, 1, 0, 0, 0, 0])
    sitk.WriteTransform(singular, str(flat))
    for path, words in (
        (tmp_path / "none.h5", "expected a file, found none"),
        (broken, "expected an ITK transform"),
        (flat, "expected one that can be inverted"),
        (plane, "expected one of 3 dimensions, found 2"),
        (Path(files["moving"]), "expected"),
    ):
        with pytest.raises(InputError, match=words) as raised:
            read_transform(path, fixed)
        assert str(path) in str(raised.value)


def test_no_overlap_under_the_initial_transform(files: dict[str, str], bundle: Path, tmp_path: Path) -> None:
    far = sitk.TranslationTransform(3, (500.0, 0.0, 0.0))
    sitk.WriteTransform(far, str(tmp_path / "far.tfm"))
    with pytest.raises(InputError, match="expected to overlap in space"):
        register(files["fixed"], files["moving"], initial=tmp_path / "far.tfm", bundle=bundle, device="cpu")


def test_auto_stops_by_itself(files: dict[str, str], registrar: Registrar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_rl_reg.similarity.LocalNCC.gain", 0.02)
    done = registrar.register(Pair.read(files["fixed"], files["moving"]), Options(steps="auto"))
    ncc = [point["ncc"] for point in done.curve]
    gains = np.diff(ncc)
    assert 1 <= done.quality["steps"] < 16
    assert done.quality["stopped_by_itself"]
    assert (gains >= 0).all()
    assert (gains[:-1] >= 0.02).all()


def test_refinement_is_part_of_the_result(files: dict[str, str], registrar: Registrar) -> None:
    done = registrar.register(Pair.read(files["fixed"], files["moving"]), Options(steps=2, refine=1.5))
    figures = done.quality["refinement"]
    assert figures["iterations"] > 0
    assert figures["loss_after"] < figures["loss_before"]
    assert len(done.history) == len(done.curve) == 4
    assert done.curve[-1]["ncc"] > done.curve[-2]["ncc"]


def test_a_large_image_gets_a_coarser_working_grid(
    files: dict[str, str], registrar: Registrar, result: Registration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_rl_reg.working.MOST_VOXELS", 9000)
    done = registrar.register(Pair.read(**files), Options(steps=4))
    grid = done.quality["working_grid"]
    assert grid["coarsened_to_save_memory"]
    assert not result.quality["working_grid"]["coarsened_to_save_memory"]
    assert np.prod(grid["shape"]) <= 9000
    assert max(grid["spacing_mm"]) < 1.8  # the finer directions are coarsened, not the coarsest
    assert done.moved.shape == done.fixed.shape
    assert done.quality["ncc_after"] > done.quality["ncc_before"]
    assert done.quality["dice_after"] > 0.9 * result.quality["dice_after"]
    assert (done.displacement - result.displacement).norm(dim=0).mean() < 1.0


def test_two_dimensions(bundle: Path, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    paths = []
    for i in range(2):
        image, _, affine = make_case(random, size=40, spatial_dims=2, oblique=i == 1)
        paths.append(tmp_path / f"{i}.nii.gz")
        nib.save(nib.Nifti1Image(image[0].numpy(), affine.numpy()), paths[-1])
    done = register(*paths, steps=3, bundle=bundle, device="cpu")
    assert done.displacement.shape == (2, *done.fixed.shape[1:])
    done.save(tmp_path / "out")
    transform = sitk.ReadTransform(str(tmp_path / "out" / "transform.h5"))
    fixed, moving = (sitk.ReadImage(str(p), sitk.sitkFloat64) for p in paths)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform)).T
    inside = (expected != 0) & (done.moved[0].numpy() != 0)
    assert inside.mean() > 0.3
    assert np.abs(done.moved[0].numpy() - expected)[inside].max() < 0.01 * expected.max()
    back = read_field(tmp_path / "out" / "inverse_displacement.nii.gz")
    for point in points_inside(fixed, 20):
        assert np.allclose(back.TransformPoint(transform.TransformPoint(point)), point, atol=0.3)


def test_the_shipped_weights_register_what_they_were_trained_on(hippocampus: Path) -> None:
    images, labels = (
        [hippocampus / f"{what}Tr" / f"hippocampus_{i}.nii.gz" for i in (296, 309)] for what in ("images", "labels")
    )
    quality = register(*images, fixed_label=labels[0], moving_label=labels[1], device="cpu").quality
    assert quality["initial"]["kind"] == "identity"  # the policy gets there without
    assert quality["initial"]["given_up"] in ("rigid", "affine")
    assert quality["dice_after"] > 0.8
    assert quality["dice_after"] > quality["dice_before"] + 0.03
    assert quality["seen_dice_after"] > 0.9 > quality["seen_dice_before"]
    assert quality["folded_percent"] < 0.1
    assert quality["steps"] == 5
    assert quality["warnings"] == []
    refined = register(*images, fixed_label=labels[0], moving_label=labels[1], refine=1.0, device="cpu").quality
    assert refined["refinement"]["loss_after"] < refined["refinement"]["loss_before"]
    assert refined["dice_after"] > quality["dice_after"] - 0.01
    turned = torch.eye(4, dtype=torch.float64)
    turned[:2, :2] = torch.tensor([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    turned[:3, 3] = torch.tensor([20.0, -30.0, 15.0])
    apart = []
    for path in (images[1], labels[1]):
        file: Any = nib.load(path)
        apart.append(nib.Nifti1Image(np.asarray(file.dataobj), turned.numpy() @ file.affine))
    brought = register(images[0], apart[0], fixed_label=labels[0], moving_label=apart[1], device="cpu").quality
    assert brought["initial"]["kind"] in ("rigid", "affine")
    assert brought["dice_after"] > quality["dice_after"] - 0.03


def test_the_shipped_weights_say_where_they_are_of_no_use(files: dict[str, str]) -> None:
    quality = register(**{role: files[role] for role in ("fixed", "moving")}, device="cpu").quality
    assert "unlike those that the weights were trained on" in quality["warnings"][0]


def test_what_is_wrong_is_said() -> None:
    good = {"similarity": "ncc", "ncc_before": 0.5, "ncc_after": 0.7, "folded_percent": 0.2}
    assert warnings_about(good) == []
    assert "similarity of the images fell" in warnings_about(good | {"ncc_after": 0.4})[0]
    assert warnings_about(good | {"ncc_after": 0.4, "seen_dice_after": 0.93}) == []
    assert len(warnings_about(good | {"ncc_after": 0.4, "seen_dice_after": 0.5})) == 2
    assert "structures that the policy sees" in warnings_about(good | {"seen_dice_after": 0.5})[0]
    assert "1.5 % of the voxels are folded" in warnings_about(good | {"folded_percent": 1.5})[0]
    assert "labels agree less" in warnings_about(good | {"dice_before": 0.8, "dice_after": 0.7})[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "steps: expected a whole number from 0 up, or auto, found -1"),
        ({"steps": "many"}, "found 'many'"),
        ({"refine": -1.0}, "refine: expected"),
        ({"uncertainty": 1}, "at least 2 rollouts, found 1"),
        ({"bundle": "nowhere"}, "bundle nowhere: expected a folder with configs/inference.json in it, found none"),
        ({"ckpt": "nothing.pt"}, "checkpoint nothing.pt: expected a file, found none"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, files: dict[str, str]) -> None:
    with pytest.raises(InputError) as raised:
        register(files["fixed"], files["moving"], **options)
    assert words in str(raised.value)


def test_what_else_lies_in_the_folder_stays_and_old_results_go(result: Registration, tmp_path: Path) -> None:
    result.save(tmp_path / "out", tfm=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "more").mkdir()
    (tmp_path / "out" / "more" / "file").write_text("mine too")
    replace(result, moved_label=None, landmarks=None).save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == FILES - {"transform.tfm", "moved_label.nii.gz", "landmarks.csv", "report.html"} | {
        "notes.txt",
        "more",
    }
    assert (tmp_path / "out" / "more" / "file").read_text(encoding="utf-8") == "mine too"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_working_directory_can_be_the_output(
    result: Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "transform.tfm").write_text("of an earlier run")
    result.save(".")
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"transform.tfm", "report.html"}


def test_a_failure_while_writing_leaves_the_old_files(
    result: Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*args: Any) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("monai_rl_reg.registration.write_transform", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        replace(result, quality={}).save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, sys, json, shutil
from pathlib import Path
from monai_rl_reg import folders

moments = int(sys.argv[2])

def count(function):
    def counted(*args, **kwargs):
        global moments
        moments -= 1
        if moments == 0:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return counted

folders.os.link = count(os.link)
Path.rename = count(Path.rename)
folders.shutil.rmtree = count(shutil.rmtree)
exchange = folders._exchange
folders._exchange = count(exchange)
with folders.replacing_folder(sys.argv[1], {"a", "b"}) as staging:
    for name in ("a", "b"):
        (staging / name).write_text("new")
        count(len)("")
"""


def test_a_kill_at_any_moment_leaves_the_old_files_or_the_new_ones(tmp_path: Path) -> None:
    seen = set()
    for moment in range(1, 9):
        folder = tmp_path / f"run{moment}" / "out"
        folder.mkdir(parents=True)
        for name in ("a", "b", "mine"):
            (folder / name).write_text("old")
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(moment)], check=False)
        texts = {name: (folder / name).read_text(encoding="utf-8") for name in ("a", "b")}
        assert len(set(texts.values())) == 1, (moment, texts)
        assert (folder / "mine").read_text(encoding="utf-8") == "old"
        seen.add((done.returncode, texts["a"]))
    assert seen == {(-9, "old"), (-9, "new"), (0, "new")}


def test_an_output_that_is_a_file(result: Registration, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(InputError, match="expected a folder that can be written to"):
        result.save(tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "in the way"


BIG = """
import sys
import nibabel as nib, numpy as np

folder = sys.argv[1]
index = np.stack(np.meshgrid(*[np.linspace(-1.6, 1.6, n, dtype=np.float32) for n in (256, 256, 180)], indexing="ij"))
for name, squeeze in (("fixed", 1.0), ("moving", 1.1)):
    r = np.sqrt((index[0] * squeeze) ** 2 + index[1] ** 2 + (index[2] / squeeze) ** 2)
    data = (1000 / (1 + np.exp(20 * (r - 1))) + 300 * np.cos(9 * r) * (r < 1)).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.eye(4)), f"{folder}/{name}.nii.gz")
"""


@pytest.mark.slow
def test_a_large_pair_takes_less_than_4_gb(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BIG, str(tmp_path)], check=True)
    run = (
        "import resource, sys; from monai_rl_reg.command_line import main; "
        f"status = main(['register', '{tmp_path}/fixed.nii.gz', '{tmp_path}/moving.nii.gz', '--output', "
        f"'{tmp_path}/out', '--device', 'cpu', '-q']); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, status)"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, encoding="utf-8", timeout=3600)
    peak, status = (int(x) for x in done.stdout.split("peak ")[1].split())
    assert status == 0
    assert peak < 4_000_000  # kilobytes
    quality = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    assert quality["working_grid"]["coarsened_to_save_memory"]
    assert quality["inverse_error_mm"] < 0.1
    assert nib.load(tmp_path / "out" / "moved.nii.gz").shape == (256, 256, 180)
