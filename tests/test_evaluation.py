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

from monai_rl_reg.evaluation import StateMetric, StepwiseEvaluation
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
    monkeypatch.setattr("monai_rl_reg.evaluation.time.perf_counter", lambda: next(clock))
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
