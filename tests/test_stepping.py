"""When the steps stop by themselves."""

from __future__ import annotations

import pytest

from monai_rl_reg.quality import LEAST_SEEN
from monai_rl_reg.stepping import GAIN, enough


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([0.5, 0.9, 0.9 + 2 * GAIN], False),
        ([0.5, 0.9, 0.9 + GAIN / 2], True),
        ([0.5, 0.9, 0.89], True),
        ([0.1, 0.11, 0.11], False),  # far apart still: it begins slowly
        ([0.1, LEAST_SEEN - 0.01, LEAST_SEEN - 0.02], False),
    ],
)
def test_what_is_seen_says_whether_it_is_enough(seen: list[float], expected: bool) -> None:
    curve = [{"ncc": 0.5, "seen_dice": x} for x in seen]
    assert enough(curve, "seen_dice", GAIN) is expected


@pytest.mark.parametrize(
    ("alike", "expected"),
    [
        ([0.2, 0.22], False),
        ([0.2, 0.205], True),
        ([0.2, 0.19], True),
        ([0.2, 0.25, 0.251], False),  # the step before gained enough for both
        ([0.2, 0.25, 0.24, 0.255], True),
        ([0.2, 0.25, 0.24, 0.265], False),  # a step that lost is no reason to end
    ],
)
def test_where_nothing_is_seen_the_similarity_of_two_steps_says_it(alike: list[float], expected: bool) -> None:
    assert enough([{"ncc": x} for x in alike], "ncc", 0.01) is expected
