"""Many pairs: a folder and a row each, failures in their rows, resuming, and processes that share the work."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest
import SimpleITK as sitk
import torch

from monai_rl_reg.batch import _write_share, read_jobs, register_pairs
from monai_rl_reg.errors import InputError
from monai_rl_reg.files import file_stamp
from monai_rl_reg.phantoms import make_case
from monai_rl_reg.registration import Registrar, Registration
from monai_rl_reg.request import Options, Pair

QUICK = Options(steps=1)


@pytest.fixture(scope="module")
def registrar() -> Registrar:
    return Registrar(device="cpu")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Four pairs among three images with labels; the second one has a name, the third one an image that is broken."""
    random = torch.Generator().manual_seed(0)
    folder = tmp_path / "input"
    folder.mkdir()
    for i in range(3):
        image, label, affine = make_case(random, size=18)
        nib.save(nib.Nifti1Image(image[0].numpy(), affine.numpy()), folder / f"{i}.nii.gz")
        nib.save(nib.Nifti1Image(label[0].numpy(), affine.numpy()), folder / f"{i}_label.nii.gz")
    (folder / "broken.nii.gz").write_text("no image")
    path = folder / "pairs.csv"
    path.write_text(
        "fixed, moving,fixed_label,moving_label,name\n"
        "0.nii.gz,1.nii.gz,0_label.nii.gz,1_label.nii.gz,\n"
        "1.nii.gz,2.nii.gz,1_label.nii.gz,2_label.nii.gz,second\n"
        "0.nii.gz,broken.nii.gz,,,\n"
        "2.nii.gz,0.nii.gz,,0_label.nii.gz,\n"
    )
    return path


