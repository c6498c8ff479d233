"""Draw a registration step by step: moving, the moved image after each step, fixed, and the deformed grid."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from monai.networks.blocks import Warp
from torch import Tensor

from monai_rl_reg.checkpoints import load_policy
from monai_rl_reg.metrics import local_ncc, mean_label_dice

CONFIG = Path(__file__).resolve().parents[2] / "bundles" / "rl_reg" / "configs" / "inference.json"
TEXT, FIXED, MOVED, GRID = "#8a929c", "#26c6da", "#ffb300", "#8a929c"  # readable on light and dark pages


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, Tensor]], Tensor | None, Tensor | None]:
    """Return the states before and after every step, and the labels of fixed and moving, (1, 1, *spatial)."""
    parser = ConfigParser(ConfigParser.load_config_file(str(arguments.config)))
    for key in ("fixed", "moving", "fixed_label", "moving_label", "steps", "spatial_dims"):
        parser[key] = getattr(arguments, key)
    parser["device"] = "cpu"
    network = load_policy(parser.get_parsed_content("network"), arguments.ckpt).eval()
    pair: dict[str, Any] = parser.get_parsed_content("dataset")[0]
    states = list(parser.get_parsed_content("inferer").trajectory(pair["image"][None], network))
    if "label" not in pair:
        return states, None, None
    label = pair["label"].as_tensor()[None]
    return states, label[:, :1], label[:, 1:]


def middle(volume: Tensor) -> np.ndarray:
    """Return the middle axial slice of (..., X, Y, Z), or the whole of (..., X, Y), the first item and channel."""
    plane = volume[0, 0]
    plane = plane[..., plane.shape[-1] // 2] if plane.ndim == 3 else plane
    return plane.float().numpy()


def outline(axes: Axes, label: Tensor, colour: str) -> None:
    """Draw the outline of every label."""
    plane = middle(label)
    for value in np.unique(plane)[1:]:
        axes.contour((plane == value).T, [0.5], colors=colour, linewidths=0.9)


def draw_grid(axes: Axes, displacement: Tensor, *, spacing: int = 2) -> None:
    """Draw where the fixed image's grid lines lie in the moving image, in the middle slice."""
    across, up = (middle(displacement[:, i : i + 1]) for i in (0, 1))
    x, y = np.meshgrid(*(np.arange(n, dtype=float) for n in across.shape), indexing="ij")
    x, y = x + across, y + up
    for i in range(0, x.shape[0], spacing):
        axes.plot(x[i], y[i], color=GRID, linewidth=0.8)
    for j in range(0, x.shape[1], spacing):
        axes.plot(x[:, j], y[:, j], color=GRID, linewidth=0.8)


def draw(
    states: list[dict[str, Tensor]], fixed_label: Tensor | None, moving_label: Tensor | None, output: Path
) -> None:
    """Draw all panels into one picture with a transparent background."""
    fixed = states[0]["fixed"]
    width, height = middle(fixed).shape
    count = len(states) + 2
    figure = Figure(figsize=(2.1 * count, 2.1 * height / width + 0.75))
    panels = figure.subplots(1, count)
    for number, (axes, state) in enumerate(zip(panels, states, strict=False)):
        axes.imshow(middle(state["moved"]).T, cmap="gray", vmin=0, vmax=1, origin="lower")
        figures = f"NCC {float(local_ncc(state['moved'], fixed)):.3f}"
        if fixed_label is not None and moving_label is not None:
            moved_label = Warp("nearest", "border")(moving_label, state["displacement"])
            figures += f"   Dice {float(mean_label_dice(moved_label, fixed_label)):.3f}"
            outline(axes, fixed_label, FIXED)
            outline(axes, moved_label, MOVED)
        title(axes, "moving" if number == 0 else f"step {number}", figures)
    axes = panels[-2]
    axes.imshow(middle(fixed).T, cmap="gray", vmin=0, vmax=1, origin="lower")
    if fixed_label is not None:
        outline(axes, fixed_label, FIXED)
    title(axes, "fixed", "")
    draw_grid(panels[-1], states[-1]["displacement"])
    title(panels[-1], "deformed grid", f"after {len(states) - 1} steps")
    for axes in panels:
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(-0.5, height - 0.5)
        axes.set_aspect("equal")
        axes.set_axis_off()
    if fixed_label is not None:
        figure.text(0.5, 0.02, "outlines of the labels:", color=TEXT, fontsize=8, ha="right")
        figure.text(0.505, 0.02, "fixed", color=FIXED, fontsize=8, weight="bold")
        figure.text(0.533, 0.02, "moved", color=MOVED, fontsize=8, weight="bold")
    figure.subplots_adjust(left=0.004, right=0.996, bottom=0.09, top=0.83, wspace=0.04)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, transparent=True)


def title(axes: Axes, name: str, figures: str) -> None:
    """Write a panel's name with its figures below."""
    axes.text(0.5, 1.12, name, transform=axes.transAxes, ha="center", color=TEXT, fontsize=10, weight="bold")
    axes.text(0.5, 1.03, figures, transform=axes.transAxes, ha="center", color=TEXT, fontsize=8)


def main() -> None:
    """Read the command line, register and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="model.pt or a training checkpoint")
    parser.add_argument("--fixed", required=True, help="fixed image")
    parser.add_argument("--moving", required=True, help="moving image")
    parser.add_argument("--fixed_label", help="labels of the fixed image")
    parser.add_argument("--moving_label", help="labels of the moving image")
    parser.add_argument("--steps", type=int, default=3, help="number of steps")
    parser.add_argument("--spatial_dims", type=int, default=3, choices=(2, 3))
    parser.add_argument("--config", type=Path, default=CONFIG, help="the bundle's inference.json")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("steps.png"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    draw(*run(arguments), arguments.output)
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
