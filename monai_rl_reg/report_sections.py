"""What a report shows of a registration: its sections, each with rows of pictures, a picture a plane."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from torch import Tensor

from monai_rl_reg import panels
from monai_rl_reg.geometry import jacobian_determinant, reduced, sample, transform_points
from monai_rl_reg.panels import Draw
from monai_rl_reg.planes import Plane, ShownGrid

if TYPE_CHECKING:
    from monai.data import MetaTensor

    from monai_rl_reg.registration import Registration

Cut = Callable[[Plane], Tensor]
"""Gives the image to show in a plane, (down, across)."""


@dataclass(frozen=True)
class Row:
    """Pictures of one kind.

    Args:
        name: of the row, for its caption and the pictures' alternative texts.
        draw: returns what draws a plane.
        key: by which the page's script finds the pictures, if it needs them.
    """

    name: str
    draw: Callable[[Plane], Draw]
    key: str = ""


@dataclass(frozen=True)
class Legend:
    """What the colours of a section mean: a colour map with a text at either end, or marks with a text each."""

    colours: Colormap | None = None
    ends: tuple[str, str] = ("", "")
    marks: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Section:
    """A heading, a text that says how to read it, and rows of pictures."""

    title: str
    text: str
    rows: Sequence[Row]
    legend: Legend = field(default_factory=Legend)


class Pictures:
    """The pictures of a registration: slices through one point, the same for all.

    The point is, in every direction, where the labels cover most; without labels, where the fixed image is brightest
    as a whole. Both images are scaled to [0, 1] by their own percentiles first, the moved one as the moving one.

    Args:
        result: the registration.
    """

    def __init__(self, result: Registration) -> None:
        self.result = result
        fixed, moving = _plain(result.fixed), _plain(result.moving)
        moving_window = panels.window(moving)
        self.fixed = panels.scaled(fixed, panels.window(fixed))
        self.moving = panels.scaled(moving, moving_window)
        self.moved = panels.scaled(_plain(result.moved), moving_window)
        self.dims = fixed.ndim - 1
        self.grid = ShownGrid(result.fixed.affine, fixed.shape[1:])
        label = result.fixed_label if result.fixed_label is not None else result.moved_label
        mass = self.fixed if label is None or not label.any() else (_plain(label) > 0).float()
        self.point = self.grid.fullest(mass)
        linear = torch.linalg.inv(self.grid.affine[: self.dims, : self.dims]).float()
        self.displacement = torch.tensordot(linear, _plain(result.displacement).float(), dims=1)  # in fixed voxels
        self.determinant = jacobian_determinant(self.displacement[None])

    def sections(self) -> list[Section]:
        """Return all sections of pictures but the blend and the animation, in the order of the page."""
        sections = [self._images(), self._checkerboard(), self._difference()]
        if self.result.moved_label is not None:
            sections.append(self._outlines())
        sections += [self._grid(), self._jacobian()]
        if self.result.uncertainty is not None:
            sections.append(self._uncertainty())
        return sections

    @cached_property
    def before(self) -> list[tuple[str, Cut]]:
        """The moving image before the steps, by name: as it lies, and after an initial alignment if there was one."""
        stages: list[tuple[str, Cut]] = [("before", self._moving_as_it_lies)]
        initial = self.result.quality.get("initial", {})
        if initial.get("kind", "none") not in ("none", "identity"):
            stages.append(("after the initial alignment", self._moving_as_aligned))
        return stages

    def _images(self) -> Section:
        def draw(cut: Cut, plane: Plane) -> Draw:
            return lambda axes: panels.grey(axes, cut(plane))

        rows = [Row("Fixed", partial(draw, self._fixed_cut), "fixed")]
        for name, cut in self.before:
            rows.append(Row(f"Moving, {name}", partial(draw, cut), "before" if name == "before" else ""))
        rows.append(Row("Moved", partial(draw, self._moved_cut), "moved"))
        return Section(
            "Images",
            "All on the fixed image's grid. “Before” is the moving image where its own file places it. Black is "
            "also where the moving image does not reach.",
            rows,
        )

    def _checkerboard(self) -> Section:
        def draw(cut: Cut, plane: Plane) -> Draw:
            return lambda axes: panels.checkerboard(axes, self._fixed_cut(plane), cut(plane))

        rows = [Row(name.capitalize(), partial(draw, cut)) for name, cut in [*self.before, ("after", self._moved_cut)]]
        text = "Squares of the fixed image and of the other one in turn. Edges should run on from square to square."
        return Section("Checkerboard", text, rows)

    def _difference(self) -> Section:
        def draw(cut: Cut, plane: Plane) -> Draw:
            return lambda axes: panels.difference(axes, cut(plane), self._fixed_cut(plane))

        rows = [Row(name.capitalize(), partial(draw, cut)) for name, cut in [*self.before, ("after", self._moved_cut)]]
        return Section(
            "Difference",
            "Moved minus fixed, each scaled by its own brightness. Black is agreement; a pair of coloured rims "
            "along an edge is a shift. Of use only where both images have the same contrast.",
            rows,
            Legend(panels.DIFFERENCE, ("fixed is brighter", "moved is brighter")),
        )

    def _outlines(self) -> Section:
        result = self.result

        def draw(cut: Cut, plane: Plane) -> Draw:
            def paint(axes: Axes) -> None:
                panels.grey(axes, self._fixed_cut(plane), brightness=0.75)
                if result.fixed_label is not None:
                    panels.outlines(axes, self._cut(_plain(result.fixed_label), plane), panels.FIXED)
                panels.outlines(axes, cut(plane), panels.MOVED)

            return paint

        stages = [("after", result.moved_label)]
        if result.unmoved_label is not None:
            stages.insert(0, (self.before[-1][0], result.unmoved_label))
        rows = [
            Row(name.capitalize(), partial(draw, partial(self._cut, _plain(label))))
            for name, label in stages
            if label is not None
        ]
        marks = [(panels.FIXED, "fixed")] if result.fixed_label is not None else []
        return Section(
            "Label outlines",
            "Outlines over the fixed image. Where two lines are one, the labels agree."
            if marks
            else "Outlines of the moving image's labels, carried along, over the fixed image.",
            rows,
            Legend(marks=[*marks, (panels.MOVED, "moving (before), moved (after)")]),
        )

    def _grid(self) -> Section:
        every = panels.grid_spacing([self.grid.size(plane)[i] for plane in self.grid.planes for i in (0, 1)])

        def draw(plane: Plane) -> Draw:
            def paint(axes: Axes) -> None:
                panels.grey(axes, self._moved_cut(plane), brightness=0.7)
                panels.grid_lines(axes, self._place(plane), every=every)

            return paint

        return Section(
            "Deformed grid",
            f"A straight grid, drawn every {every:g} mm on the moving image and carried along with it. Lines that "
            "bend gently are a smooth deformation; lines that cross or close into loops are folds. Motion through "
            "the plane does not show.",
            [Row("Grid on the moved image", draw)],
        )

    def _jacobian(self) -> Section:
        logarithm = self.determinant.clamp(1e-3).log()
        size = logarithm.abs()[self.determinant > 0]
        high = float(np.percentile(size[:: max(1, len(size) // 1_000_000)].numpy(), 99.5)) if len(size) else 1.0
        high = min(max(0.05, math.ceil(high * 20) / 20), 2.0)

        def draw(point: Sequence[int], plane: Plane) -> Draw:
            def paint(axes: Axes) -> None:
                panels.heat(axes, self._cut(logarithm, plane, point), panels.JACOBIAN, -high, high)
                self._anatomy(axes, plane, point)
                panels.folds(axes, self._cut(self.determinant, plane, point))

            return paint

        folded = int((self.determinant <= 0).sum())
        rows = [Row("Log Jacobian", partial(draw, self.point))]
        marks = []
        if folded:
            share = 100 * folded / self.determinant.numel()
            text = f"{folded:,} of {self.determinant.numel():,} voxels ({share:.2g} %) are folded: no tissue does that."
            marks = [(panels.FOLD, "folded")]
            worst = self.determinant[0].argmin()
            voxel = [int(i) for i in np.unravel_index(int(worst), self.determinant.shape[1:])]
            if not any((self._cut(self.determinant, plane) <= 0).any() for plane in self.grid.planes):
                rows.append(Row("Through the deepest fold", partial(draw, self.grid.shown(voxel))))
        else:
            text = "No voxel is folded."
        return Section(
            "Local change of size",
            "Logarithm of the Jacobian determinant of the whole transform, initial alignment included: 0 (black) "
            "keeps its size, 0.69 is a factor of two. " + text,
            rows,
            Legend(
                panels.JACOBIAN,
                (f"-{high:.2g}: moving tissue was stretched", f"+{high:.2g}: it was shrunk"),
                marks,
            ),
        )

    def _uncertainty(self) -> Section:
        assert self.result.uncertainty is not None
        spread = _plain(self.result.uncertainty).float()
        limits = (0.0, max(panels.window(spread)[1], 1e-3))

        def draw(plane: Plane) -> Draw:
            def paint(axes: Axes) -> None:
                panels.heat(axes, self._cut(spread, plane), panels.UNCERTAINTY, *limits)
                self._anatomy(axes, plane, self.point)

            return paint

        return Section(
            "Uncertainty",
            "How far the displacement varies, voxel by voxel, between registrations with plans drawn at random "
            "(standard deviation). It is the policy's own doubt, not a measured error.",
            [Row("Standard deviation of the displacement", draw)],
            Legend(panels.UNCERTAINTY, ("0 mm", f"{limits[1]:.2g} mm or more")),
        )

    def _anatomy(self, axes: Axes, plane: Plane, point: Sequence[int]) -> None:
        """Thin outlines of the fixed labels, where there are any, to find one's way in a map."""
        if self.result.fixed_label is not None:
            panels.outlines(axes, self._cut(_plain(self.result.fixed_label), plane, point), "#c8ced6", width=0.6)

    def _cut(self, volume: Tensor, plane: Plane, point: Sequence[int] | None = None) -> Tensor:
        return self.grid.cut(volume, plane, self.point if point is None else point)[0]

    def _fixed_cut(self, plane: Plane) -> Tensor:
        return self._cut(self.fixed, plane)

    def _moved_cut(self, plane: Plane) -> Tensor:
        return self._cut(self.moved, plane)

    def _world(self, plane: Plane) -> Tensor:
        return transform_points(self.grid.affine, self.grid.voxels(plane, self.point))

    def _moving_as_it_lies(self, plane: Plane) -> Tensor:
        return _sample_world(self.moving, self.result.moving, self._world(plane))

    def _moving_as_aligned(self, plane: Plane) -> Tensor:
        return _sample_world(_plain(self.result.working)[1:], self.result.working, self._world(plane))

    def _place(self, plane: Plane) -> Tensor:
        """Where the voxels of a plane come from, (2, down, across), in millimetres along the plane."""
        moved = self.grid.voxels(plane, self.point) + self.grid.cut(self.displacement, plane, self.point)
        return self.grid.along_plane(moved, plane)


def _plain(image: MetaTensor) -> Tensor:
    return image.as_tensor().detach().cpu()


def _sample_world(volume: Tensor, grid: MetaTensor, world: Tensor) -> Tensor:
    """Sample a volume (1, *spatial) on the grid of an image at world points (d, *shape); 0 outside; (*shape)."""
    to_voxels = torch.linalg.inv(reduced(grid.affine.double(), world.shape[0]))
    return sample(volume, transform_points(to_voxels, world).float(), outside="zeros")[0]
