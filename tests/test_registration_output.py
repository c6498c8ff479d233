"""The output folder: all files in place together or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from monai_rl_reg import files
from monai_rl_reg.errors import InputError
from monai_rl_reg.registration import FILES, Registration, keep_inputs


def test_all_files_are_there(registration_folder: Path) -> None:
    assert {file.name for file in registration_folder.iterdir()} == FILES - {"report.html"}
    assert [p.name for p in registration_folder.parent.iterdir()] == ["out"]
    quality = json.loads((registration_folder / "quality.json").read_text(encoding="utf-8"))
    for key in ("ncc_before", "folded_percent", "sdlogj", "inverse_error_mm", "seconds", "versions", "warnings"):
        assert quality[key] is not None


def test_images_hold_no_time_so_that_equal_results_are_equal_files(registration_folder: Path) -> None:
    for file in registration_folder.glob("*.nii.gz"):
        assert file.read_bytes()[4:8] == bytes(4), file  # the time stamp in gzip's header


def test_what_else_lies_in_the_folder_stays_and_old_results_go(registration: Registration, tmp_path: Path) -> None:
    registration.save(tmp_path / "out", tfm=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "more").mkdir()
    (tmp_path / "out" / "more" / "file").write_text("mine too")
    replace(registration, moved_label=None, landmarks=None).save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == FILES - {"transform.tfm", "moved_label.nii.gz", "landmarks.csv", "report.html"} | {
        "notes.txt",
        "more",
    }
    assert (tmp_path / "out" / "more" / "file").read_text(encoding="utf-8") == "mine too"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_moved_keeps_what_is_in_it(
    registration: Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    registration.save(output, tfm=True)
    for name in ("able", "mount", "more"):
        (output / name).mkdir()
        (output / name / "file").write_text(name)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "mount":
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    replace(registration, landmarks=None).save(output)
    names = {path.name for path in output.iterdir()}
    assert names == FILES - {"transform.tfm", "landmarks.csv", "report.html"} | {"able", "mount", "more"}
    assert all((output / name / "file").read_text() == name for name in ("able", "mount", "more"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interruption_leaves_what_else_lies_in_the_folder(
    registration: Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registration.save(tmp_path / "out")
    (tmp_path / "out" / "more").mkdir()
    (tmp_path / "out" / "more" / "file").write_text("mine")
    exchange = files._exchange

    def interrupted(a: Path, b: Path) -> None:
        exchange(a, b)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registration.save(tmp_path / "out")
    assert (tmp_path / "out" / "more" / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mode", [0o700, 0o2770])
def test_permissions_of_the_folder_stay(registration: Registration, tmp_path: Path, mode: int) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(mode)
    registration.save(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o7777 == mode


def test_a_parent_that_may_not_be_written_to_is_not_needed(
    registration: Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(files, "_swap", None)  # is not called
    registration.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"transform.tfm", "report.html"}


def test_the_working_directory_can_be_the_output(
    registration: Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    registration.save(".", tfm=True)
    registration.save(".")
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"transform.tfm", "report.html"}


def test_a_failure_while_writing_leaves_the_old_files(
    registration: Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registration.save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*args: Any) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("monai_rl_reg.registration.write_transform", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        replace(registration, quality={}).save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, sys, json, shutil
from pathlib import Path
from monai_rl_reg import files

moments = int(sys.argv[2])

def count(function):
    def counted(*args, **kwargs):
        global moments
        moments -= 1
        if moments == 0:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return counted

files.os.link = count(os.link)
Path.rename = count(Path.rename)
files.shutil.rmtree = count(shutil.rmtree)
Path.unlink = count(Path.unlink)
Path.rmdir = count(Path.rmdir)
exchange = files._exchange
files._exchange = count(exchange)
with files.replacing_folder(sys.argv[1], {"a", "b"}) as staging:
    for name in ("a", "b"):
        (staging / name).write_text("new")
        count(len)("")
"""


def test_a_kill_at_any_moment_leaves_the_old_files_or_the_new_ones(tmp_path: Path) -> None:
    seen = set()
    for moment in range(1, 12):
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


def test_an_output_that_is_a_file(registration: Registration, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(InputError, match="expected a folder that can be written to"):
        registration.save(tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "in the way"


def test_a_file_of_the_user_s_with_a_result_s_name_stays(registration: Registration, tmp_path: Path) -> None:
    (tmp_path / "landmarks.csv").write_text("mine")
    (tmp_path / "report.html").write_text("mine too")
    without = replace(registration, landmarks=None)
    for _ in range(2):
        without.save(tmp_path)
        assert (tmp_path / "landmarks.csv").read_text() == "mine"
        assert (tmp_path / "report.html").read_text() == "mine too"


def test_what_is_given_is_not_replaced(oblique_files: dict[str, str], tmp_path: Path) -> None:
    given = shutil.copy(oblique_files["moving"], tmp_path / "moved.nii.gz")
    keep_inputs(tmp_path, oblique_files["fixed"], tmp_path / "image.nii.gz", None, "auto")
    keep_inputs(tmp_path / "out", given)
    with pytest.raises(InputError, match=r"none of what is given, found .*moved\.nii\.gz, which would be replaced"):
        keep_inputs(tmp_path, oblique_files["fixed"], str(given))


def test_links_are_no_way_to_lose_what_is_given(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine.nii.gz").write_text("mine")
    (out / "moved.nii.gz").symlink_to(tmp_path / "mine.nii.gz")  # saving would replace the link
    (out / "moved_label.nii.gz").write_text("mine")
    (tmp_path / "link.nii.gz").symlink_to(out / "moved_label.nii.gz")  # or what it leads to
    for path in (out / "moved.nii.gz", tmp_path / "link.nii.gz"):
        with pytest.raises(InputError, match="which would be replaced"):
            keep_inputs(out, path)
    keep_inputs(out, tmp_path / "mine.nii.gz", "auto", None)
