"""Evaluation of stepwise image tasks: one row per image, model and number of steps, with the control beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from tqdm import tqdm

from monai_rl_reg.errors import InputError
from monai_rl_reg.inferer import clock
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.pictures import grid, write_picture
from monai_rl_reg.rollout import follow
from monai_rl_reg.tables import write_json, write_table
from monai_rl_reg.tasks.style import StyleTask
from monai_rl_reg.tasks.task import State, Task
from monai_rl_reg.video import flows_between, temporal_error

Figure = Callable[[State], Tensor]
"""A figure of merit: a state to one number per item, (B,)."""


class StateMetric:
    """A MONAI metric, or a function of tensors, as a figure of a state.

    Args:
        metric: called with the entries; returns one number per item in any shape that starts with the batch.
        keys: the entries of the state that it compares.
        region: applied to each entry first, to look at a part of the image only.
    """

    def __init__(
        self, metric: Callable[..., Any], keys: Sequence[str], region: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.metric = metric
        self.keys = keys
        self.region = region

    def __call__(self, state: State) -> Tensor:
        """Return the figure of each item, (B,)."""
        entries = [state[key] if self.region is None else self.region(state[key]) for key in self.keys]
        values: Tensor = self.metric(*entries)
        return values.reshape(len(values), -1).mean(1)


class StepwiseEvaluation:
    """Run models over a data set and judge the state after every step.

    Writes ``metrics.csv``, a row per image, model and number of steps (0 is the start), and ``summary.json``, the
    means: ``{model: {figure: [value after 0 steps, after 1, ...]}}``.

    Args:
        task: the environment.
        data: batches of MONAI's ``image`` and, where the task wants one, ``label``; ``name`` names the items.
        models: name to network and number of steps, for example ``{"policy": [network, 10], "control": [other, 1]}``;
            a model whose network is None is left out.
        figures: name to figure of merit.
        output_dir: where the two files go.
        examples: how many of the first items ``examples.png`` shows.
        shown: the entries of the state to show: of the start, of every model's end, or the same in both.
        device: where to compute.
    """

    def __init__(
        self,
        task: Task,
        data: Iterable[Mapping[str, Any]],
        models: Mapping[str, tuple[PlannerActor | None, int]],
        figures: Mapping[str, Figure],
        output_dir: str,
        *,
        examples: int = 32,
        shown: Sequence[str] = (),
        device: str | torch.device = "cpu",
    ) -> None:
        self.task = task
        self.data = data
        self.examples = examples
        self.shown = shown
        self.models = {name: (network, steps) for name, (network, steps) in models.items() if network is not None}
        self.figures = figures
        self.output_dir = Path(output_dir)
        self.device = device

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Evaluate, write the two files and return the summary."""
        rows: list[dict[str, Any]] = []
        gallery: list[list[Tensor]] = []
        count = 0
        for network, _ in self.models.values():
            network.eval()
        for batch in tqdm(self.data, desc="evaluating", dynamic_ncols=True):
            image, label = (
                None if batch.get(key) is None else convert_to_tensor(batch[key], track_meta=False).to(self.device)
                for key in ("image", "label")
            )
            names = batch.get("name", range(count, count + len(image)))  # type: ignore[arg-type]
            count += len(image)  # type: ignore[arg-type]
            ends: list[State] = []
            for model, (network, steps) in self.models.items():
                state, seconds = self.task.reset(image, label), 0.0  # type: ignore[arg-type]
                rows += self._rows(names, model, 0, state, seconds)
                started = clock(self.device)
                for step, state in enumerate(follow(network, self.task, state, steps), start=1):  # noqa: B020
                    seconds += clock(self.device) - started
                    rows += self._rows(names, model, step, state, seconds)
                    started = clock(self.device)
                ends.append(state)
            if self.shown and len(gallery) < self.examples:
                gallery += _examples(self.task.reset(image, label), ends, self.shown)  # type: ignore[arg-type]
        if gallery:
            write_picture(self.output_dir / "examples.png", grid(gallery[: self.examples]))
        return self._write(rows)

    def _rows(self, names: Iterable[Any], model: str, step: int, state: State, seconds: float) -> list[dict[str, Any]]:
        columns = {name: figure(state).tolist() for name, figure in self.figures.items()}
        names = list(names)
        return [
            {"image": name, "model": model, "steps": step}
            | {figure: values[i] for figure, values in columns.items()}
            | {"seconds": seconds / len(names)}
            for i, name in enumerate(names)
        ]

    def _write(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        summary: dict[str, Any] = {"images": len({row["image"] for row in rows})}
        for model, (_, steps) in self.models.items():
            summary[model] = {
                figure: [_mean(rows, model, step, figure) for step in range(steps + 1)]
                for figure in [*self.figures, "seconds"]
            }
            last = ", ".join(f"{figure} {values[-1]:.4g}" for figure, values in summary[model].items())
            print(f"{model}, {steps} {'steps' if steps > 1 else 'step'}: {last}")
        _write_table(self.output_dir, rows, summary)
        return summary


def _examples(start: State, ends: Sequence[State], shown: Sequence[str]) -> list[list[Tensor]]:
    """Return the pictures of each item: what stays the same once, what changes after every model."""
    columns: list[Tensor] = []
    for key in shown:
        changes = any(end[key] is not start[key] and not torch.equal(end[key], start[key]) for end in ends)
        columns += [end[key] for end in ends] if changes else [start[key]]
    return [[column[i].cpu() for column in columns] for i in range(len(columns[0]))]


def _mean(rows: list[dict[str, Any]], model: str, step: int, figure: str) -> float:
    values = torch.tensor([row[figure] for row in rows if row["model"] == model and row["steps"] == step])
    return float(values.nanmean())


class ClipEvaluation:
    """Run models over clips, frame after frame, and judge what comes out: style, content and steadiness.

    Writes ``metrics.csv``, a row per clip, model and number of steps, and ``summary.json``, the means:
    ``{model: {steps: {figure: value}}}``. The figures are the task's style and content loss and ``temporal``, the warp
    error along the optical flow of the clip as it was.

    Args:
        task: gives style and content loss.
        clips: name to clip.
        models: name to network and inferer, a function of the number of steps, for example
            ``{"policy": [network, lambda steps: FramewiseInferer(task, steps)]}``; without a network it is left out.
        steps: the numbers of steps to try.
        output_dir: where the two files go.
        frames: at most so many frames of each clip.
        device: where to compute.
    """

    def __init__(
        self,
        task: StyleTask,
        clips: Mapping[str, Sequence[Mapping[str, Any]]],
        models: Mapping[str, tuple[nn.Module | None, Callable[[int], Inferer]]],
        steps: Sequence[int],
        output_dir: str,
        *,
        frames: int = 16,
        device: str | torch.device = "cpu",
    ) -> None:
        self.task = task
        self.clips = clips
        self.models = {name: (network, make) for name, (network, make) in models.items() if network is not None}
        self.steps = steps
        self.output_dir = Path(output_dir)
        self.frames = frames
        self.device = device

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Evaluate, write the two files and return the summary.

        Raises:
            InputError: if a clip has a single frame.
        """
        rows: list[dict[str, Any]] = []
        for clip, data in tqdm(self.clips.items(), desc="evaluating", unit="clip", dynamic_ncols=True):
            content = [data[i]["image"] for i in range(min(self.frames, len(data)))]
            if len(content) < 2:
                raise InputError(f"clip {clip}: expected at least two frames, found {len(content)}")
            flows = flows_between(content)
            for model, (network, make) in self.models.items():
                network.eval()
                for steps in self.steps:
                    rows.append({"clip": clip, "model": model, "steps": steps})
                    rows[-1] |= self._judge(content, flows, network, make(steps))
        summary: dict[str, Any] = {"clips": len(self.clips)}
        for model in self.models:
            summary[model] = {
                steps: {figure: _mean(rows, model, steps, figure) for figure in list(rows[0])[3:]}
                for steps in self.steps
            }
            for steps, figures in summary[model].items():
                print(f"{model}, {steps} steps: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        _write_table(self.output_dir, rows, summary)
        return summary

    def _judge(
        self,
        content: Sequence[Tensor],
        flows: Sequence[tuple[Tensor, Tensor]],
        network: nn.Module,
        inferer: Inferer,
    ) -> dict[str, float]:
        stylised, style, closeness = [], [], []
        started = clock(self.device)
        for frame in content:
            stylised.append(inferer(frame[None].to(self.device), network))
        seconds = (clock(self.device) - started) / len(content)
        for frame, result in zip(content, stylised, strict=True):
            state = {"content": frame[None].to(self.device), "stylised": result}
            style.append(float(self.task.style_loss(state)))
            closeness.append(float(self.task.content_loss(state)))
        return {
            "style": sum(style) / len(style),
            "content": sum(closeness) / len(closeness),
            "temporal": temporal_error([result[0].cpu() for result in stylised], flows),
            "seconds_per_frame": seconds,
        }


def _write_table(folder: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    write_table(folder / "metrics.csv", rows, list(rows[0]))
    write_json(folder / "summary.json", summary)
    print(f"Wrote {folder / 'metrics.csv'} and {folder / 'summary.json'}")
