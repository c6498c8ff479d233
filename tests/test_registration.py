"""One call: what a registration finds, of how it went, and with which options."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from oblique_pair import points_inside, read_field

from monai_rl_reg.errors import InputError
from monai_rl_reg.phantoms import make_case
from monai_rl_reg.quality import warnings_about
from monai_rl_reg.registration import Registrar, Registration, register
from monai_rl_reg.request import Options, Pair


def test_it_registers(registration: Registration, oblique_files: dict[str, str]) -> None:
    quality = registration.quality
    assert quality["ncc_after"] > quality["ncc_before"] + 0.02
    assert quality["folded_percent"] < 0.5
    assert registration.moved_label is not None
    for value in (1, 2, 7):
        a, b = registration.moved_label[0].numpy() == value, nib.load(oblique_files["fixed_label"]).get_fdata() == value
        assert quality["dice_per_label"][str(value)] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-5)
    assert quality["dice_after"] == pytest.approx(np.mean(list(quality["dice_per_label"].values())), abs=1e-5)
    assert quality["steps"] == 4
    assert len(registration.history) == len(registration.curve) == 5
    assert set(registration.curve[0]) == {"ncc", "dice"}
    assert [quality["ncc_before"], quality["ncc_after"]] == [registration.curve[i]["ncc"] for i in (0, -1)]
    assert set(quality["dice_per_label"]) == {"1", "2", "7"}
    assert np.array_equal(registration.fixed[0].numpy(), nib.load(oblique_files["fixed"]).get_fdata(dtype=np.float32))
    assert np.array_equal(registration.moving[0].numpy(), nib.load(oblique_files["moving"]).get_fdata(dtype=np.float32))


def test_uncertainty_is_a_length_and_the_same_every_time(
    registration: Registration, oblique_files: dict[str, str], registrar: Registrar
) -> None:
    assert registration.uncertainty is not None
    assert registration.uncertainty.shape == registration.fixed.shape
    assert registration.uncertainty.min() >= 0
    assert registration.uncertainty.max() > 0
    before = torch.get_rng_state()
    again = registrar.register(Pair.read(**oblique_files), Options(steps=4, uncertainty=3))
    assert torch.equal(again.uncertainty, registration.uncertainty)
    assert torch.equal(again.displacement, registration.displacement)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_step_and_no_transform_is_plain_resampling(oblique_files: dict[str, str], registrar: Registrar) -> None:
    still = registrar.register(
        Pair.read(oblique_files["fixed"], oblique_files["moving"]), Options(steps=0, initial="none")
    )
    assert still.displacement.abs().max() < 1e-4
    fixed, moving = sitk.ReadImage(oblique_files["fixed"]), sitk.ReadImage(oblique_files["moving"], sitk.sitkFloat64)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed)).T
    inside = (expected != 0) & (still.moved[0].numpy() != 0)
    assert np.abs(still.moved[0].numpy() - expected)[inside].max() < 0.2
    assert still.quality["initial"] == {"kind": "none"}


def test_auto_stops_by_itself(
    oblique_files: dict[str, str], registrar: Registrar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_rl_reg.similarity.LocalNCC.gain", 0.02)
    done = registrar.register(Pair.read(oblique_files["fixed"], oblique_files["moving"]), Options(steps="auto"))
    ncc = [point["ncc"] for point in done.curve]
    gains = np.array(ncc[1:]) - [ncc[0], *ncc[:-2]]  # of two steps
    assert 1 <= done.quality["steps"] < 16
    assert done.quality["stopped_by_itself"]
    assert (gains[:-1] >= 0.02).all()
    assert gains[-1] < 0.02


@pytest.mark.parametrize("content", [False, True])
def test_auto_settles_once_what_it_ends_with(
    content: bool, oblique_files: dict[str, str], registrar: Registrar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it ends: at the most steps that it may take, or there because they are enough."""
    bundle, settled = registrar.bundle(3), []
    monkeypatch.setattr(bundle.task, "settle", lambda state, steps: settled.append(steps) or state)
    most = 2 * bundle.steps
    monkeypatch.setattr("monai_rl_reg.stepping.enough", lambda curve, *_: content and len(curve) == most + 1)
    done = registrar.register(Pair.read(oblique_files["fixed"], oblique_files["moving"]), Options(steps="auto"))
    assert settled == [most]
    assert done.quality["steps"] == most == len(done.curve) - 1


