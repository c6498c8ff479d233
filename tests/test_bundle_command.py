"""What the command line of a bundle says, and what it cannot say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import CONFIGS, run_bundle

from monai_rl_reg.bundle_command import check_settings
from monai_rl_reg.errors import InputError

TRAIN, LABELS = CONFIGS / "train.json", CONFIGS / "with_labels.json"


def say(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["monai/bundle/__main__.py", "run", "training", *map(str, arguments)])


@pytest.mark.parametrize("files", [(f"--config_file={TRAIN}",), ("--config_file", f"['{TRAIN}','{LABELS}']")])
@pytest.mark.parametrize(
    "setting",
    [
        ("--pairs", "p.csv"),
        ("--val-pairs", "p.csv"),
        ("--pixdim", "[1,1,1]"),
        ("--learning_rate=-1",),
        ("--train::dataloader::num_workers", "4"),
        ("--train#dataloader#pin_memory", "true"),
        ("--similarity::window", "5"),
        ("--logging_file", "x"),
        ("--tracking", "mlflow", "--experiment_name", "x"),
    ],
)
def test_settings_that_there_are(
    files: tuple[str, ...], setting: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, *files, *setting)
    check_settings()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (("--pair", "p.csv"), r"setting pair: expected .*, found none of this name \(is it pairs\?\)"),
        (("--trian::dataloader::num_workers", "4"), r"is it train\?"),
        (("--dataset=x",), r"found none of this name"),
        (("--qqqqq", "1"), r"found none of this name$"),
    ],
)
def test_settings_that_there_are_not(setting: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "--config_file", TRAIN, *setting)
    with pytest.raises(InputError, match=words):
        check_settings()


def test_without_a_command_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest", "--pair"])
    check_settings()


def test_a_misspelt_setting_ends_a_command_in_one_sentence(tmp_path: Path) -> None:
    done = run_bundle("", "inference", fixed_image="a.nii.gz", output_dir=tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(
        "error: setting fixed_image: expected one that the configuration has"
    )
    assert not (tmp_path / "out").exists()
