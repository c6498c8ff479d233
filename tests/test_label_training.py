from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_atlases import cases_of

from monai_rl_reg import label_training
from monai_rl_reg.atlases import Case
from monai_rl_reg.checkpoints import structures_in, voxel_size_in
from monai_rl_reg.errors import InputError
from monai_rl_reg.label_training import Weights, split_cases, train
from monai_rl_reg.nifti import read_image, read_volume
from monai_rl_reg.policy_bundle import DEFAULT_BUNDLE

NAMES = {"a": 1, "b": 2, "c": 3, "d": 4}


def weights_in(folder: Path, *names: str) -> Weights:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.pt").touch()
    return Weights(folder)


def test_the_newest_weights_are_the_latest_and_one_can_go_back(tmp_path: Path) -> None:
    assert Weights(tmp_path / "none").names() == ["latest", "shipped"]
    assert Weights(tmp_path / "none").path() is None
    weights = weights_in(tmp_path, "20260101-120000", "20260102-120000")
    (tmp_path / "20260103-120000").mkdir()  # a training that was stopped before it had any
    assert weights.names() == ["latest", "20260102-120000", "20260101-120000", "shipped"]
    assert weights.path() == tmp_path / "20260102-120000" / "model.pt"
    assert weights.path("20260101-120000") == tmp_path / "20260101-120000" / "model.pt"
    assert weights.path("shipped") is None
    assert Weights(tmp_path, "own.pt").path("shipped") == Path("own.pt")
    assert Weights(tmp_path / "none", "own.pt").path() == Path("own.pt")
    with pytest.raises(InputError, match="weights monday: expected one of latest"):
        weights.path("monday")


def test_all_images_are_trained_on_and_labels_kept_back_to_validate(cohort: Path, tmp_path: Path) -> None:
    cases = cases_of(cohort, labelled=4)
    splits = split_cases(cases, tmp_path, NAMES)
    assert [row["image"] for row in splits["training"]] == [case.image for case in cases]
    assert sum("label" in row for row in splits["training"]) == 3
    kept_back = {pair["fixed_label"] for pair in splits["validation"]}
    assert len(kept_back) == 1
    assert not kept_back & {row.get("label") for row in splits["training"]}
    assert {pair["moving_label"] for pair in splits["validation"]} == {r["label"] for r in splits["training"][1:4]}


@pytest.mark.parametrize("labelled", [0, 1])
def test_without_two_labels_there_are_only_images(cohort: Path, tmp_path: Path, labelled: int) -> None:
    splits = split_cases(cases_of(cohort, labelled=labelled), tmp_path, NAMES)
    assert all(row.keys() == {"image"} for row in splits["training"])
    assert 0 < len(splits["validation"]) <= 10
    assert all(pair.keys() == {"fixed", "moving"} and pair["fixed"] != pair["moving"] for pair in splits["validation"])


def test_label_maps_with_other_values_are_renumbered(cohort: Path, tmp_path: Path) -> None:
    cases = cases_of(cohort, labelled=3)
    cases[1] = Case(cases[1].name, cases[1].image, cases[1].label, {"b": 1, "a": 2, "c": 3, "d": 4})
    splits = split_cases(cases, tmp_path, NAMES)
    changed = splits["training"][1]["label"]
    assert Path(changed).parent == tmp_path / "labels"
    assert splits["training"][2]["label"] == cases[2].label


def test_one_image_is_not_enough(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two images, found 1"):
        train(cases_of(cohort)[:1], NAMES, Weights(tmp_path))
    with pytest.raises(InputError, match="minutes"):
        train(cases_of(cohort), NAMES, Weights(tmp_path), minutes=0)


def test_weights_that_see_structures_are_not_trained_to_lose_them(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 2 labelled cases, found 1"):
        train(cases_of(cohort, labelled=1), NAMES, Weights(tmp_path))


def test_training_leaves_better_weights_and_figures(cohort: Path, tmp_path: Path) -> None:
    """A short training from scratch, half of the images labelled, in a copy of the bundle with small settings."""
    bundle = tmp_path / "bundle"
    shutil.copytree(DEFAULT_BUNDLE / "configs", bundle / "configs")
    overlay = json.loads((bundle / "configs" / "with_labels.json").read_text())
    (bundle / "configs" / "with_labels.json").write_text(json.dumps(overlay | {"steps": 1, "updates": 1, "unroll": 1}))
    weights, lines = Weights(tmp_path / "weights"), list[str]()
    stats = train(
        cases_of(cohort, labelled=3), NAMES, weights, minutes=0.05, bundle=bundle, device="cpu", tell=lines.append
    )
    assert (stats["images"], stats["labelled"], stats["learnt_from_labels"], stats["start"]) == (6, 3, True, "scratch")
    assert weights.stats() == json.loads(json.dumps(stats))
    assert stats["epoch"] == stats["total_epochs"] >= 1
    assert stats["eval"]["key_metric_name"] == "dice"
    assert stats["best_metric"] >= stats["metrics_before"]["dice"]
    assert "train/dice" in stats["train"]["metrics"]
    assert "train/anatomy" in stats["train"]["metrics"]
    assert lines[0].startswith("0 %, epoch 0: dice")
    path = weights.path()
    assert path is not None
    assert structures_in(str(path)) == 4
    again = train(
        cases_of(cohort, labelled=3), NAMES, weights, minutes=0.001, bundle=bundle, device="cpu", tell=lines.append
    )
    assert again["start"] == str(path)
    assert again["metrics_before"]["dice"] == pytest.approx(stats["best_metric"], abs=2e-3)
    assert all(torch.isfinite(torch.tensor(value)) for value in again["eval"]["metrics"].values())


def test_large_images_are_trained_on_with_larger_voxels(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_training, "MOST_VOXELS", 3000)
    weights, lines = Weights(tmp_path / "weights"), list[str]()
    cases = cases_of(cohort, labelled=0)[:3]
    train(cases, {}, weights, minutes=0.001, start="scratch", device="cpu", tell=lines.append)
    size = voxel_size_in(str(weights.path()))
    before = read_image(max((case.image for case in cases), key=lambda path: Path(path).stat().st_size))
    assert size is not None
    assert min(size) > 1.2
    assert before.numel() / float(torch.tensor(size).prod()) == pytest.approx(3000, rel=0.2)  # of 1 mm each
    assert lines[0].startswith("large images: training with voxels of")


def test_labels_of_other_names_are_not_learnt(cohort: Path, tmp_path: Path) -> None:
    cases = [replace(case, values={"one": 1, "other": 2}) for case in cases_of(cohort)[:4]]
    cases[0] = replace(cases[0], values={"other": 1})
    splits = split_cases(cases, tmp_path, {"one": 1})
    files = {row["label"] for row in splits["training"] if "label" in row}
    files |= {pair[f"{role}_label"] for pair in splits["validation"] for role in ("fixed", "moving")}
    assert len(files) == 3
    assert not files & {case.label for case in cases}
    for file in files:
        assert read_volume(file).unique().tolist() == [0, 1]
