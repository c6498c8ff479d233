"""The bundle's commands as a user runs them, and MONAI's own checks of a bundle."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, ROOT, SMALL, bundle_command, run_bundle
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from monai.data import MetaTensor

from monai_rl_reg.bundle_command import bundle_folder
from monai_rl_reg.checkpoints import structures_in
from monai_rl_reg.resuming import latest_checkpoint

COLUMNS = ["fixed", "moving", "dice_before", "dice", "folded_percent", "sdlogj", "hd95_mm", "seconds"]


def write_pairs(path: Path, cohort: Path, *names: tuple[str, str], labels: bool = True) -> Path:
    rows = ["fixed,moving" + (",fixed_label,moving_label" if labels else "")]
    for fixed, moving in names:
        row = [f"{cohort}/imagesTr/{name}.nii.gz" for name in (fixed, moving)]
        row += [f"{cohort}/labelsTr/{name}.nii.gz" for name in (fixed, moving)] if labels else []
        rows.append(",".join(row))
    path.write_text("\n".join(rows) + "\n")
    return path


def test_training_leaves_checkpoints_weights_and_logs(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"checkpoint_epoch=1.pt", "checkpoint_final.pt", "model.pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.startswith("tmp") for name in names)


def test_training_shows_validation_dice(cohort: Path, tmp_path: Path) -> None:
    result = run_bundle("run", "train", dataset_dir=cohort, output_dir=tmp_path / "run", **SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "validation: dice_before 0." in result.stdout
    assert f"Output folder: {tmp_path / 'run'}" in result.stdout


def test_training_again_keeps_the_earlier_run(cohort: Path, tmp_path: Path) -> None:
    for _ in range(2):
        result = run_bundle("training", "train", dataset_dir=cohort, output_dir=tmp_path / "run", **SMALL)
        assert result.returncode == 0, result.stderr[-3000:]
    assert len(list(tmp_path.glob("run*/model.pt"))) == 2


@pytest.mark.parametrize("overrides", [{"reinforcement": False}, {"dice_reward": False}, {"dice_weight": 1.0}])
def test_training_variants(overrides: dict[str, object], cohort: Path, tmp_path: Path) -> None:
    settings = SMALL | {"dataset_dir": cohort, "output_dir": tmp_path / "run"} | overrides
    result = run_bundle("training", "train", **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoint_final.pt").is_file()


def test_training_without_labels(cohort: Path, tmp_path: Path) -> None:
    names = [f"phantom_{i:03d}" for i in range(6)]
    pairs = write_pairs(tmp_path / "pairs.csv", cohort, *pairwise(names), labels=False)
    result = run_bundle("training", "train", pairs=pairs, output_dir=tmp_path / "run", **SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "model.pt").is_file()


def test_training_with_labels_leaves_what_has_learnt_to_see_them(trained: Path, trained_with_labels: Path) -> None:
    for name in ("model.pt", "checkpoint_final.pt"):
        assert structures_in(str(trained_with_labels / name)) == 4
        assert structures_in(str(trained / name)) == 0


def test_training_with_labels_resumes(trained_with_labels: Path, cohort: Path, tmp_path: Path) -> None:
    output = shutil.copytree(trained_with_labels, tmp_path / "run")
    settings = SMALL | {"max_epochs": 2, "dataset_dir": cohort, "output_dir": output, "resume": True}
    blank = torch.load(output / "model.pt", weights_only=True)
    blank["network"] = {key: torch.zeros_like(value) for key, value in blank["network"].items()}
    torch.save(blank, tmp_path / "blank.pt")  # what the run began with has no say any more
    result = run_bundle("training", "train", "with_labels", start=tmp_path / "blank.pt", **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (
        torch.load(folder / "checkpoint_final.pt", weights_only=True) for folder in (trained_with_labels, output)
    )
    assert second["trainer"]["iteration"] == 2 * first["trainer"]["iteration"]
    moved = [key for key, value in first["anatomy"].items() if not torch.equal(value, second["anatomy"][key])]
    assert moved
    for key, value in first["network"].items():
        torch.testing.assert_close(second["network"][key], value, atol=0.05, rtol=0)
    assert second["optimizer"]["param_groups"][-1]["params"]


def test_anatomy_trained_first_stays_as_it_is_beside_the_policy(cohort: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "anatomy", tmp_path / "policy"
    settings = SMALL | {"dataset_dir": cohort}
    result = run_bundle("training", "train", "with_labels", "anatomy", output_dir=first, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "dice" in result.stderr
    seen = torch.load(first / "model.pt", weights_only=True)
    settings |= {"anatomy_ckpt": first / "model.pt", "output_dir": second}
    result = run_bundle("training", "train", "with_labels", **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    trained = torch.load(second / "model.pt", weights_only=True)
    assert all(torch.equal(value, trained["anatomy"][key]) for key, value in seen.items())


def test_evaluating_a_model_that_sees_structures(cohort: Path, trained_with_labels: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.csv", cohort, ("phantom_000", "phantom_001"))
    settings = {"pairs": pairs, "ckpt": trained_with_labels / "model.pt", "output_dir": tmp_path / "out"}
    result = run_bundle("evaluating", "train", "evaluate", val_steps=2, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 < summary["dice_before"] < 1
    assert 0 < summary["dice"] < 1


@pytest.mark.parametrize("model", ["trained", "trained_with_labels"])
def test_inference_follows_its_model(model: str, cohort: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fixed, moving = (cohort / "imagesTr" / f"phantom_00{i}.nii.gz" for i in range(2))
    ckpt, output = request.getfixturevalue(model) / "model.pt", tmp_path / "out"
    result = run_bundle("run", "inference", fixed=fixed, moving=moving, ckpt=ckpt, output_dir=output, steps=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (output / "displacement.nii.gz").is_file()
    assert (output / "moved.nii.gz").is_file()


@pytest.mark.parametrize("size", [(24, 22), (24, 22, 20)])
def test_augmentation_bends_images_of_either_dimension(size: tuple[int, ...]) -> None:
    parser = ConfigParser(ConfigParser.load_config_file(str(CONFIGS / "train.json")))
    parser["spatial_dims"] = len(size)
    augment = parser.get_parsed_content("augmentation")
    augment.set_random_state(seed=0)
    image = MetaTensor(torch.rand(1, *size))
    label = (image.as_tensor() > 0.5).float()
    made = augment({"image": image, "label": MetaTensor(label)})
    assert made["image"].shape == made["label"].shape == (1, *size)
    assert set(made["label"].as_tensor().unique().tolist()) == {0, 1}
    assert not torch.equal(made["label"].as_tensor(), label)
    assert set(augment({"image": image})) == {"image"}


def test_training_in_2d(tmp_path: Path) -> None:
    settings = SMALL | {"spatial_dims": 2, "output_dir": tmp_path / "run"}
    result = run_bundle("training", "train", **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    cohort = next((tmp_path / "phantoms").iterdir())
    result = run_bundle(
        "run",
        "inference",
        spatial_dims=2,
        fixed=cohort / "imagesTr" / "phantom_002.nii.gz",
        moving=cohort / "imagesTr" / "phantom_001.nii.gz",
        ckpt=tmp_path / "run" / "model.pt",
        output_dir=tmp_path / "out",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out" / "displacement.nii.gz").is_file()


def test_evaluating_writes_the_table_and_its_means(cohort: Path, trained: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.csv", cohort, ("phantom_000", "phantom_001"), ("phantom_002", "phantom_000"))
    ckpt = trained / "model.pt"
    result = run_bundle("evaluating", "train", "evaluate", pairs=pairs, ckpt=ckpt, output_dir=tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    with open(tmp_path / "out" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*COLUMNS, "dice_1", "dice_2", "dice_3", "dice_4"]
    assert len(rows) == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name in list(rows[0])[2:]:
        mean = sum(float(row[name]) for row in rows) / len(rows)
        assert summary[name] == pytest.approx(mean, rel=1e-4), name
    assert summary["dice"] == pytest.approx(sum(summary[f"dice_{i}"] for i in range(1, 5)) / 4, rel=1e-4)


def test_evaluating_without_labels(cohort: Path, trained: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.csv", cohort, ("phantom_000", "phantom_001"), labels=False)
    ckpt = trained / "model.pt"
    result = run_bundle("run", "train", "evaluate", pairs=pairs, ckpt=ckpt, output_dir=tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    with open(tmp_path / "out" / "metrics.csv") as file:
        row = next(csv.DictReader(file))
    assert list(row) == COLUMNS
    assert row["dice"] == ""
    assert float(row["folded_percent"]) >= 0


def test_killed_training_resumes(cohort: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = SMALL | {"max_epochs": 200, "epoch_length": 1, "val_interval": 1000, "dataset_dir": cohort}
    command = bundle_command("training", "train", output_dir=output, **settings)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output / "checkpoint_epoch=5.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = latest_checkpoint(str(output))
    assert newest is not None
    for path in output.glob("checkpoint*.pt"):  # whatever moment the kill hit: all of them whole
        torch.load(path, weights_only=True)
    saved = torch.load(newest, weights_only=True)
    epoch = saved["trainer"]["iteration"]
    assert int(saved["loss"]["updates"]) > 0

    settings["max_epochs"] = epoch + 1
    result = run_bundle("training", "train", output_dir=output, resume=True, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"Resuming from {newest}" in result.stdout
    resumed = torch.load(output / "checkpoint_final.pt", weights_only=True)
    assert resumed["trainer"]["iteration"] == epoch + 1
    per_iteration = int(saved["loss"]["updates"]) // (epoch - 2)  # after two iterations of warm-up
    assert int(resumed["loss"]["updates"]) == int(saved["loss"]["updates"]) + per_iteration
    steps = [int(checkpoint["optimizer"]["state"][0]["step"]) for checkpoint in (saved, resumed)]
    assert steps[1] == steps[0] + per_iteration
    assert {"python", "numpy", "torch"} <= set(resumed["random"])
    assert len(list(output.glob("checkpoint_epoch=*.pt"))) <= 3


@pytest.mark.parametrize("value", ["false", "False"])
def test_resume_false_does_not_resume(value: str, trained: Path, cohort: Path, tmp_path: Path) -> None:
    output = shutil.copytree(trained, tmp_path / "run")
    result = run_bundle("training", "train", dataset_dir=cohort, output_dir=output, resume=value, **SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Resuming" not in result.stdout
    assert len(list(tmp_path.glob("run.*"))) == 1


def test_resuming_nothing_starts_afresh(cohort: Path, tmp_path: Path) -> None:
    result = run_bundle("training", "train", dataset_dir=cohort, output_dir=tmp_path / "run", resume=True, **SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "starting from the beginning" in result.stdout


def test_two_processes_end_with_equal_weights(cohort: Path, tmp_path: Path) -> None:
    files = str([str(CONFIGS / f"{name}.json") for name in ("train", "multi_gpu_train")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += ["-m", "monai.bundle", "run", "training", "--config_file", files]
    weights = tmp_path / "weights"
    weights.mkdir()
    settings = SMALL | {"epoch_length": 4, "dataset_dir": cohort, "output_dir": tmp_path / "run"}
    settings["finalize"] = (
        f"['$torch.save(@loss.state_dict(), \"{weights}/\" + str(@rank) + \".pt\")', '$dist.destroy_process_group()']"
    )
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(weights / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    assert int(first["updates"]) > 0
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert (tmp_path / "run" / "model.pt").is_file()


def test_mlflow_tracking(cohort: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    settings = SMALL | {"dataset_dir": cohort, "output_dir": tmp_path / "run", "tracking": "mlflow"}
    result = run_bundle("training", "train", **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    import mlflow
    from monai.utils import path_to_sqlite_uri

    mlflow.set_tracking_uri(path_to_sqlite_uri(tmp_path / "run" / "mlruns.db"))
    runs = mlflow.search_runs(search_all_experiments=True)
    assert {"metrics.dice", "metrics.dice_before"} <= set(runs.columns)


@pytest.mark.parametrize(("configs", "kind"), [(["train"], "train"), (["inference"], "infer")])
def test_monai_finds_the_properties_it_requires(configs: list[str], kind: str, tmp_path: Path) -> None:
    workflow = ConfigWorkflow(
        config_file=[str(CONFIGS / f"{name}.json") for name in configs],
        workflow_type=kind,
        output_dir=str(tmp_path / "out"),
    )
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


def test_monai_verifies_the_network() -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
        any=40,
        device="cpu",
    )


def test_monai_exports_the_network(trained: Path, tmp_path: Path) -> None:
    exported = tmp_path / "model.ts"
    ckpt_export(
        net_id="network_def",
        filepath=str(exported),
        ckpt_file=str(trained / "model.pt"),
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
        key_in_ckpt="network",
        ckpt=str(trained / "model.pt"),  # says how many channels the network has
    )
    network = torch.jit.load(exported)
    assert network(torch.rand(1, 8, 20, 17, 24)).shape == (1, 3, 10, 9, 12)


@pytest.mark.parametrize(
    "given",
    [
        ["--config_file", "{copy}/configs/inference.json"],
        ["--config_file={copy}/configs/inference.json"],
        ["--config_file", "['{copy}/configs/train.json','more.json']"],
        ["--config_file", "['{copy}/configs/train.json', 'more.json']", "--ckpt", "another.json"],
    ],
)
def test_a_copy_of_a_bundle_uses_its_own_weights(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "my bundle"
    shutil.copytree(CONFIGS, copy / "configs")
    monkeypatch.setattr("sys.argv", ["bundle", "run", *(argument.format(copy=copy) for argument in given)])
    assert Path(bundle_folder("rl_reg")) == copy


def test_without_a_configuration_on_the_command_line_the_bundle_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.chdir(tmp_path)
    assert Path(bundle_folder("rl_digits")) == ROOT / "bundles" / "rl_digits"
    monkeypatch.chdir(CONFIGS.parent)
    assert Path(bundle_folder("rl_reg")).resolve() == CONFIGS.parent


def test_one_label_alone_is_evaluated(trained: Path, cohort: Path, tmp_path: Path) -> None:
    how = {"dataset_dir": cohort, "ckpt": trained / "model.pt", "output_dir": tmp_path, "labels": 1, "steps": 1}
    done = run_bundle("evaluating", "train", "evaluate", **how)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["dice"] == rows[0]["dice_1"] != ""
    assert "dice_2" not in rows[0]
