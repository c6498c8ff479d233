"""Digits, their pairs, and the commands of their bundle."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from monai.networks.blocks import Warp
from PIL import Image

from monai_rl_reg.digits import DigitPairs, Digits, ink_masks, one_pair, read_digit, read_digits, split_digits
from monai_rl_reg.errors import InputError
from monai_rl_reg.networks import PlannerActor

pytest.importorskip("sklearn")

CONFIGS = ROOT / "bundles" / "rl_digits" / "configs"
SMALL = {
    "max_epochs": 2,
    "epoch_length": 2,
    "val_interval": 1,
    "val_pairs": 4,
    "batch_size": 4,
    "steps": 2,
    "val_steps": 2,
    "updates": 2,
    "update_batch_size": 4,
}


def run_bundle(run_id: str, *configs: str, **overrides: object) -> subprocess.CompletedProcess[str]:
    files = str([str(CONFIGS / f"{name}.json") for name in configs])
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", files]
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600)


def bar(column: int, *, brightness: int = 200, size: int = 28) -> np.ndarray:
    """An upright stroke with one soft edge."""
    picture = np.zeros((size, size), dtype=np.uint8)
    picture[4:-4, column : column + 3] = brightness
    picture[4:-4, column + 3] = brightness // 4
    return picture


def numbered(count: int, classes: int = 3) -> Digits:
    """Digits whose brightest pixel is at the column of their number."""
    images = torch.stack([torch.from_numpy(bar(4 + i % 16)) for i in range(count)])
    return Digits(images, torch.arange(count) % classes, [str(i) for i in range(count)], "of a test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of five pictures."""
    root = tmp_path_factory.mktemp("classes")
    for digit in range(3):
        (root / str(digit)).mkdir()
        for i in range(5):
            Image.fromarray(bar(4 + 6 * digit + i)).save(root / str(digit) / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short training on scikit-learn's digits."""
    output = tmp_path_factory.mktemp("digits") / "run"
    result = run_bundle("training", "train", output_dir=output, **SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "validation: dice_before 0." in result.stdout
    return output


def test_npz_is_read_as_it_is(tmp_path: Path) -> None:
    images = np.stack([bar(i) for i in (4, 9, 14)])
    np.savez(tmp_path / "digits.npz", images=images, labels=np.array([7, 1, 7], dtype=np.uint8))
    digits = read_digits(tmp_path / "digits.npz")
    assert digits.images.equal(torch.from_numpy(images))
    assert digits.classes.tolist() == [7, 1, 7]


def test_folder_gives_one_of_each_class_in_turn(folder: Path) -> None:
    digits = read_digits(folder)
    assert digits.classes.tolist() == [0, 1, 2] * 5
    assert digits.names[:4] == ["0/0.png", "1/0.png", "2/0.png", "0/1.png"]
    assert digits.images[4].numpy().tolist() == bar(4 + 6 + 1).tolist()


def test_last_sixth_is_held_out(tmp_path: Path) -> None:
    images = np.stack([bar(4 + i % 16) for i in range(60)])
    np.savez(tmp_path / "digits.npz", images=images, labels=np.arange(60) % 10)
    parts = split_digits(tmp_path / "digits.npz")
    assert (len(parts["training"].images), len(parts["validation"].images)) == (50, 10)
    assert parts["validation"].names[0] == "00050"


def test_digits_without_a_source_are_scikit_learns() -> None:
    digits = read_digits()
    assert digits.images.shape == (1797, 28, 28)
    assert digits.classes.unique().tolist() == list(range(10))
    share = (digits.images > 127).float().mean()
    assert 0.1 < share < 0.25, "strokes, not blots"
    assert int(digits.images[:, [0, -1]].max()) == 0


def test_pairs_are_of_different_classes_and_training_draws_them_anew() -> None:
    pairs = DigitPairs(numbered(30))
    first, second = ([pairs[i]["name"] for i in range(30)] for _ in range(2))
    assert first != second
    for name in first:
        moving, fixed = (int(part.split("(")[1][0]) for part in name.split(" to "))
        assert moving != fixed


def test_evaluation_pairs_are_the_same_whatever_was_drawn_before() -> None:
    first = [item["name"] for item in (DigitPairs(numbered(30), 20)[i] for i in range(20))]
    torch.rand(7)
    assert [item["name"] for item in (DigitPairs(numbered(30), 20)[i] for i in range(20))] == first
    assert [item["name"] for item in (DigitPairs(numbered(30), 20, seed=1)[i] for i in range(20))] != first


def test_item_is_fixed_beside_moving_with_nested_ink() -> None:
    digits = numbered(2, classes=2)
    item = DigitPairs(digits)[0]
    assert item["image"].max() == 1
    assert item["image"][0].argmax() == digits.images[0].argmax()
    assert item["image"][1].argmax() == digits.images[1].argmax()
    core, ink = (item["label"] >= 2, item["label"] >= 1)
    assert core.equal(item["image"] > 0.5)
    assert ink.equal(item["image"] > 0)
    assert 0 < core.sum() < ink.sum()


def test_ink_masks_of_an_image() -> None:
    masks = ink_masks(torch.tensor([[[0.0, 0.2, 0.5, 0.9]]]))
    assert masks.tolist() == [[[0, 1, 1, 1]], [[0, 0, 0, 1]]]


def test_ink_on_paper_is_inverted_and_any_size_is_taken(tmp_path: Path) -> None:
    Image.fromarray(255 - bar(40, size=112)[:, 10:90]).save(tmp_path / "paper.png")
    picture = read_digit(tmp_path / "paper.png")
    assert picture.shape == (28, 28)
    assert int(picture[14].argmax()) == pytest.approx((40 - 10 + 16 + 1.5) / 4, abs=1)
    assert int(picture[:, 0].max()) == 0


@pytest.mark.parametrize("noise", [0, 6])
def test_paper_that_is_not_white_is_no_ink(noise: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    paper = 240 + generator.integers(-noise, noise + 1, (40, 40))
    paper[10:30, 18:22] = 30
    Image.fromarray(paper.astype(np.uint8)).save(tmp_path / "paper.png")
    digit = read_digit(tmp_path / "paper.png")
    ink = ink_masks(digit[None] / 255)[0]
    assert 0.04 < float(ink.mean()) < 0.12  # 0.05 of it is drawn, and its edges spread by a pixel
    assert int(digit.max()) > 200


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "no.npz").write_text("not an archive")
    np.savez(tmp_path / "keys.npz", x=np.zeros(3))
    np.savez(tmp_path / "size.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(3, int))
    np.savez(tmp_path / "labels.npz", images=np.zeros((3, 28, 28), np.uint8), labels=np.zeros(2, int))
    np.savez(tmp_path / "one.npz", images=np.stack([bar(4)] * 12), labels=np.zeros(12, int))
    Image.fromarray(np.full((28, 28), 7, np.uint8)).save(tmp_path / "flat.png")
    (tmp_path / "empty").mkdir()
    cases = [
        ("missing.npz", "expected a .npz file or a folder, found none"),
        ("no.npz", "found a file that is not one"),
        ("keys.npz", "expected arrays images and labels, found x"),
        ("size.npz", r"expected images \(N, 28, 28\) uint8, found \(3, 8, 8\)"),
        ("labels.npz", r"expected 3 whole numbers as labels, found \(2,\)"),
        ("one.npz", "expected at least two classes for training, found 1"),
        ("empty", "expected a folder of pictures for each class, found 0"),
    ]
    for name, message in cases:
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            split_digits(tmp_path / name)
    with pytest.raises(InputError, match=r"flat\.png: expected ink on a ground"):
        read_digit(tmp_path / "flat.png")
    with pytest.raises(InputError, match="expected a fixed and a moving picture"):
        one_pair(fixed=folder / "0" / "0.png")


def test_policy_has_at_most_50_thousand_parameters_and_a_plan_of_7_by_7() -> None:
    for name in ("train", "inference"):
        parser = ConfigParser(ConfigParser.load_config_file(str(CONFIGS / f"{name}.json")))
        network: PlannerActor = parser.get_parsed_content("network_def")
        assert sum(parameter.numel() for parameter in network.parameters()) <= 50_000
        assert network.draw(torch.rand(1, 2, 28, 28))[0].shape == (1, 1, 7, 7)


def test_training_leaves_checkpoints_weights_and_logs(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"checkpoint_epoch=2.pt", "checkpoint_final.pt", "model.pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_training_resumes(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "checkpoint_final.pt").write_bytes((trained / "checkpoint_final.pt").read_bytes())
    settings = SMALL | {"max_epochs": 3, "output_dir": output, "resume": True}
    result = run_bundle("training", "train", **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"Resuming from {output}" in result.stdout
    assert torch.load(output / "checkpoint_final.pt", weights_only=True)["trainer"]["iteration"] == 6


def test_control_trains_on_a_folder_for_a_time(folder: Path, tmp_path: Path) -> None:
    settings = SMALL | {"max_epochs": 1000, "minutes": 0.01, "steps": 1, "val_steps": 1, "reinforcement": "false"}
    result = run_bundle("training", "train", dataset_dir=folder, output_dir=tmp_path / "run", **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint_final.pt", weights_only=True)
    assert checkpoint["trainer"]["iteration"] < 1000
    assert checkpoint["time"]["elapsed"] >= 0.01


def test_evaluating_writes_both_models(trained: Path, tmp_path: Path) -> None:
    settings = {"ckpt": trained / "model.pt", "control_ckpt": trained / "model.pt", "val_pairs": 4, "val_steps": 3}
    result = run_bundle("evaluating", "train", "evaluate", output_dir=tmp_path, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "model", "steps", "dice_half", "dice_ink", "folded_percent", "seconds"]
    assert [(r["model"], r["steps"]) for r in rows[::4]] == [*(("policy", str(i)) for i in range(4)), *CONTROL]
    summary = json.loads((tmp_path / "summary.json").read_text())
    last = [float(row["dice_ink"]) for row in rows if (row["model"], row["steps"]) == ("policy", "3")]
    assert summary["policy"]["dice_ink"][3] == pytest.approx(sum(last) / 4, rel=1e-4)
    start, one_step = zip(summary["policy"]["dice_half"], summary["control"]["dice_half"], strict=False)
    assert start[0] == start[1]
    assert one_step[0] != one_step[1], "the same weights, but the control's one step may be ten times as large"


CONTROL = [("control", "0"), ("control", "1")]


def test_inference_writes_moved_displacement_and_steps(trained: Path, folder: Path, tmp_path: Path) -> None:
    files = {"fixed": folder / "0" / "0.png", "moving": folder / "1" / "0.png"}
    result = run_bundle("run", "inference", ckpt=trained / "model.pt", output_dir=tmp_path, steps=4, **files)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"moved.png", "displacement.npy", "steps.png"}
    displacement = torch.from_numpy(np.load(tmp_path / "displacement.npy"))
    assert displacement.shape == (2, 28, 28)
    assert displacement.abs().max() > 0
    moving = torch.from_numpy(bar(10)).float()[None, None] / 200
    moved = np.asarray(Image.open(tmp_path / "moved.png").convert("L"), dtype=np.float32) / 255
    expected = Warp("bilinear", "border")(moving, displacement[None])[0, 0].numpy()
    np.testing.assert_allclose(moved, expected, atol=1 / 255)
    assert Image.open(tmp_path / "steps.png").width > 6 * 28


def test_inference_without_files_morphs_two_digits(trained: Path, tmp_path: Path) -> None:
    result = run_bundle("run", "inference", ckpt=trained / "model.pt", output_dir=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "a 3 of scikit-learn's digits into a 0" in result.stdout
    assert (tmp_path / "steps.png").is_file()


@pytest.mark.parametrize(("config", "kind"), [("train", "train"), ("inference", "infer")])
def test_monai_finds_the_properties_it_requires(config: str, kind: str, tmp_path: Path) -> None:
    workflow = ConfigWorkflow(str(CONFIGS / f"{config}.json"), workflow_type=kind, output_dir=str(tmp_path / "out"))
    workflow.parser["initialize"] = []
    workflow.initialize()
    assert workflow.check_properties() == []


def test_monai_verifies_the_metadata(tmp_path: Path) -> None:
    # the schema lives on the network: what it requires, as of 20240725
    required = ["version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task"]
    required += ["description", "authors", "copyright", "network_data_format"]
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": required}))
    pytest.importorskip("jsonschema")
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(schema), create_dir=False)


def test_monai_verifies_and_exports_the_network(trained: Path, tmp_path: Path) -> None:
    files = {"meta_file": str(CONFIGS / "metadata.json"), "config_file": str(CONFIGS / "inference.json")}
    verify_net_in_out(net_id="network_def", device="cpu", **files)
    exported, ckpt = tmp_path / "model.ts", str(trained / "model.pt")
    ckpt_export(net_id="network_def", filepath=str(exported), ckpt_file=ckpt, key_in_ckpt="network", **files)
    assert torch.jit.load(exported)(torch.rand(1, 2, 28, 28)).shape == (1, 2, 28, 28)
