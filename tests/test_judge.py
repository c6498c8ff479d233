"""The judge: what it expects is what happened to registrations like it, and a checkpoint keeps it."""

from __future__ import annotations

import shutil
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Spacing
from torch import Tensor

from monai_rl_reg.anatomy import Anatomy
from monai_rl_reg.checkpoints import load_checkpoint
from monai_rl_reg.command_line import main
from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import grid_points, reduced, sample
from monai_rl_reg.judge import NEAREST, WIDER, Judge, calibrate, load_judge
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.nifti import read_image
from monai_rl_reg.phantoms import make_cohort
from monai_rl_reg.policy_bundle import DEFAULT_BUNDLE, PolicyBundle
from monai_rl_reg.quality import warnings_about
from monai_rl_reg.registration import register
from monai_rl_reg.working import MARGIN, GivenPair


def write_pairs(path: Path, cohort: Path, count: int, *, labels: bool = True) -> Path:
    rows = ["fixed,moving,fixed_label,moving_label"]
    for pair in list(permutations(range(6), 2))[:count]:
        row = [f"{cohort}/imagesTr/phantom_{i:03d}.nii.gz" for i in pair]
        row += [f"{cohort}/labelsTr/phantom_{i:03d}.nii.gz" if labels else "" for i in pair]
        rows.append(",".join(row))
    path.write_text("\n".join(rows) + "\n")
    return path


def test_it_expects_what_the_nearest_known_registrations_had() -> None:
    seen = torch.linspace(0, 1, 501)[torch.randperm(501)]
    judge = Judge(seen, 0.5 + 0.4 * seen)
    for value in (0.2, 0.5, 0.8):
        expected = judge.expect(value)
        assert expected.dice == pytest.approx(0.5 + 0.4 * value, abs=1e-3)
        width = WIDER * 0.4 * 0.9 * (NEAREST - 1) * 0.002
        assert expected.high - expected.low == pytest.approx(width, abs=2e-3)
        assert expected.low < expected.dice < expected.high
    assert judge.expect(-1.0) == judge.expect(0.0), "beyond what is known it answers with the last that is"


def test_it_never_expects_less_of_what_agrees_better() -> None:
    seen = torch.linspace(0, 1, 501)
    judge = Judge(seen, torch.where(seen < 0.8, 0.5 + 0.4 * seen, 1.3 - 0.6 * seen) + 0.02 * torch.randn(501))
    expected = [judge.expect(value).dice for value in seen.tolist()]
    assert all(before <= after for before, after in pairwise(expected))
    assert expected[100] == pytest.approx(0.58, abs=0.01)
    assert 0.7 < expected[-1] < 0.82


def test_its_range_holds_nearly_all_of_what_it_was_taught_with() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.rand(count, generator=generator)
        return seen, seen.sqrt() * 0.8 + 0.05 * torch.randn(count, generator=generator)

    judge = Judge(*draw(1000))
    inside = 0
    for seen, true in zip(*draw(1000), strict=True):
        expected = judge.expect(float(seen))
        inside += int(expected.low <= true <= expected.high)
    assert 0.98 < inside / 1000 < 1, "it is wider than the nine of ten of such: other people's differ more"


def test_a_checkpoint_gets_a_judge_and_a_registration_its_expected_dice(
    cohort: Path, trained: Path, trained_with_labels: Path, tmp_path: Path
) -> None:
    ckpt = shutil.copy(trained / "model.pt", tmp_path / "model.pt")
    pairs = write_pairs(tmp_path / "pairs.csv", cohort, 10)
    before = load_checkpoint(str(ckpt))
    command = ["calibrate", "--ckpt", str(ckpt), "--pairs", str(pairs), "--device", "cpu", "--quiet"]
    assert main([*command, "--witness", str(trained_with_labels / "model.pt")]) == 0
    after = load_checkpoint(str(ckpt))
    assert after.keys() == {"network", "voxel_size", "settings", "critic", "judge"}
    kept = after["judge"]["witness"].values()
    assert len({value.data_ptr() for value in kept}) < len(kept), "what a U-Net names twice is kept once"
    assert all(torch.equal(value, before["network"][key]) for key, value in after["network"].items())
    assert [path.name for path in tmp_path.glob("*.pt")] == ["model.pt"]
    judge = load_judge(str(ckpt), 3)
    assert judge is not None
    assert judge.witness is not None
    assert len(judge.seen) == len(judge.true) == 60, "five steps and the start of each pair"
    images = [cohort / "imagesTr" / f"phantom_{i:03d}.nii.gz" for i in (0, 1)]
    quality = register(*images, ckpt=ckpt, device="cpu").quality
    expected = judge.expect(quality["seen_dice_after"])
    assert quality["expected_dice"] == expected.dice
    assert quality["expected_dice_range"] == [expected.low, expected.high]
    assert main(command) == 0, "again, by the witness that it has"
    again = load_judge(str(ckpt), 3)
    assert again is not None
    assert again.witness is not None
    torch.testing.assert_close(again.true, judge.true)


