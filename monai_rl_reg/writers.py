"""Handlers that write what an evaluator made: a registration's files, pictures, the table of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.metrics import compute_hausdorff_distance
from torch import Tensor

from monai_rl_reg.files import replacing_folder
from monai_rl_reg.inferer import StepwiseInferer, clock
from monai_rl_reg.nifti import write_displacement, write_image
from monai_rl_reg.pictures import strip, write_picture
from monai_rl_reg.quality import dice_figures, field_figures
from monai_rl_reg.tables import write_json, write_table


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
    """Return ``dice_before``, ``dice`` and ``hd95_mm``, means over the fixed map's labels, and ``dice_<label>`` each.

    A label that the moved map has lost has a Dice of 0, and no distance.

    Args:
        moved: label map (1, *spatial) on the fixed grid.
        unmoved: likewise, before the registration.
        fixed: likewise, with its affine.
        labels: label values to compare; by default all that ``fixed`` has.
    """
    dice = dice_figures(moved, unmoved, fixed, labels)
    each: dict[str, float] = dice["dice_per_label"]
    spacing = fixed.affine[:3, : fixed.ndim - 1].norm(dim=0).tolist()  # type: ignore[attr-defined]
    distances = []
    for value in map(int, each):
        a, b = ((torch.as_tensor(x) == value)[None] for x in (fixed, moved))
        if b.any():
            distance = compute_hausdorff_distance(b, a, include_background=True, percentile=95, spacing=spacing)
            distances.append(float(distance))
    return {
        "dice_before": dice["dice_before"],
        "dice": dice["dice_after"],
        "hd95_mm": float(np.mean(distances)) if distances else float("nan"),
        **{f"dice_{value}": after for value, after in each.items()},
    }


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
        results: Any = engine.state.output
        several = (engine.state.epoch_length or 1) * len(results) > 1
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
