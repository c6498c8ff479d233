"""A registration as one page that opens offline in a browser: pictures, figures and warnings in plain words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from monai_rl_reg import __version__, panels
from monai_rl_reg.files import replacing
from monai_rl_reg.geometry import sample
from monai_rl_reg.panels import Draw
from monai_rl_reg.planes import Plane, ShownGrid
from monai_rl_reg.report_sections import Legend, Pictures, Section
from monai_rl_reg.similarity import title

if TYPE_CHECKING:
    from monai_rl_reg.registration import Registration

MOST_FRAMES = 12
"""Steps shown in the animation, at most; of more, as many spread evenly, the first and the last among them."""

Figure = tuple[tuple[str, ...], str, str, str]
"""Keys of the quality figures, their name, format, and what they mean."""

FIGURES: tuple[Figure, ...] = (
    (
        ("dice_before", "dice_after"),
        "Label overlap (Dice)",
        "{:.3f}",
        "Mean over the labels before and after the steps; 1 is complete overlap.",
    ),
    (
        ("tre_before_mm", "tre_after_mm"),
        "Landmarks, mm (TRE)",
        "{:.2f}",
        "Mean distance in mm of the landmarks that both images have, before and after the steps.",
    ),
    (("folded_percent",), "Folded voxels", "{:.3g} %", "Where the deformation turns tissue inside out; 0 is right."),
    (("sdlogj",), "Unevenness (SDlogJ)", "{:.3f}", "Spread of the local change of size; less is smoother."),
    (("inverse_error_mm",), "Error of the inverse", "{:.2g} mm", "How far there and back misses, on average."),
    (("inverse_error_max_mm",), "Error of the inverse, at most", "{:.2g} mm", "Where it misses by most."),
    (("steps",), "Steps", "{:.0f}", "Small deformations composed."),
    (("seconds",), "Time", "{:.1f} s", "Wall time of the registration."),
)
"""Besides the similarity. What else there is comes below them as it is."""


def write_report(result: Registration, path: str | Path) -> None:
    """Write one self-contained page about a registration; complete or not at all.

    Args:
        result: the registration.
        path: of the HTML file; a file that is there is replaced.

    Raises:
        InputError: if the folder cannot be made or written to.
    """
    pictures = Pictures(result)
    body = [_blend(pictures.grid)]
    body += [_section(section, pictures.grid) for section in pictures.sections()]
    body += [_steps(result), _figures(result.quality)]
    template = Template(resources.files("monai_rl_reg").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title="Registration report",
        subtitle=" ".join(
            escape(f"{role.capitalize()} image: {Path(str(result.quality.get(role, ''))).name} {_describe(image)}.")
            for role, image in (("fixed", result.fixed), ("moving", result.moving))
        ),
        summary=_summary(result.quality),
        plane_buttons=_plane_buttons(pictures.grid),
        body="\n".join(body),
        version=escape(__version__),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _describe(image: Tensor) -> str:
    grid = ShownGrid(image.affine, image.shape[1:])  # type: ignore[attr-defined]
    spacing = [grid.spacing[grid.axes.index(axis)] for axis in range(len(grid.axes))]
    return f"({' x '.join(map(str, image.shape[1:]))} voxels of {' x '.join(f'{s:.3g}' for s in spacing)} mm)"


def _summary(quality: Mapping[str, Any]) -> str:
    """The warnings, or that there are none, and the first figures as tiles."""
    warnings = [escape(str(text)) for text in quality.get("warnings", [])]
    if warnings:
        items = "".join(f"<li>{text[:1].upper()}{text[1:]}</li>" for text in warnings)
        notice = f'<div class="notice warn"><strong>Look closely.</strong><ul>{items}</ul></div>'
    else:
        notice = (
            '<div class="notice good"><strong>No figure raised a warning.</strong> That does not prove the result '
            "right: look at the edges and outlines below.</div>"
        )
    tiles = []
    for keys, name, form, _ in _told(quality):
        value = _value(quality, keys, form)
        if value is not None and keys not in (("steps",), ("inverse_error_max_mm",)):
            tiles.append(f'<div class="tile"><span>{escape(name)}</span><b>{value}</b></div>')
    return f'{notice}\n<div class="tiles">{"".join(tiles)}</div>'


def _plane_buttons(grid: ShownGrid) -> str:
    if len(grid.planes) == 1:
        return ""
    names = ["all", *(plane.name for plane in grid.planes)]
    buttons = "".join(
        f'<button type="button" data-show="{name}" aria-pressed="{str(name == "all").lower()}">{label}</button>'
        for name, label in zip(names, ["All planes", *(name.capitalize() for name in names[1:])], strict=True)
    )
    return f'<nav class="bar" aria-label="Planes">{buttons}</nav>'


def _blend(grid: ShownGrid) -> str:
    """The stacked pictures; the script gives them those of the section of images, so that the page has them once."""
    panes = [
        f'<img class="lower" data-index="{i}" alt="Fixed{_plane_name(plane)}">'
        f'<img class="upper" data-index="{i}" alt="Moved{_plane_name(plane)}">'
        for i, plane in enumerate(grid.planes)
    ]
    return (
        '<section id="blend"><h2>Blend</h2>'
        "<p>Move the slider, or let the two blink: what jumps is not aligned.</p>"
        '<div class="controls">'
        '<input id="blend-slider" type="range" min="0" max="100" value="50" aria-label="From fixed to moved">'
        '<button type="button" id="blink" aria-pressed="false">Blink</button><span class="soft">Fixed with</span>'
        '<button type="button" data-upper="moved" aria-pressed="true">moved</button>'
        '<button type="button" data-upper="before" aria-pressed="false">moving, before</button>'
        f'<output id="blend-text" for="blend-slider"></output></div><figure>{_panes(panes, grid)}</figure></section>'
    )


def _section(section: Section, grid: ShownGrid) -> str:
    rows = []
    for row in section.rows:
        images = [
            _image(
                grid,
                plane,
                row.draw(plane),
                f"{section.title}: {row.name}{_plane_name(plane)}",
                attributes=f'id="{row.key}-{i}"' if row.key else "",
            )
            for i, plane in enumerate(grid.planes)
        ]
        rows.append(f"<figure><figcaption>{escape(row.name)}</figcaption>{_panes(images, grid)}</figure>")
    return (
        f"<section><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{_legend(section.legend)}"
        f"{_rows(rows)}</section>"
    )


def _steps(result: Registration) -> str:
    """The curves along the steps, and the animation on the grid that the policy worked on."""
    similarity = result.quality.get("similarity", "ncc")
    curves = {
        name: [float(point.get(key, math.nan)) for point in result.curve]
        for key, name in ((similarity, f"similarity ({title(similarity)})"), ("dice", "label overlap (Dice)"))
        if any(key in point for point in result.curve)
    }
    if len(result.history) < 2:
        return ""
    told = "Along the steps: " + "; ".join(
        f"{name} from {values[0]:.3f} to {values[-1]:.3f}" for name, values in curves.items()
    )
    plot = f'<div class="plot" role="img" aria-label="{escape(told)}">{panels.curve_svg(curves)}</div>'
    last = len(result.history) - 1
    shown = np.unique(np.linspace(0, last, min(MOST_FRAMES, last + 1)).round().astype(int)).tolist()
    captions = []
    for step in shown:
        at = [f"{name} {values[step]:.3f}" for name, values in curves.items() if step < len(values)]
        captions.append(f"{_stage(step, int(result.quality.get('steps', last)))}: {', '.join(at)}")
    grid = ShownGrid(result.working.affine, result.working.shape[1:])
    fixed, moving = (result.working.as_tensor()[i : i + 1].detach().cpu().float() for i in (0, 1))
    point = grid.fullest(fixed.clamp(min=0))
    spacing = panels.grid_spacing([grid.size(plane)[i] for plane in grid.planes for i in (0, 1)])
    rows = []
    for name in ("Moved so far, with the grid", "Difference from fixed so far"):
        panes = []
        for plane in grid.planes:
            still, index = grid.cut(fixed, plane, point)[0].clamp(0, 1), grid.voxels(plane, point)
            frames = []
            for frame, step in enumerate(shown):
                place = index + grid.cut(result.history[step].detach().cpu(), plane, point).double()
                moved = sample(moving, place.float())[0].clamp(0, 1)
                along = grid.along_plane(place, plane) if name.startswith("Moved") else None
                alt = f"{name}{_plane_name(plane)}, step {step}"
                frames.append(
                    _image(
                        grid,
                        plane,
                        _frame(moved, still, along, spacing),
                        alt,
                        attributes=f'data-frame="{frame}"' + (" hidden" if frame else ""),
                        longest=320,
                        most=12_000,
                    )
                )
            panes.append("".join(frames))
        rows.append(f"<figure><figcaption>{name}</figcaption>{_panes(panes, grid)}</figure>")
    return (
        f'<section id="steps"><h2>Step by step</h2><p>On the grid that the policy worked on.</p>{plot}'
        '<div class="controls"><button type="button" id="play" aria-pressed="false">Play</button>'
        f'<input id="step-slider" type="range" min="0" max="{len(shown) - 1}" value="0" aria-label="Step" '
        f'data-captions="{escape(json.dumps(captions))}"><output id="step-text" for="step-slider"></output></div>'
        f"{_rows(rows)}</section>"
    )


def _stage(number: int, steps: int) -> str:
    if number > steps:
        return "after the refinement"
    return f"step {number} of {steps}" if number else "before the first step"


def _frame(moved: Tensor, fixed: Tensor, place: Tensor | None, spacing: float) -> Draw:
    def paint(axes: Axes) -> None:
        if place is None:
            panels.difference(axes, moved, fixed)
        else:
            panels.grey(axes, moved)
            panels.grid_lines(axes, place, every=spacing, width=0.6)

    return paint


def _figures(quality: Mapping[str, Any]) -> str:
    """The table of all quality figures, the known ones with what they mean."""
    rows = []
    for keys, name, form, meaning in _told(quality):
        value = _value(quality, keys, form)
        if value is not None:
            rows.append((name, value, escape(meaning)))
    known = {key for keys, *_ in _told(quality) for key in keys}
    known |= {"warnings", "fixed", "moving", "similarity", "made_of"}
    for key, value in quality.items():
        if key not in known:
            words = escape(_plain_words(value))
            if isinstance(value, Mapping) and len(value) > 8:
                words = f"<details><summary>{len(value)} values</summary>{words}</details>"
            rows.append((key.replace("_", " ").capitalize(), words, ""))
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="value">{value}</td><td class="soft">{meaning}</td></tr>'
        for name, value, meaning in rows
    )
    return (
        '<section id="figures"><h2>All figures</h2><table class="figures"><thead><tr><th>Figure</th><th>Value</th>'
        f"<th>Meaning</th></tr></thead><tbody>{cells}</tbody></table></section>"
    )


def _told(quality: Mapping[str, Any]) -> list[Figure]:
    name = quality.get("similarity", "ncc")
    meaning = "Of the images, before and after the steps; more is more alike."
    return [((f"{name}_before", f"{name}_after"), f"Similarity ({title(name)})", "{:.3f}", meaning), *FIGURES]


def _value(quality: Mapping[str, Any], keys: Sequence[str], form: str) -> str | None:
    """One figure, or the figure before and after; None where the quality has no number for it."""
    values = [quality.get(key) for key in keys]
    numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return " → ".join(escape(form.format(v)) for v in numbers) if len(numbers) == len(keys) else None


def _plain_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {_plain_words(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain_words(v) for v in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _image(
    grid: ShownGrid, plane: Plane, draw: Draw, alt: str, *, attributes: str = "", longest: int = 460, most: int = 56_000
) -> str:
    uri, width, height = panels.to_jpeg(grid.size(plane), draw, longest=longest, most=most)
    return f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}" {attributes}>'


def _panes(contents: Sequence[str], grid: ShownGrid) -> str:
    """Lay out a picture, or several on top of each other, for each plane: side by side, all at one scale."""
    columns = " ".join(f"{grid.size(plane)[0]:.4g}fr" for plane in grid.planes)
    panes = "".join(
        f'<div class="pane" data-plane="{plane.name}" data-left="{plane.letters[0]}" data-top="{plane.letters[1]}">'
        f"{content}</div>"
        for plane, content in zip(grid.planes, contents, strict=True)
    )
    return f'<div class="planes" style="grid-template-columns: {columns}">{panes}</div>'


def _rows(rows: Sequence[str]) -> str:
    return f'<div class="rows{" many" if len(rows) > 1 else ""}">{"".join(rows)}</div>'


def _legend(legend: Legend) -> str:
    parts = []
    if legend.colours is not None:
        low, high = (escape(text) for text in legend.ends)
        parts.append(
            f'<div class="scale"><i style="background: {panels.gradient(legend.colours)}"></i>'
            f"<span><span>{low}</span><span>{high}</span></span></div>"
        )
    parts += [f'<span class="mark" style="--mark: {colour}">{escape(text)}</span>' for colour, text in legend.marks]
    return f'<div class="legend">{"".join(parts)}</div>' if parts else ""


def _plane_name(plane: Plane) -> str:
    return f", {plane.name} plane" if plane.name else ""
