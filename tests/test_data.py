from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import list_data_collate
from monai.transforms import Compose, RandAffined

from monai_rl_reg.data import evaluation_pairs, one_pair, read_cases, read_pairs, split_data
from monai_rl_reg.errors import InputError
from monai_rl_reg.pair_dataset import PairDataset
from monai_rl_reg.transforms import LoadCased, MovingToFixedGridd


def names(rows: list[dict[str, str]], key: str) -> list[str]:
    return [Path(row[key]).name for row in rows]


def test_pairs_are_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "pairs.csv").write_text("fixed,moving,fixed_label,note\na.nii.gz,../b.nii.gz,,x\n")
    assert read_pairs(tmp_path / "sub" / "pairs.csv") == [
        {"fixed": str(tmp_path / "sub" / "a.nii.gz"), "moving": str(tmp_path / "sub" / ".." / "b.nii.gz")}
    ]


def test_pairs_of_a_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes("\ufefffixed, moving\r\na.nii,b.nii\r\n".encode())
    assert names(read_pairs(tmp_path / "pairs.csv"), "moving") == ["b.nii"]


def test_validation_cases_are_left_out_of_training(cohort: Path) -> None:
    splits = split_data(dataset_dir=str(cohort), val_cases=["phantom_001", "phantom_004.nii.gz"])
    assert names(splits["training"], "image") == [f"phantom_{i:03d}.nii.gz" for i in (0, 2, 3, 5)]
    assert {*names(splits["validation"], "fixed")} == {"phantom_001.nii.gz", "phantom_004.nii.gz"}
    assert all(pair["fixed"] != pair["moving"] for pair in splits["validation"])


def test_cases_of_validation_pairs_are_left_out_of_training(cohort: Path, tmp_path: Path) -> None:
    images = cohort / "imagesTr"
    (tmp_path / "val.csv").write_text(
        f"fixed,moving\n{images}/../imagesTr/phantom_000.nii.gz,{images}/phantom_005.nii.gz\n"
    )
    splits = split_data(dataset_dir=str(cohort), val_pairs=str(tmp_path / "val.csv"))
    assert names(splits["training"], "image") == [f"phantom_{i:03d}.nii.gz" for i in (1, 2, 3, 4)]
    rows = "\n".join(f"{images}/phantom_00{i}.nii.gz,{images}/phantom_00{i + 1}.nii.gz" for i in range(5))
    (tmp_path / "train.csv").write_text(f"fixed,moving\n{rows}\n")
    splits = split_data(pairs=str(tmp_path / "train.csv"), val_pairs=str(tmp_path / "val.csv"))
    assert names(splits["training"], "fixed") == [f"phantom_{i:03d}.nii.gz" for i in (1, 2, 3)]


def test_rows_of_validation_cases_are_left_out_of_training(tmp_path: Path) -> None:
    rows = ["a1.nii,a2.nii", "a2.nii,b1.nii", "b1.nii,b2.nii", "c1.nii,b2.nii"]
    (tmp_path / "pairs.csv").write_text("\n".join(["fixed,moving", *rows]) + "\n")
    splits = split_data(pairs=str(tmp_path / "pairs.csv"), val_cases=["a1", "a2.nii"])
    assert names(splits["validation"], "fixed") == ["a1.nii"]
    assert names(splits["training"], "fixed") == ["b1.nii", "c1.nii"]
    with pytest.raises(InputError, match="found no row of a3"):
        split_data(pairs=str(tmp_path / "pairs.csv"), val_cases=["a1", "a3"])
    with pytest.raises(InputError, match="found no row with two of them"):
        split_data(pairs=str(tmp_path / "pairs.csv"), val_cases=["a1", "c1"])


