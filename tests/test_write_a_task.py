"""Docs page write_a_task.md: its code blocks are run as they stand, and what the page says of them is checked."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, ROOT

PAGE = (ROOT / "docs" / "write_a_task.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def figures(text: str) -> torch.Tensor:
    """Read the lines ``step 0: NCC 0.43, Dice 0.60, error 3.09 pixels`` as (steps, 3)."""
    rows = re.findall(r"^step \d+: NCC (\S+), Dice (\S+), error (\S+) pixels$", text, flags=re.MULTILINE)
    return torch.tensor([[float(value) for value in row] for row in rows])


def run(code: str) -> tuple[dict[str, Any], torch.Tensor]:
    names: dict[str, Any] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "write_a_task.md", "exec"), names)
    return names, figures(printed.getvalue())


@pytest.fixture(scope="module")
def page() -> tuple[dict[str, Any], torch.Tensor]:
    """The names that the page's code leaves behind, and the figures that it prints."""
    return run("\n".join(blocks("python")))


def test_code_is_as_short_as_the_page_says() -> None:
    limit = int(re.search(r"fewer than (\d+) lines", PAGE)[1])  # type: ignore[index]
    assert sum(bool(line.strip()) for block in blocks("python") for line in block.splitlines()) < limit == 80


def test_training_reaches_what_the_page_shows(page: tuple[dict[str, Any], torch.Tensor]) -> None:
    shown, reached = figures("\n".join(blocks("text"))), page[1]
    assert shown.shape == reached.shape == (7, 3)
    # other seeds moved NCC and Dice by up to 0.02, the error by up to 0.15 pixels
    assert ((reached - shown).abs() < torch.tensor([0.05, 0.05, 0.3])).all(), reached


def test_steps_bring_the_images_together_and_recover_the_matrix(page: tuple[dict[str, Any], torch.Tensor]) -> None:
    (before, after), names = page[1][[0, -1]], page[0]
    assert after[0] > before[0] + 0.3
    assert after[1] > before[1] + 0.25
    assert after[2] < before[2] / 4
    sought = torch.linalg.inv(names["made"])
    left = (names["state"]["affine"] - sought).abs().mean()
    assert left < (torch.eye(3) - sought).abs().mean() / 3


def test_task_keeps_the_contract(page: tuple[dict[str, Any], torch.Tensor]) -> None:
    names = page[0]
    task, state = names["task"], names["task"].reset(names["image"][:8], names["label"][:8])
    kept = {key: value.clone() for key, value in state.items()}
    action = (0.1 * torch.randn(8, 2, 32, 32)).requires_grad_()
    after, reward, terminated = task.step(state, action)
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    assert {key for key in state if after[key] is state[key]} == {"fixed", "moving", "fixed_label", "moving_label"}
    assert reward.shape == terminated.shape == (8,)
    assert terminated.dtype == torch.bool
    assert torch.equal(task.advance(state, action)["affine"], after["affine"])

    stored = {key: state[key] for key in task.replay_keys}
    task.observe(stored)
    sum(task.loss(stored, action, names["policy"]).values()).backward()
    assert action.grad.abs().sum() > 0


@pytest.mark.slow
def test_control_reaches_about_the_same_as_the_page_says() -> None:
    code = "\n".join(blocks("python"))
    assert code.count("reinforcement=True") == 1
    assert 0.3 < run(code.replace("reinforcement=True", "reinforcement=False"))[1][-1, 2] < 0.8


def test_bundle_config_trains(tmp_path: Path) -> None:
    code = blocks("python")
    module = code[: next(i for i, block in enumerate(code) if "manual_seed" in block)]
    (tmp_path / "affine_task.py").write_text("\n".join(module), encoding="utf-8")
    (tmp_path / "affine.json").write_text(blocks("json")[0], encoding="utf-8")
    command = next(block for block in blocks("bash") if "affine.json" in block)
    files = re.search(r'--config_file "(.*)"', command)[1]  # type: ignore[index]
    files = files.replace("bundles/rl_reg/configs", str(CONFIGS))
    arguments = ["run", "training", "--config_file", files, "--max_epochs", "1", "--epoch_length", "4"]
    result = subprocess.run(
        [sys.executable, "-m", "monai.bundle", *arguments],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "validation: dice 0." in result.stdout
    assert (tmp_path / "output" / "affine" / "model.pt").is_file()
