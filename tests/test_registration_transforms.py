"""Transforms that ITK reads the same way: those a registration gives, and those it starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import itk
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from oblique_pair import points_inside, read_field

from monai_rl_reg.errors import InputError
from monai_rl_reg.itk_bridge import read_transform, to_itk
from monai_rl_reg.nifti import read_volume
from monai_rl_reg.registration import Registrar, Registration, register
from monai_rl_reg.request import Options, Pair


@pytest.mark.parametrize("name", ["displacement.nii.gz", "transform.h5", "transform.tfm"])
def test_simpleitk_and_itk_carry_points_as_we_do(
    name: str, registration_folder: Path, registration: Registration
) -> None:
    fixed = to_itk(registration.fixed.as_tensor(), registration.fixed.affine)
    points = points_inside(fixed)
    ras = np.array(points).T * np.array([[-1], [-1], [1]])
    index = np.linalg.inv(registration.fixed.affine.numpy()) @ np.vstack([ras, np.ones(len(points))])
    from monai_rl_reg.geometry import sample

    expected = ras + sample(registration.displacement.as_tensor(), torch.from_numpy(index[:3])).numpy()
    expected = (expected * np.array([[-1], [-1], [1]])).T
    if name.startswith("displacement"):
        ours = read_field(registration_folder / name)
        vectors = itk.imread(str(registration_folder / name), itk.Vector[itk.F, 3])
        theirs = itk.DisplacementFieldTransform[itk.F, 3].New(DisplacementField=vectors)
    else:
        ours = sitk.ReadTransform(str(registration_folder / name))
        theirs = itk.transformread(str(registration_folder / name))[0]
    for point, at in zip(points, expected, strict=True):
        assert np.allclose(ours.TransformPoint(point), at, atol=1e-3)
        assert np.allclose(list(theirs.TransformPoint(point)), at, atol=1e-3)


def test_the_transform_moves_the_image_and_its_label(registration_folder: Path, oblique_files: dict[str, str]) -> None:
    transform = sitk.ReadTransform(str(registration_folder / "transform.h5"))
    fixed = sitk.ReadImage(oblique_files["fixed"], sitk.sitkFloat32)
    moving = sitk.ReadImage(oblique_files["moving"], sitk.sitkFloat64)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0))
    moved = sitk.GetArrayFromImage(sitk.ReadImage(str(registration_folder / "moved.nii.gz")))
    inside = (expected != 0) & (moved != 0)
    assert inside.mean() > 0.5
    assert np.abs(moved - expected)[inside].max() < 0.2  # of intensities up to 900
    label = sitk.Resample(sitk.ReadImage(oblique_files["moving_label"]), fixed, transform, sitk.sitkNearestNeighbor, 0)
    moved_label = sitk.GetArrayFromImage(sitk.ReadImage(str(registration_folder / "moved_label.nii.gz")))
    assert (moved_label == sitk.GetArrayFromImage(label)).mean() > 0.999
    assert set(np.unique(moved_label)) <= {0, 1, 2, 7}


def test_there_and_back_by_the_files(
    registration_folder: Path, registration: Registration, oblique_files: dict[str, str]
) -> None:
    forth, back = (
        read_field(registration_folder / "displacement.nii.gz"),
        read_field(registration_folder / "inverse_displacement.nii.gz"),
    )
    moving, off = sitk.ReadImage(oblique_files["moving"]), []
    for point in points_inside(sitk.ReadImage(oblique_files["fixed"])):
        there = forth.TransformPoint(point)
        index = np.array(moving.TransformPhysicalPointToContinuousIndex(there))
        if (index >= 0).all() and (index <= np.array(moving.GetSize()) - 1).all():
            off.append(np.linalg.norm(np.array(back.TransformPoint(there)) - point))
    assert len(off) > 50
    assert max(off) < 0.5 * 0.9  # half of the smallest voxel
    assert registration.quality["inverse_error_mm"] < 0.02
    assert registration.quality["inverse_error_max_mm"] >= registration.quality["inverse_error_mm"]


def test_landmarks_go_there_and_back(
    registration_folder: Path, oblique_files: dict[str, str], registrar: Registrar
) -> None:
    forth = read_field(registration_folder / "displacement.nii.gz")
    lines = (registration_folder / "landmarks.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "x,y,z,name,image,space"
    given = [(-100, 50, 30), (-104, 52, 33), (-97, 48, 27)]
    for line, point in zip(lines[1:], given, strict=True):
        assert np.allclose([float(x) for x in line.split(",")[:3]], forth.TransformPoint(point), atol=1e-3)
        assert line.split(",")[4:] == ["moving", "LPS"]
    again = registrar.register(
        Pair.read(**oblique_files | {"landmarks": str(registration_folder / "landmarks.csv")}), Options(steps=4)
    )
    assert again.landmarks is not None
    back = again.landmarks.points.T.numpy() * np.array([-1, -1, 1])
    assert np.abs(back - np.array(given)).max() < 0.45


def turned(oblique_files: dict[str, str]) -> sitk.Transform:
    return sitk.Euler3DTransform((-100.0, 50.0, 30.0), 0.1, -0.05, 0.2, (2.0, -3.0, 1.0))


def bent(oblique_files: dict[str, str]) -> sitk.Transform:
    fixed = sitk.ReadImage(oblique_files["fixed"])
    field = sitk.TransformToDisplacementField(
        turned(oblique_files),
        sitk.sitkVectorFloat64,
        fixed.GetSize(),
        fixed.GetOrigin(),
        fixed.GetSpacing(),
        fixed.GetDirection(),
    )
    return sitk.DisplacementFieldTransform(field)


def composite(oblique_files: dict[str, str]) -> sitk.Transform:
    both = sitk.CompositeTransform(3)
    both.AddTransform(sitk.TranslationTransform(3, (1.0, 0.5, -0.5)))
    both.AddTransform(turned(oblique_files))
    return both


@pytest.mark.parametrize(("make", "suffix"), [(turned, ".tfm"), (turned, ".h5"), (composite, ".h5"), (bent, ".h5")])
def test_an_initial_transform_is_composed_in(
    make: Callable[[dict[str, str]], sitk.Transform],
    suffix: str,
    oblique_files: dict[str, str],
    registrar: Registrar,
    tmp_path: Path,
) -> None:
    path, expected = tmp_path / f"initial{suffix}", make(oblique_files)
    sitk.WriteTransform(expected, str(path))
    pair = Pair.read(oblique_files["fixed"], oblique_files["moving"])
    alone = registrar.register(pair, Options(steps=0, initial=path))
    alone.save(tmp_path / "out")
    found = sitk.ReadTransform(str(tmp_path / "out" / "transform.h5"))
    fixed = sitk.ReadImage(oblique_files["fixed"])
    for point in points_inside(fixed):
        assert np.allclose(found.TransformPoint(point), expected.TransformPoint(point), atol=2e-3)
    assert alone.quality["initial"] == {"kind": "file", "file": str(path)}
    assert alone.quality["inverse_error_mm"] < 0.05
    # a field file that we wrote is an initial transform, too; its steps go on from there
    further = registrar.register(pair, Options(steps=2, initial=tmp_path / "out" / "displacement.nii.gz"))
    assert further.quality["ncc_before"] == pytest.approx(alone.quality["ncc_after"], abs=0.02)
    assert further.quality["ncc_after"] > further.quality["ncc_before"]
    assert further.quality["inverse_error_mm"] < 0.05


def test_a_field_goes_on_beyond_its_edge_as_at_it(
    oblique_files: dict[str, str], registrar: Registrar, tmp_path: Path
) -> None:
    pair = Pair.read(oblique_files["fixed"], oblique_files["moving"])
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.tensor([6.0, -5.0, 4.0])
    alike = [registrar.register(pair, Options(steps=2, initial=matrix))]
    registrar.register(pair, Options(steps=0, initial=matrix)).save(tmp_path / "out")
    for name in ("transform.h5", "displacement.nii.gz"):  # known on the fixed image's grid, where ITK's fields end
        alike.append(registrar.register(pair, Options(steps=2, initial=tmp_path / "out" / name)))
        off = (alike[-1].displacement.as_tensor() - alike[0].displacement.as_tensor()).norm(dim=0)
        assert off.max() < 0.05
        assert alike[-1].quality["folded_percent"] == pytest.approx(alike[0].quality["folded_percent"], abs=0.01)
        assert alike[-1].quality["inverse_error_max_mm"] < alike[0].quality["inverse_error_max_mm"] + 0.1


def test_an_initial_transform_may_be_a_tensor_and_the_field_back_left_out(
    oblique_files: dict[str, str], registrar: Registrar
) -> None:
    pair = Pair.read(oblique_files["fixed"], oblique_files["moving"])
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.tensor([2.0, -1.0, 0.5])
    alone = registrar.register(pair, Options(steps=0, initial=matrix, inverse=False))
    expected = matrix[:3, 3].reshape(3, 1, 1, 1).float().expand_as(alone.displacement)
    torch.testing.assert_close(alone.displacement.as_tensor(), expected, rtol=0, atol=1e-4)
    assert alone.inverse_displacement is None
    assert not any("inverse" in key for key in alone.quality)
    assert alone.quality["initial"] == {"kind": "given"}


def test_bad_initial_transforms(oblique_files: dict[str, str], tmp_path: Path) -> None:
    fixed = read_volume(oblique_files["fixed"])
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
        (Path(oblique_files["moving"]), "expected"),
    ):
        with pytest.raises(InputError, match=words) as raised:
            read_transform(path, fixed)
        assert str(path) in str(raised.value)


def test_no_overlap_under_the_initial_transform(oblique_files: dict[str, str], demons: Path, tmp_path: Path) -> None:
    far = sitk.TranslationTransform(3, (500.0, 0.0, 0.0))
    sitk.WriteTransform(far, str(tmp_path / "far.tfm"))
    with pytest.raises(InputError, match="expected to overlap in space"):
        register(
            oblique_files["fixed"], oblique_files["moving"], initial=tmp_path / "far.tfm", bundle=demons, device="cpu"
        )
