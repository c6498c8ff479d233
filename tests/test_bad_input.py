"""Everything that can be wrong with the input: one sentence that names the file, and nothing half-written."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
from conftest import CONFIGS, SMALL, run_bundle

from monai_rl_reg.errors import InputError, find_input_error
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.phantoms import make_case

Files = dict[str, Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A good pair with labels, and good weights for it; each test spoils one of them."""
    folder = tmp_path / "input"
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    files = {}
    for role in ("fixed", "moving"):
        image, label, affine = make_case(random, size=20)
        for name, data in ((role, image), (f"{role}_label", label)):
            files[name] = folder / f"{name}.nii.gz"
            nib.save(nib.Nifti1Image(data[0].numpy(), affine.numpy()), files[name])
    files["ckpt"] = folder / "model.pt"
    network = PlannerActor(3, 2, 3, channels=(16, 32, 64, 64), plan_channels=64, action_bound=2.5, action_stride=2)
    torch.save(network.state_dict(), files["ckpt"])
    return files


def test_an_exception_that_is_its_own_cause_is_looked_at_once() -> None:
    error = KeyError("a defect")
    error.__cause__ = error
    assert find_input_error(error) is None


def failure(run_id: str, *configs: str, **overrides: object) -> str:
    """Run the bundle in this process and return the sentence that it ends with."""
    names = [str(CONFIGS / f"{name}.json") for name in configs]
    settings = {key: value if isinstance(value, (int, float, list)) else str(value) for key, value in overrides.items()}
    with pytest.raises(Exception) as raised:  # noqa: PT011 - MONAI wraps what its transforms and configs raise
        monai.bundle.run(run_id, config_file=names, initialize=[], **settings)
    error = find_input_error(raised.value)
    assert error is not None, repr(raised.value)
    return str(error)


def change(path: Path, edit: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    """Rewrite an image after editing its voxels."""
    image = nib.load(path)
    data = edit(np.asarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(data, image.affine if affine is None else affine), path)


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def text(path: Path) -> None:
    path.write_text("not an image\n")


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def four_dimensions(path: Path) -> None:
    change(path, lambda data: np.stack([data, data], axis=-1))


def not_a_number(path: Path) -> None:
    change(path, lambda data: np.where(data > data.mean(), np.nan, data))


def infinite(path: Path) -> None:
    change(path, lambda data: np.where(data == data.max(), np.inf, data))


def constant(path: Path) -> None:
    change(path, lambda data: np.full_like(data, 7))


def no_label(path: Path) -> None:
    change(path, np.zeros_like)


def fractions(path: Path) -> None:
    change(path, lambda data: data.astype(np.float32) * 0.3)


def other_grid(path: Path) -> None:
    change(path, lambda data: data[1:])


def other_affine(path: Path) -> None:
    change(path, lambda data: data, nib.load(path).affine + np.diag([0, 0, 0.5, 0]))


def lone_value(path: Path) -> None:
    change(path, lambda data: np.where(data == 4, 9, data))


def singular(path: Path) -> None:
    image = nib.load(path)
    image.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
    image.header.set_qform(None, code=0)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)


def far_away(path: Path) -> None:
    affine = nib.load(path).affine.copy()
    affine[:3, 3] += 500
    change(path, lambda data: data, affine)


@pytest.mark.parametrize(
    ("role", "spoil", "words"),
    [
        ("moving", missing, "expected a file, found none"),
        ("fixed_label", missing, "expected a file, found none"),
        ("moving", truncated, "cannot"),
        ("moving", text, "cannot"),
        ("fixed", empty_file, "cannot"),
        ("moving", four_dimensions, "expected 3 dimensions, found shape"),
        ("fixed", not_a_number, "expected finite voxels"),
        ("moving", infinite, "expected finite voxels"),
        ("moving", constant, "expected an image with contrast"),
        ("moving_label", no_label, "expected at least one labelled voxel"),
        ("moving_label", fractions, "expected whole numbers"),
        ("moving_label", other_grid, "expected the grid of its image"),
        ("fixed_label", other_affine, "expected the grid of its image"),
        ("moving_label", lone_value, "expected the same label values in both, found 4, 9 in one only"),
        ("moving", singular, "expected an invertible affine"),
        ("ckpt", missing, "expected a file, found none"),
        ("ckpt", text, "expected a checkpoint"),
    ],
)
def test_bad_file(role: str, spoil: Callable[[Path], None], words: str, files: Files, tmp_path: Path) -> None:
    spoil(files[role])
    sentence = failure("run", "inference", output_dir=tmp_path / "out", **files)
    assert words in sentence
    assert str(files[role]) in sentence
    assert "\n" not in sentence
    assert not (tmp_path / "out").exists()


