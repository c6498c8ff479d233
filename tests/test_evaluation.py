from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import DataLoader
from monai.metrics import PSNRMetric
from torch import Tensor, nn

from monai_rl_reg.evaluation import ClipEvaluation, StateMetric, StepwiseEvaluation
from monai_rl_reg.inferer import StepwiseInferer
from monai_rl_reg.pictures import GAP, read_picture
from monai_rl_reg.tasks.task import Act, State, Task


class NumberTask(Task):
    """The image is a number that the actions add up to; the label is another one to be reached."""

    replay_keys = ("number", "goal")

    def reset(self, image: Tensor, label: Tensor | None = None) -> State:
        goal = torch.zeros_like(image) if label is None else label
        return {"number": image, "goal": goal}

    def observe(self, state: State) -> Tensor:
        return torch.cat([state["number"], state["goal"]], 1)

    def advance(self, state: State, action: Tensor) -> State:
        return state | {"number": state["number"] + action}

    def step(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
        raise AssertionError("an evaluation does not ask for rewards")

    def loss(self, state: State, action: Tensor, act: Act) -> dict[str, Tensor]:
        return {}

    def output(self, state: State) -> Tensor:
        return state["number"]


class Approach(nn.Module):
    """A policy that goes a share of the way to the goal; in training mode it stays."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, observation: Tensor) -> Tensor:
        return (0 if self.training else self.share) * (observation[:, 1:] - observation[:, :1])


def batches(numbers: Sequence[float], goals: Sequence[float] | None, *, size: int = 2) -> Any:
    rows = [
        {"image": torch.full((1, 2, 2), number), "name": f"n{i}"}
        | ({} if goals is None else {"label": torch.full((1, 2, 2), goals[i])})
        for i, number in enumerate(numbers)
    ]
    return DataLoader(rows, batch_size=size)


def figures() -> Mapping[str, Any]:
    return {
        "error": lambda state: (state["number"] - state["goal"]).abs().flatten(1).mean(1),
        "number": lambda state: state["number"].flatten(1).mean(1),
    }


def read(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_rows_and_means_are_those_computed_by_hand(tmp_path: Path) -> None:
    models: Any = {"policy": (Approach(0.5), 2), "control": (Approach(0.75), 1)}
    data = batches([8.0, 4.0, 2.0], [0.0, 8.0, 2.0])
    summary = StepwiseEvaluation(NumberTask(), data, models, figures(), str(tmp_path / "out")).run()

    rows = read(tmp_path / "out")
    assert list(rows[0]) == ["image", "model", "steps", "error", "number", "seconds"]
    found = {(r["image"], r["model"], int(r["steps"])): (float(r["error"]), float(r["number"])) for r in rows}
    assert found == {
        ("n0", "policy", 0): (8, 8),
        ("n0", "policy", 1): (4, 4),
        ("n0", "policy", 2): (2, 2),
        ("n1", "policy", 0): (4, 4),
        ("n1", "policy", 1): (2, 6),
        ("n1", "policy", 2): (1, 7),
        ("n2", "policy", 0): (0, 2),
        ("n2", "policy", 1): (0, 2),
        ("n2", "policy", 2): (0, 2),
        ("n0", "control", 0): (8, 8),
        ("n0", "control", 1): (2, 2),
        ("n1", "control", 0): (4, 4),
        ("n1", "control", 1): (1, 7),
        ("n2", "control", 0): (0, 2),
        ("n2", "control", 1): (0, 2),
    }
    assert len(rows) == len(found)
    assert summary["images"] == 3
    assert summary["policy"]["error"] == pytest.approx([12 / 3, 6 / 3, 3 / 3])
    assert summary["policy"]["number"] == pytest.approx([14 / 3, 12 / 3, 11 / 3])
    assert summary["control"]["error"] == pytest.approx([12 / 3, 3 / 3])
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_seconds_grow_with_the_steps_and_are_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr("monai_rl_reg.evaluation.clock", lambda device: next(clock))
    models: Any = {"policy": (Approach(0.5), 3)}
    StepwiseEvaluation(NumberTask(), batches([1.0, 2.0], None), models, figures(), str(tmp_path)).run()
    seconds = [(r["steps"], float(r["seconds"])) for r in read(tmp_path) if r["image"] == "n0"]
    assert seconds == [("0", 0), ("1", 0.5), ("2", 1), ("3", 1.5)]  # a second a step, for two images


def test_model_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    models: Any = {"policy": (Approach(0.5), 1), "control": (None, 1)}
    summary = StepwiseEvaluation(NumberTask(), batches([1.0], None), models, figures(), str(tmp_path)).run()
    assert set(summary) == {"images", "policy"}
    assert {row["model"] for row in read(tmp_path)} == {"policy"}


def test_images_without_a_name_are_told_apart(tmp_path: Path) -> None:
    data = DataLoader([{"image": torch.full((1, 2, 2), float(i))} for i in range(5)], batch_size=2)
    models: Any = {"policy": (Approach(0.5), 2), "control": (Approach(0.5), 1)}
    summary = StepwiseEvaluation(NumberTask(), data, models, figures(), str(tmp_path)).run()
    assert summary["images"] == 5
    names = [row["image"] for row in read(tmp_path) if (row["model"], row["steps"]) == ("control", "1")]
    assert len(set(names)) == 5


def test_mean_leaves_out_what_is_not_a_number(tmp_path: Path) -> None:
    undefined = {"ratio": lambda state: (state["number"] / state["goal"]).flatten(1).mean(1)}
    models: Any = {"policy": (Approach(0.0), 0)}
    data = batches([0.0, 3.0], [0.0, 1.0])
    assert StepwiseEvaluation(NumberTask(), data, models, undefined, str(tmp_path)).run()["policy"]["ratio"] == [3]


def test_state_metric_takes_a_metric_of_monai() -> None:
    state = {"a": torch.rand(3, 3, 8, 8), "b": torch.rand(3, 3, 8, 8)}
    found = StateMetric(PSNRMetric(max_val=1.0), ("a", "b"))(state)
    expected = -10 * (state["a"] - state["b"]).square().flatten(1).mean(1).log10()
    assert found.shape == (3,)
    torch.testing.assert_close(found, expected)


def test_state_metric_looks_at_a_region_and_keeps_no_memory_of_earlier_states() -> None:
    state = {"a": torch.zeros(2, 3, 8, 8), "b": torch.zeros(2, 3, 8, 8)}
    state["a"][:, :, :4] = 0.1
    metric = StateMetric(PSNRMetric(max_val=1.0), ("a", "b"), lambda x: x[:, :, :4])
    for _ in range(2):
        torch.testing.assert_close(metric(state), torch.full((2,), 20.0))
    torch.testing.assert_close(StateMetric(PSNRMetric(max_val=1.0), ("a", "b"))(state), torch.full((2,), 23.0103))


def test_state_metric_takes_a_function() -> None:
    state = {"a": torch.arange(12.0).reshape(2, 3, 1, 2)}
    assert StateMetric(lambda a: a, ("a",))(state).tolist() == [2.5, 8.5]


def test_examples_show_what_stays_once_and_what_changes_for_every_model(tmp_path: Path) -> None:
    models: Any = {"policy": (Approach(0.5), 2), "control": (Approach(0.75), 1)}
    data = batches([0.8, 0.4, 0.2], [0.0, 0.8, 0.2])
    options: Any = {"examples": 2, "shown": ["goal", "number"]}
    StepwiseEvaluation(NumberTask(), data, models, figures(), str(tmp_path), **options).run()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "summary.json", "examples.png"}
    picture = read_picture(tmp_path / "examples.png")
    pitch = 2 + GAP
    shown = [round(float(picture[0, 0, left]), 1) for left in range(0, 3 * pitch, pitch)]
    assert shown == [0.0, 0.2, 0.2]  # goal, policy after two steps, control after one
    second = 3 * pitch + 2 * GAP
    shown = [round(float(picture[0, 0, left]), 1) for left in range(second, second + 3 * pitch, pitch)]
    assert shown == [0.8, 0.7, 0.7]
    assert picture.shape[2] < 3 * second, "no third"


class GreyTask(NumberTask):
    """A picture whose style is its brightness, and whose content its distance to where it began."""

    def reset(self, image: Tensor, label: Tensor | None = None) -> State:
        return {"number": image, "goal": image}

    def style_loss(self, state: State) -> Tensor:
        return state["stylised"].flatten(1).mean(1)

    def content_loss(self, state: State) -> Tensor:
        return (state["stylised"] - state["content"]).abs().flatten(1).mean(1)


class Darken(nn.Module):
    """A policy that takes a tenth off; if it flickers, off every other frame only."""

    def __init__(self, flickers: bool) -> None:
        super().__init__()
        self.flickers, self.calls = flickers, 0

    def forward(self, observation: Tensor) -> Tensor:
        self.calls += 1
        return (-0.1 if self.calls % 2 or not self.flickers else 0.0) * torch.ones_like(observation[:, :3])


def test_clips_are_judged_frame_by_frame(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    texture = 0.3 + 0.4 * torch.rand(3, 12, 16).repeat_interleave(4, 1).repeat_interleave(4, 2)
    clips = {"still": [{"image": texture}] * 6}
    task: Any = GreyTask()

    def inferer(steps: int) -> StepwiseInferer:
        return StepwiseInferer(task, steps)

    models: Any = {
        "policy": (Darken(False), inferer),
        "control": (Darken(True), inferer),
        "left out": (None, inferer),
    }
    summary = ClipEvaluation(task, clips, models, [1], str(tmp_path), frames=4).run()
    brightness = float(texture.mean())
    assert set(summary) == {"clips", "policy", "control"}
    expected = {
        "policy": {"style": brightness - 0.1, "content": 0.1, "temporal": 0.0},
        "control": {"style": brightness - 0.05, "content": 0.05, "temporal": 0.1},
    }
    for model, figures_of in expected.items():
        for name, value in figures_of.items():
            assert summary[model][1][name] == pytest.approx(value, abs=1e-3), (model, name)
    rows = read(tmp_path)
    assert [(row["clip"], row["model"], row["steps"]) for row in rows] == [
        ("still", "policy", "1"),
        ("still", "control", "1"),
    ]
    assert json.loads((tmp_path / "summary.json").read_text())["control"]["1"]["content"] == pytest.approx(0.05)
