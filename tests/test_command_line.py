"""The command line as a user runs it: what it writes, prints and returns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT

from monai_rl_reg import command_line
from monai_rl_reg.command_line import main
from monai_rl_reg.phantoms import make_case


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, random = tmp_path_factory.mktemp("input"), torch.Generator().manual_seed(0)
    made = {}
    for role in ("fixed", "moving"):
        image, label, affine = make_case(random, size=20)
        for name, data in ((role, image), (f"{role}_label", label)):
            made[name] = str(folder / f"{name}.nii.gz")
            nib.save(nib.Nifti1Image(data[0].numpy(), affine.numpy()), made[name])
    return made


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "monai_rl_reg", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600)


def test_the_label_app_is_where_it_says() -> None:
    done = run("label-app")
    assert done.returncode == 0
    assert (Path(done.stdout.strip()) / "main.py").is_file()


def test_the_bundles_are_where_it_says() -> None:
    done = run("bundles")
    assert done.returncode == 0
    assert (Path(done.stdout.strip()) / "rl_reg" / "configs" / "train.json").is_file()


def test_an_installed_package_has_the_bundles_inside(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("monai_rl_reg", "bundles"):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"], cwd=tmp_path, check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "monai_rl_reg", "bundles"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        encoding="utf-8",
    )
    inside = tmp_path / "lib" / "monai_rl_reg" / "bundles"
    assert Path(done.stdout.strip()) == inside, done.stderr
    assert (inside / "rl_reg" / "models" / "model.pt").is_file()


def test_a_pair_from_end_to_end(files: dict[str, str], tmp_path: Path) -> None:
    x, y, z = -np.array(nib.load(files["fixed"]).affine[:3, 3]) * [1, 1, -1]
    points = f"x,y,z,name,image\n{x},{y},{z},tip,fixed\n{x},{y},{z},tip,moving\n"
    (tmp_path / "points.csv").write_text(points)
    done = run(
        "register", files["fixed"], files["moving"], "--output", tmp_path / "out", "--device", "cpu", "--steps", 2,
        "--moving-label", files["moving_label"], "--fixed-label", files["fixed_label"],
        "--landmarks", tmp_path / "points.csv", "--uncertainty", 2, "--refine", 0.2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "registering" in done.stderr  # the progress bar
    assert "NCC" in done.stdout
    assert "mm apart, folded" in done.stdout
    assert f"Wrote the registration to {tmp_path / 'out'}" in done.stdout
    expected = ["displacement.nii.gz", "inverse_displacement.nii.gz", "landmarks.csv", "moved.nii.gz"]
    expected += ["moved_label.nii.gz", "quality.json", "transform.h5", "uncertainty.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected
    quality = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    assert quality["steps"] == 2
    assert quality["refinement"]["loss_after"] <= quality["refinement"]["loss_before"]
    assert quality["fixed"] == files["fixed"]


def test_a_run_that_is_ended_leaves_nothing_half_written(files: dict[str, str], tmp_path: Path) -> None:
    save = (
        "import time; from monai_rl_reg import registration\nregistration.write_transform = lambda *a: time.sleep(60)"
    )
    script = f"{save}\nimport runpy, sys\nsys.argv[0] = 'x'\nrunpy.run_module('monai_rl_reg', run_name='__main__')"
    arguments = ["register", files["fixed"], files["moving"], "--output", str(tmp_path / "out"), "--steps", "0", "-q"]
    with subprocess.Popen([sys.executable, "-c", script, *arguments]) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.*/displacement.nii.gz")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("*out*"))


def test_bad_input_is_one_sentence(files: dict[str, str], tmp_path: Path) -> None:
    done = run("register", files["fixed"], tmp_path / "none.nii.gz", "--output", tmp_path / "out", "-q")
    assert done.returncode == 1
    assert done.stderr == f"error: moving image {tmp_path / 'none.nii.gz'}: expected a file, found none\n"
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_tells_all() -> None:
    done = run("register", "--help")
    assert done.returncode == 0
    for word in ("--stop", "--refine", "--initial", "transform.h5", "quality.json", "examples:", "exit status"):
        assert word in done.stdout
    light = "import sys; import monai_rl_reg.command_line; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, encoding="utf-8").stdout == "False\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["register"],
        ["register", "a.nii.gz", "--output", "out"],
        ["register", "a.nii.gz", "b.nii.gz"],
        ["register", "a.nii.gz", "b.nii.gz", "--pairs", "p.csv", "--output", "out"],
        ["register", "a.nii.gz", "b.nii.gz", "--output", "out", "--resume"],
        ["register", "a.nii.gz", "b.nii.gz", "--output", "out", "--steps", "3", "--stop", "auto"],
        ["register", "a.nii.gz", "b.nii.gz", "--output", "out", "--steps", "few"],
        ["register", "a.nii.gz", "b.nii.gz", "--output", "out", "--steps", "-1"],
        ["register", "a.nii.gz", "b.nii.gz", "--output", "out", "--refine", "-0.1"],
        ["register", "a.nii.gz", "b.nii.gz", "--output", "out", "--uncertainty", "1"],
        ["register", "--pairs", "p.csv", "--output", "out", "--moving-label", "l.nii.gz"],
        ["register", "a.nii.gz", "b.nii.gz", "--output", "out", "--fixed-label", "l.nii.gz"],
    ],
)
def test_a_wrong_command_has_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bundle", "nowhere"], "error: bundle nowhere: expected a folder with configs/inference.json"),
        (["--bundle", str(ROOT / "bundles" / "rl_digits")], "rl_digits: expected one that registers, found no"),
        (["--device", "meta"], "error: device meta: expected one that can be computed on"),
        (["--ckpt", "nothing.pt"], "error: checkpoint nothing.pt: expected a file, found none"),
        (["--initial", "nothing.tfm"], "error: initial transform nothing.tfm: expected a file, found none"),
        (["--landmarks", "nothing.csv"], "error: landmarks nothing.csv: expected a CSV file, found none"),
    ],
)
def test_bad_options(
    arguments: list[str], words: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["register", files["fixed"], files["moving"], "--output", str(tmp_path / "out"), "-q", *arguments]
    assert main(command) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_landmarks_outside_the_image(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "points.csv").write_text("x,y,z,name\n1e4,0,0,tip\n")
    arguments = ["--output", str(tmp_path / "out"), "--landmarks", str(tmp_path / "points.csv")]
    assert main(["register", files["fixed"], files["moving"], *arguments]) == 1
    assert "inside the fixed image, found 1 outside, the first tip at LPS 10000, 0, 0" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr(command_line, "_register", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["register", "a", "b", "--output", "out"])


def test_the_report_comes_with_the_rest(files: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("monai_rl_reg.report")
    out = tmp_path / "out"
    command = ["register", files["fixed"], files["moving"], "--output", str(out), "--report", "-q", "--steps", "1"]
    assert main([*command, "--device", "cpu"]) == 0
    assert "<html" in (out / "report.html").read_text(encoding="utf-8").lower()


def test_a_warning_goes_to_the_error_output(files: dict[str, str], tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)
    noise = tmp_path / "noise.nii.gz"
    nib.save(nib.Nifti1Image(data, nib.load(files["fixed"]).affine), noise)
    done = run("register", noise, files["moving"], "--output", tmp_path / "out", "--initial", "none", "-q", "-v")
    assert done.returncode == 0, done.stderr
    warnings = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))["warnings"]
    for text in warnings:
        assert text in done.stderr
