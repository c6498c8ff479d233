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


@pytest.mark.parametrize(("gain", "expected"), [(2.0, False), (0.5, True), (-1.0, True)])
def test_where_nothing_is_seen_the_similarity_says_it(gain: float, expected: bool) -> None:
    assert enough([{"ncc": 0.2}, {"ncc": 0.2 + 0.01 * gain}], "ncc", 0.01) is expected
