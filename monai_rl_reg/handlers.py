"""Handlers beside MONAI's: progress with the validation figures, the table of an evaluation, a result's files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler
from monai.metrics import compute_dice, compute_hausdorff_distance
from torch import Tensor
from tqdm import tqdm

from monai_rl_reg.folders import replacing_folder
from monai_rl_reg.inferer import StepwiseInferer, clock
from monai_rl_reg.nifti import write_displacement, write_image
from monai_rl_reg.pictures import strip, write_picture
from monai_rl_reg.quality import field_figures
from monai_rl_reg.tables import write_json, write_table


class TrainingProgress:
    """One progress bar over all iterations of a training, with the loss, the return and the validation figures.

    Args:
        evaluator: the validation evaluator whose metrics are shown after each validation.
        metrics: names of its metrics to show.
        time: of a training by minutes: the bar's end is told by the share of them that has gone.
    """

    def __init__(
        self,
        evaluator: Engine | None = None,
        metrics: Sequence[str] = ("dice_before", "dice", "similarity"),
        time: TrainingTime | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.metrics = metrics
        self.time = time
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}
        self.figures: dict[str, str] = {}

    def attach(self, engine: Engine) -> None:
        """Follow this trainer, and the evaluator if one was given."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iterate)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._estimate)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.TERMINATE, self._close)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self._validated)

    def _start(self, engine: Engine) -> None:
        total = (engine.state.max_epochs or 0) * (engine.state.epoch_length or 0) if self._by_epochs() else None
        self.bar = tqdm(total=total, initial=engine.state.iteration, desc="training", unit="it", dynamic_ncols=True)

    def _iterate(self, engine: Engine) -> None:
        if self.bar is None:
            return
        output: Any = engine.state.output
        figures = {key: float(output[0].get(key, np.nan)) for key in ("loss", "return")}
        self.shown = {key: f"{value:.3f}" for key, value in figures.items() if np.isfinite(value)}
        self.bar.set_postfix(self.shown | self.figures, refresh=False)
        self.bar.update()

    def _by_epochs(self) -> bool:
        return self.time is None or self.time.minutes is None

    def _estimate(self, engine: Engine) -> None:
        if self.bar is not None and self.time is not None and not self._by_epochs():
            self.bar.total = round(engine.state.iteration / self.time.progress())

    def _validated(self, engine: Engine) -> None:
        self.figures = {n: f"{engine.state.metrics[n]:.4f}" for n in self.metrics if n in engine.state.metrics}
        if self.bar is not None and self.figures:
            self.bar.write("validation: " + ", ".join(f"{name} {value}" for name, value in self.figures.items()))
            self.bar.set_postfix(self.shown | self.figures)

    def _close(self, engine: Engine) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class TrainingTime:
    """End a training after some minutes, at the end of an epoch, and tell how far it is: for the learning rate.

    Args:
        minutes: the time to train for, in minutes; None trains for all of ``max_epochs``.
        max_epochs: the trainer's.
    """

    def __init__(self, minutes: float | None, max_epochs: int) -> None:
        self.minutes = minutes
        self.max_epochs = max_epochs
        self.epoch = 0
        self.elapsed = 0.0  # in minutes, of all runs that this one resumes
        self._since = 0.0

    def attach(self, engine: Engine) -> None:
        """Follow this trainer; attach it before the handlers that end an epoch."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def progress(self) -> float:
        """Return the share of the training that is done, in [0, 1]."""
        share = self.epoch / self.max_epochs
        return min(1.0, share if self.minutes is None else max(share, self.elapsed / self.minutes))

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed training needs."""
        return {"epoch": self.epoch, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.epoch, self.elapsed = int(state["epoch"]), float(state["elapsed"])

    def _start(self, engine: Engine) -> None:
        self._since = time.monotonic()

    def _epoch(self, engine: Engine) -> None:
        now = time.monotonic()
        self.elapsed += (now - self._since) / 60
        self._since = now
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            elapsed = torch.tensor(self.elapsed, device=engine.state.device)  # type: ignore[attr-defined]
            torch.distributed.broadcast(elapsed, 0)  # all processes end with the same epoch
            self.elapsed = float(elapsed)
        self.epoch = engine.state.epoch
        if self.minutes is not None and self.elapsed >= self.minutes:
            engine.state.max_epochs = engine.state.epoch


class EpochValidation(ValidationHandler):
    """MONAI's handler, which besides validates the last epoch: what a training ends with, whatever the interval.

    Args:
        interval: validate after every so many epochs.
        validator: MONAI's evaluator.
    """

    def __init__(self, interval: int, validator: Evaluator) -> None:
        super().__init__(interval, validator)

    def attach(self, engine: Engine) -> None:
        """Follow this trainer; attach it after what may end the training, such as :class:`TrainingTime`."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._due), self)

    def _due(self, engine: Engine, epoch: int) -> bool:
        return epoch % self.interval == 0 or epoch == engine.state.max_epochs


class EvaluationTable:
    """Write ``metrics.csv``, a row a pair, and ``summary.json``, their means, when an evaluation completes.

    Reads what :class:`~monai_rl_reg.transforms.FinishOnFixedGridd` left in the output: everything is measured on the
    fixed image's own grid. ``seconds`` is the wall time of the policy's steps with composing and warping, without
    reading files. A pair that fails ends the evaluation before anything is written.

    Args:
        output_dir: where the two files go.
        spatial_dims: 2 or 3.
        labels: label values to compare; by default all that a fixed label map has.
    """

    def __init__(self, output_dir: str, *, spatial_dims: int = 3, labels: Sequence[int] | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.spatial_dims = spatial_dims
        self.labels = labels
        self.rows: list[dict[str, Any]] = []
        self._started = self._seconds = 0.0

    def attach(self, engine: Engine) -> None:
        """Follow this evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._tick)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._tock)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self.rows = []

    def _tick(self, engine: Engine) -> None:
        self._started = clock(engine.state.device)  # type: ignore[attr-defined]

    def _tock(self, engine: Engine) -> None:
        self._seconds = clock(engine.state.device) - self._started  # type: ignore[attr-defined]

    def _measure(self, engine: Engine) -> None:
        items: list[Any] = [a | b for a, b in zip(engine.state.batch, engine.state.output, strict=True)]  # type: ignore[arg-type, call-overload]
        for item in items:
            row = {
                "fixed": item["fixed_file"],
                "moving": item["moving_file"],
                "dice_before": float("nan"),
                "dice": float("nan"),
                **field_figures(item["displacement"].as_tensor(), item["displacement"].affine),
                "hd95_mm": float("nan"),
                "seconds": self._seconds / len(items),
            }
            if "fixed_label" in item:
                row |= label_figures(item["moved_label"], item["unmoved_label"], item["fixed_label"], self.labels)
            self.rows.append(row)

    def _write(self, engine: Engine) -> None:
        figures = [name for row in self.rows for name in row]
        columns = sorted(dict.fromkeys(figures), key=_column_order)
        write_table(self.output_dir / "metrics.csv", self.rows, columns)
        summary: dict[str, Any] = {"pairs": len(self.rows)}
        for name in columns[2:]:
            values = [row[name] for row in self.rows if name in row and np.isfinite(row[name])]
            summary[name] = float(np.mean(values)) if values else None
        write_json(self.output_dir / "summary.json", summary)
        shown = {k: summary[k] for k in ("pairs", "dice_before", "dice", "folded_percent", "seconds")}
        print(", ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None))
        print(f"Wrote {self.output_dir / 'metrics.csv'} and {self.output_dir / 'summary.json'}")


def label_figures(
    moved: Tensor, unmoved: Tensor, fixed: Tensor, labels: Sequence[int] | None = None
) -> dict[str, float]:
    """Return ``dice_before``, ``dice``, ``hd95_mm`` (means over the fixed map's labels) and ``dice_<label>`` each.

    Args:
        moved: label map (1, *spatial) on the fixed grid.
        unmoved: likewise, before the registration.
        fixed: likewise, with its affine.
        labels: label values to compare; by default all that ``fixed`` has.
    """
    affine = fixed.affine  # type: ignore[attr-defined]
    fixed_map, moved_map, unmoved_map = (torch.as_tensor(x).long() for x in (fixed, moved, unmoved))
    spacing = affine[:3, : fixed.ndim - 1].norm(dim=0).tolist()
    values = [int(v) for v in torch.unique(fixed_map) if v > 0 and (labels is None or int(v) in labels)]
    figures: dict[str, float] = {}
    before, distances = [], []
    for value in values:
        a, b, c = ((x == value)[None] for x in (fixed_map, moved_map, unmoved_map))
        figures[f"dice_{value}"] = float(compute_dice(b, a))
        before.append(float(compute_dice(c, a)))
        if b.any():
            distance = compute_hausdorff_distance(b, a, include_background=True, percentile=95, spacing=spacing)
            distances.append(float(distance))
    dice = [figures[f"dice_{value}"] for value in values]
    means = {"dice_before": before, "dice": dice, "hd95_mm": distances}
    return {k: float(np.mean(v)) if v else float("nan") for k, v in means.items()} | figures


class RegistrationWriter:
    """Write ``moved.nii.gz``, ``moved_label.nii.gz`` and ``displacement.nii.gz`` of a registered pair.

    All are on the fixed image's own grid; the displacement is in LPS millimetres, as ITK, ANTs and 3D Slicer read it.

    Args:
        output_dir: the folder; with several pairs each gets a numbered folder in it.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)
        self.count = 0

    def attach(self, engine: Engine) -> None:
        """Follow this evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        several = (engine.state.epoch_length or 1) > 1
        results: Any = engine.state.output
        for output in results:
            folder = self.output_dir / f"{self.count:04d}" if several else self.output_dir
            self.count += 1
            write_result(folder, output)
            print(f"Wrote the registration to {folder.resolve()}")


class PictureWriter:
    """Write the result of a stepwise picture task, ``<name>.png``, and ``steps.png``, a strip from start to result.

    With several pictures, the name is followed by a number.

    Args:
        output_dir: the folder.
        inferer: the evaluator's, with ``keep_history``.
        name: of the result's file.
        most: pictures in the strip, at most.
    """

    def __init__(self, output_dir: str, inferer: StepwiseInferer, *, name: str = "result", most: int = 6) -> None:
        self.output_dir = Path(output_dir)
        self.inferer = inferer
        self.name = name
        self.most = most
        self.count = 0

    def attach(self, engine: Engine) -> None:
        """Follow this evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        history = self.inferer.history
        several = (engine.state.epoch_length or 1) * len(history[0]) > 1
        shown = np.unique(np.linspace(0, len(history) - 1, min(self.most, len(history))).round().astype(int))
        for item in range(len(history[0])):
            suffix = f"_{self.count:04d}" if several else ""
            self.count += 1
            steps = strip([history[i][item] for i in shown], [f"{i} {'step' if i == 1 else 'steps'}" for i in shown])
            write_picture(self.output_dir / f"steps{suffix}.png", steps)
            result = self.output_dir / f"{self.name}{suffix}.png"
            write_picture(result, history[-1][item])
            print(f"Wrote {result.resolve()} and, beside it, steps{suffix}.png")


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write a result's files into a folder, in place of those of an earlier result; they appear together.

    Raises:
        InputError: if the folder cannot be made or written to.
    """
    with replacing_folder(folder, {"moved.nii.gz", "moved_label.nii.gz", "displacement.nii.gz"}) as staging:
        affine = result["displacement"].affine
        write_image(staging / "moved.nii.gz", result["moved"], affine)
        write_displacement(staging / "displacement.nii.gz", result["displacement"].as_tensor(), affine)
        if "moved_label" in result:
            write_image(staging / "moved_label.nii.gz", result["moved_label"], affine)


def _column_order(name: str) -> tuple[int, int]:
    order = ["fixed", "moving", "dice_before", "dice", "folded_percent", "sdlogj", "hd95_mm", "seconds"]
    return (order.index(name), 0) if name in order else (len(order), int(name.rsplit("_", 1)[1]))