def test_a_policy_that_sees_is_its_own_witness(cohort: Path, trained_with_labels: Path, tmp_path: Path) -> None:
    ckpt = shutil.copy(trained_with_labels / "model.pt", tmp_path / "model.pt")
    judge = calibrate(write_pairs(tmp_path / "pairs.csv", cohort, 10), str(ckpt), device="cpu")
    assert judge.witness is None
    keys = {"network", "voxel_size", "settings", "anatomy", "judge", "critic"}
    assert load_checkpoint(str(ckpt)).keys() == keys
    loaded = load_judge(str(ckpt), 3)
    assert loaded is not None
    assert torch.equal(loaded.seen, judge.seen)


@pytest.fixture
def witnessed(cohort: Path) -> tuple[PolicyBundle, MetaTensor, MetaTensor]:
    """The bundle's weights without labels, which have a witness, and two images."""
    bundle = PolicyBundle(ckpt=DEFAULT_BUNDLE / "models" / "model_without_labels.pt", device="cpu")
    files = [str(cohort / "imagesTr" / f"phantom_{i:03d}.nii.gz") for i in (0, 1)]
    fixed, moving = (read_image(file) for file in files)
    return bundle, fixed, moving


def test_weights_for_two_dimensions_get_a_judge_too(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path / "cohort", count=6, size=24, spatial_dims=2)
    policy = PlannerActor(2, 2, 2, channels=(16, 32, 64, 64), plan_channels=64, action_bound=2.5, action_stride=2)
    ckpt, witness = str(tmp_path / "model.pt"), str(tmp_path / "witness.pt")
    torch.save({"network": policy.state_dict()}, ckpt)
    torch.save({"anatomy": Anatomy(2, 4).state_dict()}, witness)
    judge = calibrate(write_pairs(tmp_path / "pairs.csv", cohort, 12), ckpt, witness=witness, device="cpu")
    assert len(judge.seen) == 12 * 6
    assert load_judge(ckpt, 2) is not None


def test_the_witness_sees_each_image_as_it_was_given(
    witnessed: tuple[PolicyBundle, MetaTensor, MetaTensor],
) -> None:
    bundle, fixed, moving = witnessed
    initial = torch.eye(4, dtype=torch.float64)
    initial[:3, 3] = torch.tensor([2.5, -1.5, 0.5])
    labels = [MetaTensor(torch.ones_like(x.as_tensor()), affine=x.affine) for x in (fixed, moving)]
    working = GivenPair(bundle, fixed, moving).onto_fixed(initial)
    labelled = GivenPair(bundle, fixed, moving, *labels).onto_fixed(initial)
    cases = [bundle.case_transform({"image": image})["image"] for image in (fixed, moving)]
    assert bundle.witness is not None
    seen = [bundle.see(bundle.witness, case.as_tensor()).argmax(0, keepdim=True).float() for case in cases]
    assert all(len(x.unique()) > 1 for x in seen)
    assert working.seen is not None
    assert working.label is None
    assert torch.equal(working.seen[:1], seen[0])
    to_moving = torch.linalg.inv(cases[1].affine.double()) @ initial @ working.image.affine.double()
    index = grid_points(reduced(to_moving, 3), working.image.shape[1:]).float()
    assert torch.equal(working.seen[1:], sample(seen[1], index, mode="nearest", outside="zeros"))
    assert labelled.seen is not None
    assert labelled.label is not None
    assert torch.equal(labelled.seen, working.seen)
    assert labelled.label[0].all(), "the labels that are given stay apart"


