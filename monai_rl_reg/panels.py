"""The drawings of a registration, on matplotlib axes in millimetres of a plane, and their way into a web page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from contourpy import contour_generator
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D
from PIL import Image
from torch import Tensor

Draw = Callable[[Axes], None]

FIXED, MOVED, GRID, FOLD = "#29d3e8", "#ffb300", "#39d0ff", "#ff2a2a"
"""Colours of the fixed outlines, the moved ones, the deformed grid and folded voxels."""
DIFFERENCE: Colormap = LinearSegmentedColormap.from_list(
    "difference", ["#a9dcff", "#2c7fdb", "#0b0d10", "#d9701a", "#ffdca8"]
)
JACOBIAN: Colormap = LinearSegmentedColormap.from_list(
    "jacobian", ["#c9f7c0", "#2e9e4f", "#16181c", "#9150d6", "#ead4ff"]
)
UNCERTAINTY: Colormap = colormaps["inferno"]
_TEXT = "#010203"  # stands for the page's own text colour in an SVG


def window(image: Tensor) -> tuple[float, float]:
    """Return the intensities of an image to show as black and white: its percentiles 0.5 and 99.5."""
    values = image.flatten()
    some = values[:: max(1, len(values) // 1_000_000)].float().cpu().numpy()
    low, high = (float(v) for v in np.percentile(some, (0.5, 99.5)))
    if high <= low:  # nearly everywhere the same
        low, high = float(some.min()), float(some.max())
    return low, high if high > low else low + 1


def scaled(image: Tensor, limits: tuple[float, float]) -> Tensor:
    """Return an image with these intensities brought to 0 and 1, what lies outside clipped."""
    low, high = limits
    return ((image.detach().cpu().float() - low) / (high - low)).clamp(0, 1)


def grey(axes: Axes, image: Tensor, *, brightness: float = 1.0) -> None:
    """Show an image (down, across) from 0 to 1 in grey."""
    _show(axes, image, "gray", 0.0, 1.0 / brightness, "bicubic")


def difference(axes: Axes, moved: Tensor, fixed: Tensor) -> None:
    """Show moved - fixed, (down, across) from 0 to 1 each: orange where moved is brighter, blue where it is darker."""
    _show(axes, moved - fixed, DIFFERENCE, -0.7, 0.7, "bilinear")


def checkerboard(axes: Axes, fixed: Tensor, moved: Tensor, *, squares: int = 7) -> None:
    """Show fixed and moved, (down, across) from 0 to 1 each, in turn, in squares in the plane's millimetres.

    Args:
        axes: where to draw.
        fixed: the top left square is its.
        moved: the next one is its.
        squares: how many along the longer side.
    """
    width, height = _size(axes)
    side = max(width, height) / squares
    grey(axes, fixed)
    grey(axes, moved)
    corners = [(i * side, j * side) for i in range(squares) for j in range(squares) if (i + j) % 2]
    clip = Path.make_compound_path(*[Path.unit_rectangle().transformed(_square(*corner, side)) for corner in corners])
    axes.images[-1].set_clip_path(clip, axes.transData)
    for i in range(1, squares):
        axes.axvline(i * side, color="white", alpha=0.15, linewidth=0.5)
        axes.axhline(i * side, color="white", alpha=0.15, linewidth=0.5)


def heat(axes: Axes, values: Tensor, colours: Colormap, low: float, high: float) -> None:
    """Show values (down, across) in a colour map, each voxel as it is."""
    _show(axes, values, colours, low, high, "nearest")


def folds(axes: Axes, determinant: Tensor) -> None:
    """Mark the voxels of a determinant (down, across) that is zero or less; each with a ring, so that one is seen."""
    folded = (determinant <= 0).numpy()
    if not folded.any():
        return
    marks = np.zeros((*folded.shape, 4))
    marks[folded] = to_rgba(FOLD)
    width, height = _size(axes)
    axes.imshow(marks, extent=(0, width, height, 0), interpolation="nearest")
    row, column = folded.nonzero()
    x, y = (column + 0.5) * width / folded.shape[1], (row + 0.5) * height / folded.shape[0]
    axes.scatter(x, y, s=30, facecolors="none", edgecolors=FOLD, linewidths=0.8)


def outlines(axes: Axes, labels: Tensor, colour: str, *, width: float = 1.4) -> None:
    """Draw the outline of every label value above 0 of a map (down, across)."""
    values, labels_across = labels.numpy(), labels.shape[1]
    w, h = _size(axes)
    scale = np.array([w / labels_across, h / labels.shape[0]])
    lines = []
    for value in np.unique(values[values > 0]):
        inside = np.pad((values == value).astype(np.float64), 1)  # closed at the edge, too
        lines += [(line - 0.5) * scale for line in _contours(inside, 0.5)]
    thin = 0.6 if len(lines) > 25 else 1.0
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width * thin, capstyle="round"))


def grid_lines(axes: Axes, place: Tensor, *, every: float, width: float = 0.9) -> None:
    """Draw a regular grid of the moving image as the deformation carries it along.

    Args:
        axes: where to draw.
        place: where in the moving image each voxel of the plane comes from, (2, down, across), in millimetres.
        every: millimetres between the lines in the moving image.
        width: of the lines, in points.
    """
    w, h = _size(axes)
    scale = np.array([w / place.shape[2], h / place.shape[1]])
    lines = []
    for coordinate in place.numpy():
        levels = np.arange(np.ceil(coordinate.min() / every), np.floor(coordinate.max() / every) + 1) * every
        for level in levels:
            lines += [(line + 0.5) * scale for line in _contours(coordinate, level)]
    axes.add_collection(LineCollection(lines, colors=GRID, linewidths=width, alpha=0.85))


def grid_spacing(size: Sequence[float], lines: int = 20) -> float:
    """Return a round distance in millimetres that gives about ``lines`` lines along the longer of two sides."""
    least = max(size) / lines
    scale = 10.0 ** math.floor(math.log10(least))
    return float(next(step * scale for step in (1, 1.5, 2, 3, 4, 5, 7, 10) if step * scale >= least))


def prepare(axes: Axes, size: tuple[float, float]) -> None:
    """Make axes show a plane of this width and height in millimetres, with nothing around it."""
    axes.set_axis_off()
    axes.set_xlim(0, size[0])
    axes.set_ylim(size[1], 0)
    axes.set_aspect("equal")


def to_jpeg(size: tuple[float, float], draw: Draw, *, longest: int = 460, most: int = 56_000) -> tuple[str, int, int]:
    """Draw a panel and return it as a data URI, with its width and height in pixels.

    Args:
        size: width and height in millimetres.
        draw: draws on axes of this size.
        longest: pixels of the longer side.
        most: bytes of the JPEG; its quality falls from 86 as far as 40 to keep to it.
    """
    scale = longest / max(size)
    width, height = (max(24, round(side * scale)) for side in size)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="black")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    prepare(axes, size)
    draw(axes)
    canvas.draw()
    image = Image.fromarray(np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    for quality in (86, 76, 64, 52, 40):
        buffer = io.BytesIO()
        image.save(buffer, format="jpeg", quality=quality, subsampling=0, optimize=True)
        if buffer.tell() <= most:
            break
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), width, height


def curve_svg(curves: Mapping[str, Sequence[float]]) -> str:
    """Plot curves over the steps 0, 1, ... as an SVG whose text has the colour of the page around it.

    Args:
        curves: values by name, at most four; values that are not finite are left out.
    """
    figure = Figure(figsize=(5.2, 2.9))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.1, 0.16, 0.86, 0.8))
    styles = zip(("#0d8ea3", "#d98200", "#7d57c9", "#3c9a4b"), ("o-", "s--", "^-.", "d:"), strict=True)
    for (name, values), (colour, style) in zip(curves.items(), styles, strict=False):
        axes.plot(range(len(values)), values, style, color=colour, label=name, linewidth=2, markersize=5)
    axes.set_xlabel("step", color=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#808890", alpha=0.3, linewidth=0.7)
    axes.tick_params(colors=_TEXT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#808890")
    axes.legend(frameon=False, labelcolor=_TEXT, loc="best")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT, "currentColor")


def gradient(colours: Colormap) -> str:
    """Return a colour map, left to right, as a CSS background."""
    stops = ", ".join(to_hex(colours(i / 12)) for i in range(13))
    return f"linear-gradient(to right, {stops})"


def _show(axes: Axes, image: Tensor, colours: str | Colormap, low: float, high: float, interpolation: str) -> None:
    width, height = _size(axes)
    axes.imshow(
        image.float().numpy(),
        cmap=colours,
        vmin=low,
        vmax=high,
        extent=(0, width, height, 0),
        interpolation=interpolation,
        aspect="equal",
    )


def _contours(values: np.ndarray, level: float) -> list[np.ndarray]:
    """Lines of points (N, 2), column and row, where values (rows, columns) are at this level."""
    lines: Any = contour_generator(z=values, line_type="Separate").lines(level)
    return list(lines)


def _square(x: float, y: float, side: float) -> Affine2D:
    return Affine2D().scale(side).translate(x, y)


def _size(axes: Axes) -> tuple[float, float]:
    """The width and height in millimetres that :func:`prepare` gave the axes."""
    return float(axes.get_xlim()[1]), float(axes.get_ylim()[0])