def table(out: Path) -> list[dict[str, str]]:
    with open(out / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_and_a_row_a_pair(pairs: Path, registrar: Registrar, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = register_pairs(pairs, out, registrar, QUICK, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["0000", "0003", "second", "summary.csv"]
    assert [row["name"] for row in rows] == ["0000", "second", "0002", "0003"]
    assert [row["status"] for row in rows] == ["done", "done", "failed", "done"]
    written = table(out)
    assert [row["status"] for row in written] == ["done", "done", "failed", "done"]
    assert f"{pairs.parent / 'broken.nii.gz'}: expected an image file that can be read" in written[2]["reason"]
    assert written[2]["similarity_after"] == ""
    for row in (written[0], written[1]):
        quality = json.loads((out / row["name"] / "quality.json").read_text(encoding="utf-8"))
        assert float(row["dice_after"]) == pytest.approx(quality["dice_after"], rel=1e-5)
        assert row["fixed"] == quality["fixed"]
    assert written[3]["dice_after"] == ""
    assert (out / "0003" / "moved_label.nii.gz").exists()


def test_resume_skips_what_is_complete(
    pairs: Path, registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = register_pairs(pairs, out, registrar, QUICK, progress=False)
    kept = out / "0000" / "quality.json"
    stamp = kept.stat().st_mtime_ns
    (out / "second" / "quality.json").unlink()  # as if it had never been finished
    text = pairs.read_text(encoding="utf-8").replace("2.nii.gz,0.nii.gz,,0_label", "2.nii.gz,1.nii.gz,,1_label")
    pairs.write_text(text)  # another pair of this name
    monkeypatch.chdir(tmp_path)  # wherever it goes on from
    after = register_pairs(pairs, out, registrar, QUICK, resume=True, progress=False)
    assert kept.stat().st_mtime_ns == stamp
    assert (out / "second" / "quality.json").exists()
    assert json.loads((out / "0003" / "quality.json").read_text(encoding="utf-8"))["moving"].endswith("1.nii.gz")
    assert after[0] == before[0]
    assert [row["status"] for row in after] == ["done", "done", "failed", "done"]


def test_resume_registers_again_what_was_made_otherwise(pairs: Path, registrar: Registrar, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stamps: dict[str, int] = {}

    def again(options: Options = QUICK, by: Registrar = registrar) -> set[str]:
        register_pairs(pairs, out, by, options, resume=True, progress=False)
        now = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/quality.json")}
        changed = {name for name in now if now[name] != stamps.get(name)}
        stamps.update(now)
        return changed

    every = {"0000", "second", "0003"}
    assert again() == every
    assert again() == set()
    label = nib.load(pairs.parent / "0_label.nii.gz")
    nib.save(nib.Nifti1Image(label.get_fdata().astype("uint8")[::-1], label.affine), pairs.parent / "0_label.nii.gz")
    assert again() == {"0000", "0003"}
    assert again(Options(steps=2)) == every
    (out / "second" / "moved.nii.gz").unlink()
    assert again(Options(steps=2)) == {"second"}
    turned = torch.eye(4, dtype=torch.float64)
    for initial in (tmp_path / "initial.tfm", turned):
        sitk.WriteTransform(sitk.Euler3DTransform(), str(tmp_path / "initial.tfm"))
        assert again(Options(steps=2, initial=initial)) == every
        assert again(Options(steps=2, initial=initial)) == set()
    assert again(Options(steps=2)) == every
    weights = tmp_path / "model.pt"
    shutil.copy(registrar.bundle().ckpt, weights)
    assert again(Options(steps=2), Registrar(ckpt=weights, device="cpu")) == every


def test_resume_registers_again_what_changed_while_it_was_registered(
    pairs: Path, registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out, moving = Registrar.register, tmp_path / "out", pairs.parent / "1.nii.gz"

    def slow(self: Registrar, pair: Pair, options: Options, **how: object) -> Registration:
        result = real(self, pair, options)
        if result.quality["moving"] == str(moving):
            moving.touch()  # as if written anew
        return result

    monkeypatch.setattr(Registrar, "register", slow)
    register_pairs(pairs, out, registrar, QUICK, progress=False)
    monkeypatch.undo()
    before = (out / "0000" / "quality.json").stat().st_mtime_ns
    register_pairs(pairs, out, registrar, QUICK, resume=True, progress=False)
    assert (out / "0000" / "quality.json").stat().st_mtime_ns > before


@pytest.mark.parametrize("content", ["[1]", "{", '{"files": 3}'])
def test_a_foreign_quality_file_is_no_result(content: str, pairs: Path, registrar: Registrar, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "second").mkdir(parents=True)
    (out / "second" / "quality.json").write_text(content)
    rows = register_pairs(pairs, out, registrar, QUICK, resume=True, progress=False)
    assert rows[1]["status"] == "done"


def test_voxels_beside_a_header_tell_one_image_from_another(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(torch.rand(4, 5, 6).numpy())
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    before = file_stamp(tmp_path / "a.mhd")
    assert file_stamp(tmp_path / "a.mhd") == before
    with open(tmp_path / "a.raw", "ab") as file:
        file.write(b"more")
    assert file_stamp(tmp_path / "a.mhd") != before


def test_the_table_grows_with_the_pairs(
    pairs: Path, registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out, seen = Registrar.register, tmp_path / "out", []

    def register(self: Registrar, pair: Pair, options: Options) -> Registration:
        seen.append([row["name"] for row in table(out)] if (out / "summary.csv").exists() else [])
        return real(self, pair, options)

    monkeypatch.setattr(Registrar, "register", register)
    monkeypatch.setattr("monai_rl_reg.batch.EVERY", 0.0)
    register_pairs(pairs, out, registrar, QUICK, progress=False)
    assert seen == [[], ["0000"], ["0000", "second", "0002"]]


def test_rows_of_an_earlier_run_that_was_killed_are_not_in_the_table(
    pairs: Path, registrar: Registrar, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _write_share(out, [{"name": "second", "status": "failed", "steps": 99}], [], 1)
    register_pairs(pairs, out, registrar, QUICK, progress=False)
    assert [(row["status"], row["steps"]) for row in table(out) if row["name"] == "second"] == [("done", "1")]
    assert not list(out.glob(".summary*"))


def test_the_table_so_far_has_the_rows_of_all_processes(tmp_path: Path) -> None:
    jobs = [{"name": name} for name in "abcd"]
    _write_share(tmp_path, [{"name": "b", "status": "failed"}], jobs, 1)
    _write_share(tmp_path, [{"name": "a", "status": "done"}, {"name": "c", "status": "done"}], jobs, 0)
    assert [(row["name"], row["status"]) for row in table(tmp_path)] == [("a", "done"), ("b", "failed"), ("c", "done")]


def test_a_defect_fails_its_pair_alone(
    pairs: Path, registrar: Registrar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Registrar.register

    def register(self: Registrar, pair: object, options: Options) -> object:
        if "1.nii.gz" in str(pair.moving.meta):
            raise RuntimeError("out of\nmemory")
        return real(self, pair, options)

    monkeypatch.setattr(Registrar, "register", register)
    rows = register_pairs(pairs, tmp_path / "out", registrar, QUICK, progress=False)
    assert [row["status"] for row in rows] == ["failed", "done", "failed", "done"]
    assert rows[0]["reason"] == "RuntimeError: out of memory"


def test_a_bad_bundle_ends_it_all(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoint nothing.pt: expected a file"):
        register_pairs(pairs, tmp_path / "out", Registrar(ckpt="nothing.pt"), QUICK, progress=False)


def test_a_pair_of_pictures_among_volumes_fails_alone(pairs: Path, registrar: Registrar, tmp_path: Path) -> None:
    for i in range(2):
        flat = nib.Nifti1Image(torch.rand(18, 18, 1).numpy(), torch.eye(4).numpy())
        nib.save(flat, pairs.parent / f"flat{i}.nii.gz")
    pairs.write_text("fixed,moving\nflat0.nii.gz,flat1.nii.gz\n0.nii.gz,1.nii.gz\n")
    rows = register_pairs(pairs, tmp_path / "out", Registrar(device="cpu"), QUICK, progress=False)
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert "expected images of 3 dimensions, found some of 2" in rows[0]["reason"]


def test_what_a_killed_run_left_half_written_goes(pairs: Path, registrar: Registrar, tmp_path: Path) -> None:
    left, other = tmp_path / "out" / ".second.abcd_123", tmp_path / "out" / ".third.abcd_123"
    for folder in (left, other):
        folder.mkdir(parents=True)
        (folder / "moved.nii.gz").write_text("half")
    register_pairs(pairs, tmp_path / "out", registrar, QUICK, progress=False)
    assert not left.exists()
    assert other.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("a/b", "expected the name of a folder"), ("..", "expected the name of a folder"), ("second", "line 3")],
)
def test_bad_names(name: str, words: str, pairs: Path) -> None:
    pairs.write_text(pairs.read_text(encoding="utf-8").replace("broken.nii.gz,,,", f"broken.nii.gz,,,{name}"))
    with pytest.raises(InputError, match=words) as raised:
        read_jobs(pairs)
    assert f"{pairs}, line 4" in str(raised.value)


def test_spaces_quotes_and_blank_lines_are_read_alike(pairs: Path) -> None:
    pairs.write_text('fixed, "moving", name\n\na.nii, "b, c.nii", "one"\n\nd.nii,,two\n')
    with pytest.raises(InputError, match=r"pairs\.csv, line 5: expected a fixed and a moving path"):
        read_jobs(pairs)
    pairs.write_text(pairs.read_text().replace("d.nii,,two\n", ""))
    (job,) = read_jobs(pairs)
    assert job == {"fixed": f"{pairs.parent}/a.nii", "moving": f"{pairs.parent}/b, c.nii", "name": "one"}


def test_landmarks_are_a_column(pairs: Path) -> None:
    pairs.write_text("fixed,moving,landmarks\n0.nii.gz,1.nii.gz,points.csv\n")
    assert read_jobs(pairs)[0]["landmarks"] == str(pairs.parent / "points.csv")


def arrays(out: Path) -> dict[str, bytes]:
    """What every pair's displacement and label hold, to the bit."""
    files = sorted([*out.glob("*/displacement.nii.gz"), *out.glob("*/moved*.nii.gz")])
    return {str(file.relative_to(out)): nib.load(file).get_fdata().tobytes() for file in files}


def test_two_processes_share_the_pairs_and_get_the_same(pairs: Path, tmp_path: Path) -> None:
    command = ["-m", "monai_rl_reg", "register", "--pairs", str(pairs), "--steps", "1", "--device", "cpu"]
    alone = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path / "alone")],
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert alone.returncode == 1, alone.stderr  # one pair failed
    assert "3 of 4 pairs registered" in alone.stdout
    assert "failed: 0002: moving image" in alone.stderr
    together = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command, "--output",
         str(tmp_path / "together")], capture_output=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert together.returncode == 1
    rows = [table(tmp_path / name) for name in ("alone", "together")]
    for one, two in zip(*rows, strict=True):
        assert one | {"seconds": ""} == two | {"seconds": ""}
    assert not list((tmp_path / "together").glob(".summary*"))
    assert len(arrays(tmp_path / "alone")) == 9
    assert arrays(tmp_path / "alone") == arrays(tmp_path / "together")
