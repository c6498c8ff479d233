"""Registration inside a MONAI pipeline: what follows finds the moved images on the fixed one's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, ConcatItemsd, LoadImaged, Orientationd, SaveImaged

from monai_rl_reg import Registerd, Registration
from monai_rl_reg.errors import InputError
from monai_rl_reg.request import Options

KEYS = ("fixed", "moving", "fixed_label", "moving_label")


@pytest.fixture(scope="module")
def settings(demons: Path) -> dict[str, Any]:
    return {
        "keys": "moving",
        "fixed": "fixed",
        "labels": "moving_label",
        "fixed_label": "fixed_label",
        "options": Options(steps=4, inverse=False),
        "bundle": demons,
        "device": "cpu",
    }


@pytest.fixture
def files(oblique_files: dict[str, str]) -> dict[str, str]:
    return {key: oblique_files[key] for key in KEYS}


def test_it_does_what_register_does(
    settings: dict[str, Any], files: dict[str, str], registration: Registration
) -> None:
    loaded = LoadImaged(KEYS, ensure_channel_first=True)(files)
    data = Registerd(**settings)(loaded)
    assert torch.equal(data["moving"].as_tensor(), registration.moved.as_tensor())
    assert registration.moved_label is not None
    assert torch.equal(data["moving_label"].as_tensor(), registration.moved_label.as_tensor())
    assert torch.equal(data["moving_displacement"].as_tensor(), registration.displacement.as_tensor())
    assert data["moving_quality"]["dice_after"] == registration.quality["dice_after"]
    assert data["fixed"] is loaded["fixed"]
    assert data["fixed"].meta["filename_or_obj"] == files["fixed"]
    assert data["moving"].meta["filename_or_obj"] == files["moving"]
    assert loaded["moving"].shape != data["moving"].shape == data["fixed"].shape


def test_paths_are_read(settings: dict[str, Any], files: dict[str, str], registration: Registration) -> None:
    data = Registerd(**settings)(files)
    assert torch.equal(data["moving"].as_tensor(), registration.moved.as_tensor())
    assert np.allclose(data["moving"].affine, nib.load(files["fixed"]).affine)
    assert data["moving"].meta["filename_or_obj"] == files["moving"]


def test_in_a_pipeline_and_in_workers(settings: dict[str, Any], files: dict[str, str], tmp_path: Path) -> None:
    written = ("fixed", "moving", "moving_label")
    transform = Compose(
        [
            LoadImaged(KEYS, ensure_channel_first=True),
            Orientationd(KEYS, "PIR", labels=None),
            Registerd(**settings),
            SaveImaged(written, output_dir=tmp_path, output_postfix="", separate_folder=False, print_log=False),
            ConcatItemsd(("fixed", "moving"), "image"),
        ]
    )
    (batch,) = DataLoader(Dataset([files], transform), batch_size=1, num_workers=1)
    assert batch["image"].shape[1] == 2
    assert float(batch["moving_quality"]["dice_after"]) > 0.5
    fixed, moving, label = (nib.load(tmp_path / Path(files[key]).name) for key in written)
    assert fixed.shape == moving.shape == label.shape != nib.load(files["fixed"]).shape
    assert np.array_equal(fixed.affine, moving.affine)
    assert np.array_equal(fixed.affine, label.affine)
    assert set(np.unique(label.dataobj)) <= {0, 1, 2, 7}


def test_several_images_move_to_one_and_may_be_missing(settings: dict[str, Any], files: dict[str, str]) -> None:
    several = {**settings, "keys": ("moving", "other", "none"), "labels": ("moving_label", None, None)}
    data = files | {"other": files["moving"]}
    with pytest.raises(KeyError, match="none"):
        Registerd(**several)(data)
    moved = Registerd(**several, allow_missing_keys=True)(data)
    assert torch.equal(moved["other"], moved["moving"])
    assert set(moved) == {
        *data,
        *(f"{key}_{what}" for key in ("moving", "other") for what in ("displacement", "quality")),
    }


def test_an_image_without_a_name_does_not_take_the_fixed_ones(settings: dict[str, Any], files: dict[str, str]) -> None:
    loaded = LoadImaged(KEYS, ensure_channel_first=True)(files)
    loaded["moving"].meta.pop("filename_or_obj")
    data = Registerd(**settings)(loaded)
    assert "filename_or_obj" not in data["moving"].meta
    assert data["moving_label"].meta["filename_or_obj"] == files["moving_label"]


def test_every_image_has_a_label_of_its_own(settings: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"a label, or None, for each of \('moving', 'other'\), got \('moving_label',\)"
    ):
        Registerd(**{**settings, "keys": ("moving", "other")})


def test_what_is_wrong_is_said(settings: dict[str, Any], files: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"moving image gone\.nii\.gz: expected a file, found none"):
        Registerd(**settings)(files | {"moving": "gone.nii.gz"})