class Expecting(torch.nn.Module):
    """Twin critics that expect these values, one after the other."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = list(values)

    def forward(self, features: list[torch.Tensor], plan: torch.Tensor) -> torch.Tensor:
        value = self.values.pop(0)
        return torch.tensor([[value, value + 1.0]])


@pytest.mark.parametrize(
    ("values", "steps"), [([2.0, 1.0, 0.049], 2), ([0.04], 0), ([-1.0], 0), ([1.0] * 9, 6)], ids=str
)
def test_auto_stops_where_a_critic_expects_no_gain(
    values: list[float],
    steps: int,
    oblique_files: dict[str, str],
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registrar = Registrar(ckpt=trained / "model.pt", device="cpu")
    bundle, settled = registrar.bundle(), []
    assert bundle.critic is not None  # trained with reinforcement
    at_goal = 3.0  # of the fixed image and itself, asked first: what the critics expect is told from there
    monkeypatch.setattr(bundle, "critic", Expecting(at_goal, *(at_goal + value for value in values)))
    monkeypatch.setattr(bundle.task, "settle", lambda state, taken: settled.append(taken) or state)
    done = registrar.register(Pair.read(oblique_files["fixed"], oblique_files["moving"]), Options(steps="auto"))
    assert done.quality["steps"] == steps
    assert len(done.history) == len(done.curve) == steps + 1
    assert settled == ([steps] if steps else [])
    assert done.quality["stopped_by_itself"] is (steps < 6)


def test_auto_leaves_what_agrees_as_it_is(oblique_files: dict[str, str], registrar: Registrar) -> None:
    pair = Pair.read(oblique_files["fixed"], oblique_files["fixed"])
    shift = registrar.bundle(3).network.register_forward_hook(lambda network, observation, action: action + 1)
    try:
        moved = registrar.register(pair, Options(steps=1, initial="none"))
        done = registrar.register(pair, Options(steps="auto", initial="none"))
    finally:
        shift.remove()
    assert moved.displacement.abs().max() > 1
    assert done.quality["steps"] == 0
    assert done.displacement.abs().max() < 1e-5


def test_refinement_is_part_of_the_result(oblique_files: dict[str, str], registrar: Registrar) -> None:
    done = registrar.register(Pair.read(oblique_files["fixed"], oblique_files["moving"]), Options(steps=2, refine=1.5))
    figures = done.quality["refinement"]
    assert figures["iterations"] > 0
    assert figures["loss_after"] < figures["loss_before"]
    assert len(done.history) == len(done.curve) == 4
    assert done.curve[-1]["ncc"] > done.curve[-2]["ncc"]


def test_a_large_image_gets_a_coarser_working_grid(
    oblique_files: dict[str, str], registrar: Registrar, registration: Registration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_rl_reg.working.MOST_VOXELS", 9000)
    done = registrar.register(Pair.read(**oblique_files), Options(steps=4))
    grid = done.quality["working_grid"]
    assert grid["coarsened_to_save_memory"]
    assert not registration.quality["working_grid"]["coarsened_to_save_memory"]
    assert np.prod(grid["shape"]) <= 9000
    assert max(grid["spacing_mm"]) < 1.8  # the finer directions are coarsened, not the coarsest
    assert done.moved.shape == done.fixed.shape
    assert done.quality["ncc_after"] > done.quality["ncc_before"]
    assert done.quality["dice_after"] > 0.9 * registration.quality["dice_after"]
    assert (done.displacement - registration.displacement).norm(dim=0).mean() < 1.0


def test_two_dimensions(demons: Path, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    paths = []
    for i in range(2):
        image, _, affine = make_case(random, size=40, spatial_dims=2, oblique=i == 1)
        paths.append(tmp_path / f"{i}.nii.gz")
        nib.save(nib.Nifti1Image(image[0].numpy(), affine.numpy()), paths[-1])
    done = register(*paths, steps=3, bundle=demons, device="cpu")
    assert done.displacement.shape == (2, *done.fixed.shape[1:])
    done.save(tmp_path / "out")
    transform = sitk.ReadTransform(str(tmp_path / "out" / "transform.h5"))
    fixed, moving = (sitk.ReadImage(str(p), sitk.sitkFloat64) for p in paths)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform)).T
    inside = (expected != 0) & (done.moved[0].numpy() != 0)
    assert inside.mean() > 0.3
    assert np.abs(done.moved[0].numpy() - expected)[inside].max() < 0.01 * expected.max()
    back = read_field(tmp_path / "out" / "inverse_displacement.nii.gz")
    for point in points_inside(fixed, 20):
        assert np.allclose(back.TransformPoint(transform.TransformPoint(point)), point, atol=0.3)


def test_the_shipped_weights_register_what_they_were_trained_on(hippocampus: Path) -> None:
    images, labels = (
        [hippocampus / f"{what}Tr" / f"hippocampus_{i}.nii.gz" for i in (296, 309)] for what in ("images", "labels")
    )
    quality = register(*images, fixed_label=labels[0], moving_label=labels[1], device="cpu").quality
    assert quality["initial"] == {"kind": "identity"}  # the policy gets there without: none was looked for
    assert quality["dice_after"] > 0.8
    assert quality["dice_after"] > quality["dice_before"] + 0.03
    assert quality["seen_dice_after"] > 0.9 > quality["seen_dice_before"]
    assert quality["folded_percent"] < 0.1
    assert quality["steps"] == 5
    assert quality["warnings"] == []
    refined = register(*images, fixed_label=labels[0], moving_label=labels[1], refine=1.0, device="cpu").quality
    assert refined["refinement"]["loss_after"] < refined["refinement"]["loss_before"]
    assert refined["dice_after"] > quality["dice_after"] - 0.01
    turned = torch.eye(4, dtype=torch.float64)
    turned[:2, :2] = torch.tensor([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    turned[:3, 3] = torch.tensor([20.0, -30.0, 15.0])
    apart = []
    for path in (images[1], labels[1]):
        file: Any = nib.load(path)
        apart.append(nib.Nifti1Image(np.asarray(file.dataobj), turned.numpy() @ file.affine))
    brought = register(images[0], apart[0], fixed_label=labels[0], moving_label=apart[1], device="cpu").quality
    assert brought["initial"]["kind"] in ("rigid", "affine")
    assert brought["dice_after"] > quality["dice_after"] - 0.03


def test_the_shipped_weights_say_where_they_are_of_no_use(oblique_files: dict[str, str]) -> None:
    quality = register(**{role: oblique_files[role] for role in ("fixed", "moving")}, device="cpu").quality
    assert "unlike those that the weights were trained on" in quality["warnings"][0]


def test_what_is_wrong_is_said() -> None:
    good = {"similarity": "ncc", "ncc_before": 0.5, "ncc_after": 0.7, "folded_percent": 0.2}
    assert warnings_about(good) == []
    assert "similarity of the images fell" in warnings_about(good | {"ncc_after": 0.4})[0]
    assert warnings_about(good | {"ncc_after": 0.4, "seen_dice_after": 0.93}) == []
    assert len(warnings_about(good | {"ncc_after": 0.4, "seen_dice_after": 0.5})) == 2
    assert "structures that the policy sees" in warnings_about(good | {"seen_dice_after": 0.5})[0]
    assert "1.5 % of the voxels are folded" in warnings_about(good | {"folded_percent": 1.5})[0]
    assert "moving label was not gone by" in warnings_about(good | {"by_label": {}})[0]
    assert warnings_about(good | {"by_label": {"1": 1}}) == []
    grid = {"working_grid": {"spacing_mm": [1.6, 1.6, 1.6]}}
    assert warnings_about(good | grid) == []
    assert warnings_about(good | grid | {"trained_at_mm": [1.5, 1.5, 1.5]}) == []
    assert "trained with voxels of 1 x 1 x 1 mm" in warnings_about(good | grid | {"trained_at_mm": [1.0, 1.0, 1.0]})[0]
    assert "labels agree less" in warnings_about(good | {"dice_before": 0.8, "dice_after": 0.7})[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "steps: expected a whole number from 0 up, or auto, found -1"),
        ({"steps": "many"}, "found 'many'"),
        ({"refine": -1.0}, "refine: expected"),
        ({"uncertainty": 1}, "at least 2 rollouts, found 1"),
        ({"bundle": "nowhere"}, "bundle nowhere: expected a folder with configs/inference.json in it, found none"),
        ({"device": "abacus"}, "device abacus: expected one that can be computed on, found: Expected one of cpu, cuda"),
        ({"ckpt": "nothing.pt"}, "checkpoint nothing.pt: expected a file, found none"),
        ({"by_label": True}, "by label: expected a label of the moving image"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, oblique_files: dict[str, str]) -> None:
    with pytest.raises(InputError) as raised:
        register(oblique_files["fixed"], oblique_files["moving"], **options)
    assert words in str(raised.value)


def test_weights_that_see_nothing_cannot_go_by_a_label(oblique_files: dict[str, str], registrar: Registrar) -> None:
    with pytest.raises(InputError, match=r"by label: expected weights that see structures, found .*, trained without"):
        registrar.register(Pair.read(**oblique_files), Options(by_label=True))


def test_a_known_label_leads_the_policy_better_than_what_it_sees(hippocampus: Path, tmp_path: Path) -> None:
    """On pairs of cases that the shipped weights have not seen; the label numbered as somebody else would."""
    registrar, dice = Registrar(device="cpu"), {True: 0.0, False: 0.0}
    for moving, fixed in ((296, 309), (287, 290), (292, 308)):
        files = {"fixed": fixed, "moving": moving}
        images = {k: str(hippocampus / "imagesTr" / f"hippocampus_{i:03d}.nii.gz") for k, i in files.items()}
        for role, i in files.items():
            label = sitk.ReadImage(str(hippocampus / "labelsTr" / f"hippocampus_{i:03d}.nii.gz"))
            images[f"{role}_label"] = str(tmp_path / f"{role}.nii.gz")
            sitk.WriteImage(sitk.ChangeLabel(label, {1: 53, 2: 17}), images[f"{role}_label"])
        for by_label in dice:
            quality = registrar.register(Pair.read(**images), Options(by_label=by_label, inverse=False)).quality
            assert quality.get("by_label") == ({"1": 53, "2": 17} if by_label else None)
            dice[by_label] += quality["dice_after"] / 3
    assert dice[True] > dice[False] + 0.005


BIG = """
import sys
import nibabel as nib, numpy as np

