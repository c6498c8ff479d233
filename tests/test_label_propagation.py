from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_atlases import cases_of

from monai_rl_reg import Registrar
from monai_rl_reg.atlases import Case, CommonSpace
from monai_rl_reg.errors import InputError
from monai_rl_reg.label_propagation import LabelPropagation
from monai_rl_reg.metrics import mean_label_dice
from monai_rl_reg.nifti import read_image, read_label, write_image
from monai_rl_reg.request import Options

NAMES = {f"label_{i}": i for i in range(1, 5)}
QUICK = Options(steps=1)


@pytest.fixture(scope="module")
def propagation(tmp_path_factory: pytest.TempPathFactory) -> LabelPropagation:
    space = CommonSpace(tmp_path_factory.mktemp("space") / "affines.json")
    return LabelPropagation(Registrar(device="cpu"), space)


def test_a_draft_lies_on_its_image(propagation: LabelPropagation, cohort: Path, tmp_path: Path) -> None:
    cases = cases_of(cohort, labelled=4)
    target = cases[4]
    draft = propagation.draft(target.image, cases, NAMES, count=2, options=QUICK)
    image = read_image(target.image)
    assert draft.label.shape == image.shape
    torch.testing.assert_close(draft.label.affine, image.affine)
    assert {int(v) for v in draft.label.unique()} <= {0, 1, 2, 3, 4}
    assert len(draft.atlases) == 2
    assert draft.correlations == sorted(draft.correlations, reverse=True)
    truth = read_label(cohort / "labelsTr" / Path(target.image).name, image, target.image).as_tensor()
    assert float(mean_label_dice(draft.label.as_tensor()[None].int(), truth[None].int())) > 0.3
    figures = draft.figures()
    assert json.loads(json.dumps(figures)) == figures
    assert 0 < figures["disagreement"] < 1
    low, high = figures["expected_dice_range"]
    assert low <= figures["expected_dice"] <= high
    files = draft.save(tmp_path / "result")
    assert all(Path(file).is_file() for file in files.values())


def test_the_named_atlas_is_the_only_one(propagation: LabelPropagation, cohort: Path) -> None:
    cases = cases_of(cohort, labelled=3)
    draft = propagation.draft(cases[5].image, cases, NAMES, atlas=cases[1].name, count=3, options=QUICK)
    assert draft.atlases == [cases[1].name]
    assert draft.disagreement is None


def test_the_most_similar_case_is_chosen_and_the_image_itself_never(
    propagation: LabelPropagation, cohort: Path
) -> None:
    cases = cases_of(cohort)
    found = propagation.choose(cases[0].image, cases, 6, NAMES)
    assert len(found) == 5
    assert cases[0].name not in [case.name for case, _ in found]
    assert [value for _, value in found] == sorted((value for _, value in found), reverse=True)


def test_only_the_asked_label_is_propagated(propagation: LabelPropagation, cohort: Path) -> None:
    cases = cases_of(cohort, labelled=1)
    draft = propagation.draft(cases[1].image, cases, {"label_3": 3}, options=QUICK)
    assert draft.label.unique().tolist() == [0, 3]
    with pytest.raises(InputError, match="expected the label liver"):
        propagation.draft(cases[1].image, cases, {"liver": 9}, options=QUICK)


def test_an_atlas_without_the_asked_label_is_passed_over(
    propagation: LabelPropagation, cohort: Path, tmp_path: Path
) -> None:
    cases = cases_of(cohort, labelled=3)
    nearest = propagation.choose(cases[5].image, cases, 1, NAMES)[0][0]
    image = read_image(nearest.image)
    label = read_label(nearest.label, image, nearest.image)
    write_image(tmp_path / "label.nii.gz", label.as_tensor().clamp(max=1).int(), label.affine)
    cases = [replace(case, label=str(tmp_path / "label.nii.gz")) if case == nearest else case for case in cases]
    draft = propagation.draft(cases[5].image, cases, {"label_3": 3}, count=2, options=QUICK)
    assert len(draft.atlases) == 2
    assert nearest.name not in draft.atlases
    with pytest.raises(InputError, match="expected the label label_3"):
        propagation.draft(cases[5].image, cases, {"label_3": 3}, atlas=nearest.name, options=QUICK)


@pytest.mark.parametrize(("labelled", "atlas", "count"), [(0, "auto", 1), (1, "nobody", 1), (1, "auto", 0)])
def test_what_cannot_be_drafted_is_said(
    propagation: LabelPropagation, cohort: Path, labelled: int, atlas: str, count: int
) -> None:
    cases = cases_of(cohort, labelled=labelled)
    with pytest.raises(InputError, match="atlas"):
        propagation.draft(cases[5].image, cases, NAMES, atlas=atlas, count=count)


def test_a_label_on_another_grid_is_refused(propagation: LabelPropagation, cohort: Path) -> None:
    cases = cases_of(cohort)
    wrong = Case("wrong", cases[0].image, cases[1].label)
    with pytest.raises(InputError, match="expected the grid of its image"):
        propagation.draft(cases[2].image, [wrong], NAMES, options=QUICK)


def test_doubt_grows_with_disagreement(propagation: LabelPropagation, cohort: Path) -> None:
    cases = cases_of(cohort, labelled=3)
    same = [cases[0], Case("twin", cases[0].image, cases[0].label)]
    assert propagation.doubt(cases[4].image, same, NAMES, count=2) == pytest.approx(0, abs=1e-6)
    assert propagation.doubt(cases[4].image, cases, NAMES, count=3) > 0.01
    assert propagation.doubt(cases[4].image, cases[:1], NAMES) > 0  # of one atlas, by sampled plans
    assert propagation.doubt(cases[4].image, cases[:1], {"label_4": 4}) > 0


def test_five_atlases_are_better_than_one_on_unseen_hippocampi(
    propagation: LabelPropagation, hippocampus: Path
) -> None:
    """On three of the 20 cases that the shipped weights have not seen."""

    def case(i: int) -> Case:
        paths = [str(hippocampus / f"{what}Tr" / f"hippocampus_{i:03d}.nii.gz") for what in ("images", "labels")]
        return Case(f"hippocampus_{i:03d}", *paths)

    atlases, dice = [case(i) for i in (19, 41, 56, 93, 104, 106)], {1: [], 5: []}
    for target in (case(i) for i in (296, 309, 287)):
        image = read_image(target.image)
        truth = target.read_label(image, {"anterior": 1, "posterior": 2}).as_tensor()[None].int()
        for count, found in dice.items():
            draft = propagation.draft(target.image, atlases, {"anterior": 1, "posterior": 2}, count=count)
            found.append(float(mean_label_dice(draft.label.as_tensor()[None].int(), truth)))
            assert draft.registration.quality["by_label"] == {"1": 1, "2": 2}
    assert sum(dice[1]) / 3 > 0.8
    assert sum(dice[5]) / 3 > max(0.84, sum(dice[1]) / 3)


def test_a_case_that_cannot_be_used_is_passed_over(
    propagation: LabelPropagation, cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cases = cases_of(cohort)[:3]
    flat = Case("flat", str(tmp_path / "flat.nii.gz"), cases[1].label)
    write_image(flat.image, torch.rand(1, 20, 20), torch.eye(4))
    chosen = propagation.choose(cases[0].image, [flat, *cases], 3, NAMES)
    assert {case.name for case, _ in chosen} == {cases[1].name, cases[2].name}
    assert "atlas flat: " in caplog.text
    with pytest.raises(InputError, match="expected"):
        propagation.choose(cases[0].image, [flat], 1, NAMES)
