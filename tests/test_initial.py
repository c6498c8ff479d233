"""Which transform a registration begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from monai_rl_reg import initial
from monai_rl_reg.affine import Alignment
from monai_rl_reg.initial import SEEN_ENOUGH, TRIAL_GAIN, initial_transform
from monai_rl_reg.nifti import read_image
from monai_rl_reg.policy_bundle import PolicyBundle
from monai_rl_reg.quality import LEAST_SEEN
from monai_rl_reg.working import GivenPair

HERE = torch.eye(4, dtype=torch.float64)
THERE = HERE + 1


@pytest.fixture
def pair(cohort: Path) -> GivenPair:
    files = [str(cohort / "imagesTr" / f"phantom_{i:03d}.nii.gz") for i in (0, 1)]
    return GivenPair(PolicyBundle(device="cpu"), *(read_image(file) for file in files))


@pytest.mark.parametrize(
    ("alone", "aligned", "looked_for", "taken"),
    [
        (SEEN_ENOUGH, None, False, False),
        (SEEN_ENOUGH - 0.01, SEEN_ENOUGH, True, False),
        (SEEN_ENOUGH - 0.01, SEEN_ENOUGH + TRIAL_GAIN, True, True),
        (LEAST_SEEN, None, True, False),  # aligned they do not overlap
        (LEAST_SEEN - 0.01, 0.1, True, True),  # what little is seen does not count
        (None, None, True, True),  # the images do not overlap, or nothing is seen
    ],
)
def test_an_alignment_is_taken_where_the_policy_needs_it(
    pair: GivenPair,
    monkeypatch: pytest.MonkeyPatch,
    alone: float | None,
    aligned: float | None,
    looked_for: bool,
    taken: bool,
) -> None:
    calls = []

    def align(*images: object, one_modality: bool) -> Alignment:
        calls.append(images)
        return Alignment(THERE, "affine", 0.1, 0.6)

    monkeypatch.setattr(initial, "align", align)
    monkeypatch.setattr(
        initial, "_seen_after_trial", lambda _, transform: alone if torch.equal(transform, HERE) else aligned
    )
    transform, figures = initial_transform(pair, "auto")
    assert bool(calls) == looked_for
    assert torch.equal(transform, THERE if taken else HERE)
    assert figures["kind"] == ("affine" if taken else "identity")
    assert figures.get("given_up") == ("affine" if looked_for and not taken else None)


def test_where_no_steps_follow_the_policy_is_not_asked(pair: GivenPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "align", lambda *images, **how: Alignment(THERE, "affine", 0.1, 0.6))
    monkeypatch.setattr(initial, "_seen_after_trial", None)  # is not called
    transform, figures = initial_transform(pair, "auto", alone=True)
    assert torch.equal(transform, THERE)
    assert figures["kind"] == "affine"


def test_what_is_given_is_not_questioned(pair: GivenPair) -> None:
    assert torch.equal(initial_transform(pair, THERE)[0], THERE)
    assert torch.equal(initial_transform(pair, "none")[0], HERE)