def looked_at(bundle: PolicyBundle, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that takes the shape of every image that the bundle's networks see from now on."""
    shapes: list[tuple[int, ...]] = []

    def see(network: Anatomy, image: Tensor) -> Tensor:
        shapes.append(tuple(image.shape[1:]))
        return torch.cat([torch.zeros_like(image), torch.ones_like(image)])

    monkeypatch.setattr(bundle, "see", see)
    return shapes


def test_the_witness_looks_at_a_large_image_only_where_the_other_one_lies(
    witnessed: tuple[PolicyBundle, MetaTensor, MetaTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, fixed, moving = witnessed
    volume = moving.as_tensor()
    large = MetaTensor(torch.cat([volume] * 4, dim=1), affine=moving.affine)
    shapes = looked_at(bundle, monkeypatch)
    working = GivenPair(bundle, fixed, large).onto_fixed(torch.eye(4, dtype=torch.float64))
    assert shapes[0] == tuple(fixed.shape[1:])
    assert all(n <= m + 2 * MARGIN + 1 for n, m in zip(shapes[1], fixed.shape[1:], strict=True))
    assert working.seen is not None
    assert working.seen.all()


def test_an_image_is_looked_at_once_however_many_transforms_are_tried(
    witnessed: tuple[PolicyBundle, MetaTensor, MetaTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, fixed, moving = witnessed
    shapes = looked_at(bundle, monkeypatch)
    given = GivenPair(bundle, fixed, moving)
    moved = torch.eye(4, dtype=torch.float64)
    moved[0, 3] = 1.5
    first, second = given.onto_fixed(torch.eye(4, dtype=torch.float64)), given.onto_fixed(moved)
    assert shapes == [tuple(x.shape[1:]) for x in (fixed, moving)]
    assert not torch.equal(first.image, second.image)


def test_a_moving_image_of_another_spacing_is_looked_at_in_the_fixed_one_s(
    witnessed: tuple[PolicyBundle, MetaTensor, MetaTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, fixed, moving = witnessed
    shapes = looked_at(bundle, monkeypatch)
    fine: Any = Spacing([s / 2 for s in moving.pixdim.tolist()])(moving)
    assert all(n > 1.9 * m for n, m in zip(fine.shape[1:], moving.shape[1:], strict=True))
    working = GivenPair(bundle, fixed, fine).onto_fixed(torch.eye(4, dtype=torch.float64))
    assert all(abs(n - m) <= 1 for n, m in zip(shapes[1], moving.shape[1:], strict=True))
    assert working.seen is not None
    assert working.seen.all()


def test_without_a_judge_nothing_is_expected(cohort: Path, trained: Path) -> None:
    assert load_judge(str(trained / "model.pt"), 3) is None
    images = [cohort / "imagesTr" / f"phantom_{i:03d}.nii.gz" for i in (0, 1)]
    assert "expected_dice" not in register(*images, ckpt=trained / "model.pt", device="cpu").quality


def test_what_cannot_be_calibrated_is_refused(
    cohort: Path, trained: Path, trained_with_labels: Path, tmp_path: Path
) -> None:
    ckpt = shutil.copy(trained / "model.pt", tmp_path / "model.pt")
    content = ckpt.read_bytes()
    pairs = write_pairs(tmp_path / "pairs.csv", cohort, 2)
    with pytest.raises(InputError, match="expected one that sees structures, or a witness"):
        calibrate(pairs, str(ckpt), device="cpu")
    with pytest.raises(InputError, match="expected weights of a training with labels"):
        calibrate(pairs, str(ckpt), witness=str(ckpt), device="cpu")
    witness = str(trained_with_labels / "model.pt")
    with pytest.raises(InputError, match="expected at least 9 pairs, found 2"):
        calibrate(pairs, str(ckpt), witness=witness, device="cpu")
    unlabelled = write_pairs(tmp_path / "unlabelled.csv", cohort, 2, labels=False)
    with pytest.raises(InputError, match="expected labels of both images, found no fixed_label"):
        calibrate(unlabelled, str(ckpt), witness=witness, device="cpu")
    assert ckpt.read_bytes() == content


def test_a_poor_expectation_is_a_warning_and_a_good_one_excuses_a_lower_similarity() -> None:
    figures = {"similarity": "ncc", "ncc_before": 0.5, "ncc_after": 0.7, "folded_percent": 0.2, "seen_dice_after": 0.7}
    good = figures | {"expected_dice": 0.75, "expected_dice_range": [0.7, 0.8]}
    poor = figures | {"expected_dice": 0.55, "expected_dice_range": [0.45, 0.64]}
    assert warnings_about(good) == []
    assert warnings_about(good | {"ncc_after": 0.4}) == []
    assert warnings_about(poor)[0].startswith("a Dice of 0.55 only (0.45 to 0.64) is to be expected of the labels")
    assert len(warnings_about(poor | {"ncc_after": 0.4})) == 2