def test_every_process_has_a_pair_to_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pairs.csv").write_text("fixed,moving\n" + "".join(f"a{i}.nii,b{i}.nii\n" for i in range(6)))
    (tmp_path / "val.csv").write_text("fixed,moving\nc.nii,d.nii\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(split_data(pairs=str(tmp_path / "pairs.csv"))["validation"]) == 2
    with pytest.raises(InputError, match=r"val\.csv: expected a validation pair for each of 2 processes, found 1"):
        split_data(pairs=str(tmp_path / "pairs.csv"), val_pairs=str(tmp_path / "val.csv"))


def test_evaluation_takes_its_pairs_first(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("fixed,moving\na.nii,b.nii\n")
    assert names(evaluation_pairs(pairs=str(tmp_path / "pairs.csv"), dataset_dir=str(cohort)), "fixed") == ["a.nii"]
    assert len(evaluation_pairs(dataset_dir=str(cohort))) == 2


def test_no_pair_given_registers_phantoms(tmp_path: Path) -> None:
    (pair,) = one_pair(phantom_dir=str(tmp_path))
    assert set(pair) == {"fixed", "moving", "fixed_label", "moving_label"}
    with pytest.raises(InputError, match="moving=None"):
        one_pair(fixed="a.nii.gz")


def dataset(cases: list[dict[str, str]], **settings: object) -> PairDataset:
    return PairDataset(cases, Compose([LoadCased()]), MovingToFixedGridd(), progress=False, **settings)  # type: ignore[arg-type]


def test_every_ordered_pair_of_cases_is_an_item(cohort: Path) -> None:
    pairs = dataset(read_cases(cohort), image_size="auto")
    assert len(pairs) == 30
    files = {(pairs[i]["fixed_file"], pairs[i]["moving_file"]) for i in range(len(pairs))}
    assert len(files) == 30
    assert all(fixed != moving for fixed, moving in files)
    shapes = {tuple(pairs[i]["image"].shape) for i in range(len(pairs))}
    assert shapes == {(2, 32, 32, 32)}
    assert pairs.num_classes == 5


def test_label_values_are_numbered_in_the_order_asked_for(cohort: Path) -> None:
    cases = read_cases(cohort)[:2]
    every, some = dataset(cases)[0]["label"], dataset(cases, labels=[4, 2])[0]["label"]
    assert torch.equal(some == 1, every == 4)
    assert torch.equal(some == 2, every == 2)
    assert torch.unique(some.as_tensor()).tolist() == [0, 1, 2]


def relabelled(cases: list[dict[str, str]], folder: Path, edit: dict[int, int]) -> list[dict[str, str]]:
    """Copies of two cases, the second with label values replaced."""
    image = nib.load(cases[1]["label"])
    data = np.asarray(image.dataobj).copy()
    for old, new in edit.items():
        data[data == old] = new
    path = folder / "label.nii.gz"
    nib.save(nib.Nifti1Image(data, image.affine), path)
    return [cases[0], cases[1] | {"label": str(path)}]


def test_labels_that_differ_are_refused_unless_named(cohort: Path, tmp_path: Path) -> None:
    cases = relabelled(read_cases(cohort), tmp_path, {3: 7})
    with pytest.raises(InputError, match="found 3, 7 in one only"):
        dataset(cases)
    assert dataset(cases, labels=[1, 2]).num_classes == 3


def test_one_label_in_twenty_may_be_missing(cohort: Path, tmp_path: Path) -> None:
    image = nib.load(read_cases(cohort)[0]["image"])
    parcels = np.arange(np.prod(image.shape)).reshape(image.shape) % 41
    cases = []
    for i, data in enumerate((parcels, np.where(parcels == 40, 0, parcels))):
        nib.save(nib.Nifti1Image(data.astype(np.uint8), image.affine), tmp_path / f"{i}.nii.gz")
        cases.append({"image": read_cases(cohort)[0]["image"], "label": str(tmp_path / f"{i}.nii.gz")})
    assert dataset(cases).num_classes == 41


def test_labels_of_some_cases_only_are_not_used(cohort: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = [dict(case) for case in read_cases(cohort)[:3]]
    del cases[1]["label"]
    with caplog.at_level(logging.WARNING):
        pairs = dataset(cases)
    assert "2 of 3 cases" in caplog.text
    assert "label" not in pairs[0]


def test_training_with_labels_wants_one_of_every_validation_case(cohort: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cohort, tmp_path / "cohort")
    bare = sorted((folder / "labelsTr").iterdir())[-1]
    bare.unlink()
    split = split_data(dataset_dir=str(folder))
    assert bare.name in str(split["training"])
    assert PairDataset(split["validation"], LoadCased(), MovingToFixedGridd()).structures == 4
    pairs = split_data(dataset_dir=str(folder), val_cases=[bare.name, "phantom_000"])["validation"]
    with pytest.raises(InputError, match=r"the 2 validation cases, found none for phantom_000.nii.gz, phantom_005"):
        PairDataset(pairs, LoadCased(), MovingToFixedGridd()).structures  # noqa: B018


def test_images_without_a_label_say_so_where_that_is_allowed(cohort: Path) -> None:
    cases = [dict(case) for case in read_cases(cohort)[:3]]
    del cases[1]["label"]
    pairs = dataset(cases, allow_unlabelled=True, image_size="auto")
    assert pairs.num_classes == 5
    for i in range(len(pairs)):
        fixed, moving = pairs[i]["label"].as_tensor()
        for label, file in ((fixed, pairs[i]["fixed_file"]), (moving, pairs[i]["moving_file"])):
            assert (label.min() < 0) == (file == cases[1]["image"])
    batch = list_data_collate([pairs[i] for i in range(len(pairs))])
    assert batch["label"].shape == batch["image"].shape
    assert not dataset([{"image": case["image"]} for case in cases], allow_unlabelled=True).labelled


class Recorded:
    """An augmentation that brightens by what it has counted, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def __call__(self, case: dict[str, Any]) -> dict[str, Any]:
        self.given.append(dict(case))
        return case | {"image": case["image"] + 1000 * len(self.given)}


def test_augmentation_is_made_anew_for_each_case_of_each_pair(cohort: Path) -> None:
    cases, augment = read_cases(cohort)[:2], Recorded()
    plain, augmented = dataset(cases)[0], dataset(cases, augment=augment)
    drawn = [augmented[0] for _ in range(2)]
    assert len(augment.given) == 4
    for item, (fixed, moving) in zip(drawn, ((1, 2), (3, 4)), strict=True):
        added = (item["image"] - plain["image"]).as_tensor()
        torch.testing.assert_close(added[0], torch.full_like(added[0], 1000 * fixed), rtol=0, atol=0.1)
        torch.testing.assert_close(added[1], torch.full_like(added[1], 1000 * moving), rtol=0, atol=0.1)
    assert torch.equal(augment.given[2]["image"], augment.given[0]["image"]), "the loaded case stays as it was"


def test_augmentation_is_given_the_image_and_its_label_if_it_has_one(cohort: Path) -> None:
    labelled = read_cases(cohort)[:2]
    for cases, keys in ((labelled, {"image", "label"}), ([{"image": case["image"]} for case in labelled], {"image"})):
        augment = Recorded()
        item = dataset(cases, augment=augment)[0]
        assert all(set(given) == keys for given in augment.given)
        assert ("label" in item) == ("label" in keys)


def affine_augmentation() -> RandAffined:
    """Rotations and shears of image and label alike; it writes what it did into their affines."""
    augment = RandAffined(
        ["image", "label"],
        prob=1.0,
        rotate_range=[0.5] * 3,
        shear_range=[0.2] * 6,
        mode="nearest",
        padding_mode="border",
    )
    augment.set_random_state(seed=0)
    return augment


def test_augmented_images_lie_where_the_originals_do(cohort: Path) -> None:
    cases = read_cases(cohort)[1:3]  # the second one is oblique
    plain, augmented = dataset(cases), dataset(cases, augment=affine_augmentation())
    for i in range(2):
        assert torch.equal(augmented[i]["image"].affine, plain[i]["image"].affine)
        assert augmented[i]["image"].shape == plain[i]["image"].shape
        assert not torch.allclose(augmented[i]["image"].as_tensor()[0], plain[i]["image"].as_tensor()[0])


def test_augmented_label_follows_its_image(cohort: Path, tmp_path: Path) -> None:
    cases = []
    for i, case in enumerate(read_cases(cohort)[:2]):  # the label as the image, too
        image = nib.load(case["label"])
        path = tmp_path / f"{i}.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float32), image.affine), path)
        cases.append({"image": str(path), "label": case["label"]})
    item, plain = dataset(cases, augment=affine_augmentation())[0], dataset(cases)[0]
    assert (item["label"] != plain["label"]).float().mean() > 0.05
    torch.testing.assert_close(item["image"][:1].as_tensor(), item["label"][:1].as_tensor().float(), rtol=0, atol=1e-3)


def test_one_validation_case_makes_no_pair(cohort: Path) -> None:
    with pytest.raises(InputError, match="expected at least two validation cases, to make pairs of"):
        split_data(dataset_dir=str(cohort), val_cases=["phantom_001"])


def test_validation_cases_as_a_command_line_has_them(cohort: Path) -> None:
    listed = split_data(dataset_dir=str(cohort), val_cases=["phantom_001", "phantom_004"])
    assert split_data(dataset_dir=str(cohort), val_cases="phantom_001, phantom_004.nii.gz") == listed


def test_labels_called_otherwise_than_their_images_are_not_passed_over(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "imagesTr").symlink_to(cohort / "imagesTr")
    (tmp_path / "labelsTr").mkdir()
    for label in (cohort / "labelsTr").iterdir():
        (tmp_path / "labelsTr" / f"label_{label.name}").symlink_to(label)
    with pytest.raises(InputError, match=r"found label_phantom_000.nii.gz and phantom_000.nii.gz"):
        read_cases(tmp_path)


@pytest.mark.parametrize("labels", [[7], 7, [0, 7]])
def test_labels_that_no_case_has_are_refused(labels: list[int] | int, cohort: Path) -> None:
    cases = read_cases(cohort)[:2]
    with pytest.raises(InputError, match="labels: expected one of 1, 2, 3, 4, found "):
        PairDataset(cases, LoadCased(), lambda item: item, labels=labels, progress=False)
    assert PairDataset(cases, LoadCased(), lambda item: item, labels=2, progress=False).labels == [2]
    assert PairDataset(cases, LoadCased(), lambda item: item, labels=[2, 7], progress=False).labels == [2, 7]