def test_no_overlap_in_space(files: Files, tmp_path: Path) -> None:
    for role in ("moving", "moving_label"):
        far_away(files[role])
    sentence = failure("run", "inference", output_dir=tmp_path / "out", **files)
    assert "expected to overlap in space" in sentence
    assert str(files["moving"]) in sentence
    assert str(files["fixed"]) in sentence


def test_checkpoint_of_another_architecture(files: Files, tmp_path: Path) -> None:
    torch.save(PlannerActor(3, 2, 3, channels=(4, 8), action_stride=2).state_dict(), files["ckpt"])
    sentence = failure("run", "inference", output_dir=tmp_path / "out", **files)
    assert "found another architecture" in sentence
    assert str(files["ckpt"]) in sentence


def test_one_image_alone(files: Files, tmp_path: Path) -> None:
    sentence = failure("run", "inference", fixed=files["fixed"], ckpt=files["ckpt"], output_dir=tmp_path / "out")
    assert "expected a fixed and a moving image" in sentence


def test_unknown_alignment(files: Files, tmp_path: Path) -> None:
    sentence = failure("run", "inference", output_dir=tmp_path / "out", align="middle", **files)
    assert "expected one of auto, world, centre, found 'middle'" in sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected a CSV file, found none"),
        ("a,b\n1,2\n", "expected the columns fixed and moving, found a, b"),
        ("fixed,moving\n", "expected at least one row"),
        ("", "expected the columns fixed and moving, found none"),
        ("fixed,moving\na.nii.gz,\n", "line 2: expected a fixed and a moving path"),
        ("fixed,moving\na.nii.gz,b.nii.gz\n", "expected a file, found none"),
    ],
)
def test_bad_pairs_file(content: str | None, words: str, files: Files, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    if content is not None:
        pairs.write_text(content)
    out = tmp_path / "out"
    sentence = failure("evaluating", "train", "evaluate", pairs=pairs, ckpt=files["ckpt"], output_dir=out)
    assert words in sentence
    assert str(tmp_path) in sentence
    assert not out.exists()


def test_a_bad_pair_leaves_no_table(files: Files, tmp_path: Path) -> None:
    roles = ["fixed", "moving", "fixed_label", "moving_label"]
    bad = tmp_path / "bad.nii.gz"
    bad.write_text("not an image")
    rows = [{role: files[role] for role in roles}, {role: files[role] for role in roles} | {"moving": bad}]
    with open(tmp_path / "pairs.csv", "w") as file:
        writer = csv.DictWriter(file, roles)
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / "out"
    sentence = failure(
        "evaluating", "train", "evaluate", pairs=tmp_path / "pairs.csv", ckpt=files["ckpt"], output_dir=out
    )
    assert str(bad) in sentence
    assert not out.exists()


def test_folder_without_images(tmp_path: Path) -> None:
    sentence = failure("training", "train", dataset_dir=tmp_path, output_dir=tmp_path / "out", **SMALL)
    assert "expected a folder with imagesTr" in sentence
    assert str(tmp_path) in sentence


def test_validation_case_that_is_not_there(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sentence = failure("training", "train", dataset_dir=cohort, val_cases=["phantom_99"], output_dir=out, **SMALL)
    assert "expected the validation cases phantom_99" in sentence


def test_replay_that_does_not_fit(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1_000_000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    sentence = failure("training", "train", dataset_dir=cohort, output_dir=tmp_path / "out", **SMALL)
    assert "1,000,000 are available" in sentence
    assert "needs" in sentence


def test_labels_asked_for_in_the_loss_and_not_there(files: Files, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(f"fixed,moving\n{files['fixed']},{files['moving']}\n")
    sentence = failure("training", "train", pairs=pairs, dice_weight=1.0, output_dir=tmp_path / "out", **SMALL)
    assert "expected labels in training" in sentence


def test_output_folder_that_is_a_file(files: Files, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    result = run_bundle("run", "inference", output_dir=tmp_path / "out", **files)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: output {tmp_path / 'out'}")


def test_training_into_a_folder_that_is_a_file(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    result = run_bundle("training", "train", dataset_dir=cohort, output_dir=tmp_path / "out", **SMALL)
    assert result.returncode == 1
    assert f"error: output {tmp_path / 'out'}" in result.stderr


def test_the_command_line_shows_the_sentence_alone(files: Files, tmp_path: Path) -> None:
    missing(files["moving"])
    result = run_bundle("run", "inference", output_dir=tmp_path / "out", **files)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == f"error: image {files['moving']}: expected a file, found none"
    assert "Traceback" not in result.stderr


def test_find_input_error_looks_through_what_wraps_it() -> None:
    outside = RuntimeError("outside")
    outside.__cause__ = InputError("inside")
    assert str(find_input_error(outside)) == "inside"
    assert find_input_error(ValueError("another")) is None
