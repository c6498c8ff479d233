"""Tables and figures as files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from monai_rl_reg.errors import InputError
from monai_rl_reg.tables import write_json, write_table


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    write_table(
        tmp_path / "made" / "t.csv", [{"name": "Müller", "a": 1 / 3, "b": math.nan}, {"a": 2}], ["name", "a", "b"]
    )
    assert (tmp_path / "made" / "t.csv").read_text(encoding="utf-8").splitlines() == [
        "name,a,b",
        "Müller,0.333333,",
        ",2,",
    ]
    write_json(tmp_path / "t.json", {"a": [math.inf, 1.5], "b": {"c": math.nan}})
    assert json.loads((tmp_path / "t.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="expected a folder that can be written to"):
        write_table(tmp_path / "out" / "t.csv", [], [])
    assert (tmp_path / "out").read_text() == ""
