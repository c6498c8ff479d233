"""Pictures of the first validation pairs in TensorBoard: the same pairs and slices at every validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from monai_rl_reg import panels
from monai_rl_reg.planes import Plane, ShownGrid

HEIGHT = 190
"""Pixels of height of a plane with square pictures."""


class RegistrationPictures:
    """Write a picture of each of the first validation pairs to TensorBoard: a row a plane, as in the report.

    From left to right: fixed, moving, moved, the difference before and after, the deformed grid on the moved image
    and, where labels are given, their outlines before and after. The validation loader must not shuffle.

    Args:
        log_dir: of the TensorBoard events.
        pairs: how many pairs.
    """

    def __init__(self, log_dir: str, *, pairs: int = 2) -> None:
        self.log_dir = log_dir
        self.pairs = pairs
        self._seen = 0
        self._writer: SummaryWriter | None = None

    def attach(self, engine: Engine) -> None:
        """Follow this evaluator, whose postprocessing is ``WarpByDisplacementd``."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self._seen = 0
        if self._writer is None:  # not before: a new run renames the folder of an old one
            self._writer = SummaryWriter(self.log_dir)

    def _write(self, engine: Engine) -> None:
        assert self._writer is not None
        items: list[Any] = [a | b for a, b in zip(engine.state.batch, engine.state.output, strict=True)]  # type: ignore[arg-type, call-overload]
        for item in items[: self.pairs - self._seen]:
            picture = draw_pair(item)
            self._writer.add_image(f"validation_pair_{self._seen}", picture, engine.state.epoch, dataformats="HWC")
            self._seen += 1
            self._writer.flush()


def draw_pair(item: dict[str, Any]) -> np.ndarray:
    """Draw one registered pair, (height, width, 3) in bytes.

    Args:
        item: of a pair on one grid: ``image`` (2, *spatial) with the grid's affine; ``fixed``, ``moving``, ``moved``
            (1, *spatial) from 0 to 1; ``pred``, the displacement (d, *spatial) in voxels; where there are labels,
            also ``fixed_label``, ``moving_label`` and ``moved_label``.
    """
    image = item["image"]
    affine = image.affine if isinstance(image, MetaTensor) else torch.eye(4)
    grid = ShownGrid(affine, image.shape[1:])
    volumes = {key: _plain(item[key]) for key in ("fixed", "moving", "moved", "pred")}
    labels = {key: _plain(item[key]) for key in ("fixed_label", "moving_label", "moved_label") if key in item}
    labelled = len(labels) == 3 and bool(labels["fixed_label"].any())
    point = grid.fullest((labels["fixed_label"] > 0).float() if labelled else volumes["fixed"].clamp(min=0))
    every = panels.grid_spacing([grid.size(plane)[i] for plane in grid.planes for i in (0, 1)])

    def columns(plane: Plane) -> dict[str, Callable[[Axes], None]]:
        cut = {key: grid.cut(volume, plane, point) for key, volume in (volumes | labels).items()}
        fixed, moving, moved = (cut[key][0] for key in ("fixed", "moving", "moved"))
        place = grid.along_plane(grid.voxels(plane, point) + cut["pred"], plane)

        def deformed(axes: Axes) -> None:
            panels.grey(axes, moved, brightness=0.7)
            panels.grid_lines(axes, place, every=every, width=0.6)

        def outlined(label: Tensor) -> Callable[[Axes], None]:
            def paint(axes: Axes) -> None:
                panels.grey(axes, fixed, brightness=0.75)
                panels.outlines(axes, cut["fixed_label"][0], panels.FIXED, width=1.0)
                panels.outlines(axes, label, panels.MOVED, width=1.0)

            return paint

        drawn: dict[str, Callable[[Axes], None]] = {
            "fixed": lambda axes: panels.grey(axes, fixed),
            "moving": lambda axes: panels.grey(axes, moving),
            "moved": lambda axes: panels.grey(axes, moved),
            "difference before": lambda axes: panels.difference(axes, moving, fixed),
            "difference after": lambda axes: panels.difference(axes, moved, fixed),
            "deformed grid": deformed,
        }
        if labelled:
            drawn |= {
                "labels before": outlined(cut["moving_label"][0]),
                "labels after": outlined(cut["moved_label"][0]),
            }
        return drawn

    rows = [columns(plane) for plane in grid.planes]
    figure = Figure(figsize=(len(rows[0]) * HEIGHT / 100, (len(rows) * HEIGHT + 24) / 100), dpi=100, facecolor="black")
    canvas = FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    top = 1 - 24 / (len(rows) * HEIGHT + 24)
    figure.subplots_adjust(left=0.002, right=0.998, bottom=0.002, top=top, wspace=0.02, hspace=0.02)
    for plane, row, drawn in zip(grid.planes, all_axes, rows, strict=True):
        for axes, (name, draw) in zip(row, drawn.items(), strict=True):
            panels.prepare(axes, grid.size(plane))
            draw(axes)
            if plane is grid.planes[0]:
                axes.set_title(name, color="white", fontsize=9, pad=4)
    canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3])


def _plain(volume: Tensor) -> Tensor:
    return convert_to_tensor(volume, track_meta=False).detach().cpu().float()