folder = sys.argv[1]
index = np.stack(np.meshgrid(*[np.linspace(-1.6, 1.6, n, dtype=np.float32) for n in (256, 256, 180)], indexing="ij"))
for name, squeeze in (("fixed", 1.0), ("moving", 1.1)):
    r = np.sqrt((index[0] * squeeze) ** 2 + index[1] ** 2 + (index[2] / squeeze) ** 2)
    data = (1000 / (1 + np.exp(20 * (r - 1))) + 300 * np.cos(9 * r) * (r < 1)).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.eye(4)), f"{folder}/{name}.nii.gz")
"""


@pytest.mark.slow
def test_a_large_pair_takes_less_than_4_gb(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BIG, str(tmp_path)], check=True)
    run = (
        "import resource, sys; from monai_rl_reg.command_line import main; "
        f"status = main(['register', '{tmp_path}/fixed.nii.gz', '{tmp_path}/moving.nii.gz', '--output', "
        f"'{tmp_path}/out', '--device', 'cpu', '-q']); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, status)"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, encoding="utf-8", timeout=3600)
    peak, status = (int(x) for x in done.stdout.split("peak ")[1].split())
    assert status == 0
    assert peak < 4_000_000  # kilobytes
    quality = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    assert quality["working_grid"]["coarsened_to_save_memory"]
    assert quality["inverse_error_mm"] < 0.1
    assert nib.load(tmp_path / "out" / "moved.nii.gz").shape == (256, 256, 180)
