"""Plot the validation Dice of trainings from their TensorBoard logs: python curves.py OUT.png NAME=FOLDER ..."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: str, tag: str) -> list[tuple[int, float, float]]:
    """Return (step, value, seconds since the start of the log) of a tag, over all event files of a run."""
    points, start = [], None
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path))
        events.Reload()
        start = min(start or events.FirstEventTimestamp(), events.FirstEventTimestamp())
        if tag in events.Tags()["scalars"]:
            points += [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)]
    return [(step, value, wall - (start or 0.0)) for step, value, wall in sorted(points)]


def main(output: str, *runs: str) -> None:
    """Plot Dice and folded voxels against epochs."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for run in runs:
        name, folder = run.split("=", 1)
        for axis, tag in zip(axes, ("dice", "folded_percent"), strict=True):
            points = scalars(folder, tag)
            axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", markersize=3, label=name)
            if tag == "dice":
                print(name, " ".join(f"{step}:{value:.4f}" for step, value, _ in points), f"{points[-1][2]:.0f} s")
    before = scalars(runs[0].split("=", 1)[1], "dice_before")[0][1]
    axes[0].axhline(before, color="grey", linestyle=":", label="unregistered")
    axes[0].set(xlabel="epoch", ylabel="mean Dice, validation")
    axes[1].set(xlabel="epoch", ylabel="folded voxels, %")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
