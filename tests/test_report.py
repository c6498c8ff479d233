from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from results import make_result

from monai_rl_reg.registration import Registration

pytest.importorskip("matplotlib")

import numpy as np
from PIL import Image

from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import jacobian_determinant
from monai_rl_reg.report import MOST_FRAMES, write_report
from monai_rl_reg.report_sections import Pictures

PLANES = ("axial", "coronal", "sagittal")


class Page(HTMLParser):
    """What a page has: its headings, pictures (their attributes) and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag in ("h2", "script", "style"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src") and (value or "")[:1] != "#"]

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open == ["h2"]:
            self.headings.append(data)
        if not self.open:
            self.text += data + " "

    def pictures(self, start: str) -> list[str]:
        return [str(image["alt"]) for image in self.images if str(image["alt"]).startswith(start)]


def pixels(image: dict[str, str | None]) -> np.ndarray:
    """The picture in a data URI, (height, width, 3)."""
    data = str(image["src"]).removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (int(str(image["width"])), int(str(image["height"])))
        return np.asarray(picture.convert("RGB")).astype(int)


def report(result: Any, folder: Path) -> Page:
    write_report(result, folder / "report.html")
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def result() -> Registration:
    return make_result(3)[0]


@pytest.fixture(scope="module")
def page_path(result: Registration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(result, path)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def page(page_path: Path) -> Page:
    return Page(page_path)


def test_every_section_has_its_pictures_in_three_planes(page: Page) -> None:
    rows = {
        "Images": ["Fixed", "Moving, before", "Moved"],
        "Checkerboard": ["Before", "After"],
        "Difference": ["Before", "After"],
        "Label outlines": ["Before", "After"],
        "Deformed grid": ["Grid on the moved image"],
        "Local change of size": ["Log Jacobian"],
        "Uncertainty": ["Standard deviation of the displacement"],
    }
    assert page.headings == ["Blend", *rows, "Step by step", "All figures"]
    for section, names in rows.items():
        expected = [f"{section}: {name}, {plane} plane" for name in names for plane in PLANES]
        assert page.pictures(section + ":") == expected
    for name in ("Moved so far", "Difference from fixed so far"):
        assert len(page.pictures(name)) == 3 * 4  # three planes, three steps and the start
    assert all(image["alt"] for image in page.images)


def test_the_page_is_one_small_file_that_needs_no_other(page: Page, page_path: Path) -> None:
    assert page_path.stat().st_size < 5_000_000
    assert all(link.startswith("data:") for link in page.links)
    assert not re.search(r"url\(|@import|fetch\(", page_path.read_text(encoding="utf-8").replace("url(#", ""))


def test_figures_are_told_in_plain_words(page: Page, result: Registration) -> None:
    quality = result.quality
    assert f"{quality['ncc_before']:.3f} → {quality['ncc_after']:.3f}" in page.text
    assert f"{quality['dice_before']:.3f} → {quality['dice_after']:.3f}" in page.text
    assert "Error of the inverse 0.02 mm" in re.sub(r"\s+", " ", page.text)
    assert "monai 1.5.0" in page.text
    assert f"Fixed image: {Path(quality['fixed']).name} (" in page.text
    assert "/folder/" not in page.text
    assert "No figure raised a warning" in page.text
    assert "No voxel is folded" in page.text


def test_warnings_are_shown_and_nothing_in_them_is_markup(result: Registration, tmp_path: Path) -> None:
    warnings = ["The similarity <b>fell</b> & fell", "$title is no placeholder"]
    labels = {str(i): i / 20 for i in range(1, 12)}
    odd = result.quality | {
        "warnings": warnings,
        "ncc_after": float("nan"),
        "<i>key": [1.5, None, True],
        "dice_per_label": labels,
    }
    page = report(replace(result, quality=odd), tmp_path)
    assert all(text in page.text for text in warnings)
    assert "No figure raised" not in page.text
    assert "nan" not in page.text.replace("determinant", "")
    assert "Dice per label 11 values 1 0.05, 2 0.1," in re.sub(r"\s+", " ", page.text)
    assert "<i>key 1.5, none, yes" in re.sub(r"\s+", " ", page.text)


def test_what_is_not_there_has_no_section(result: Registration, tmp_path: Path) -> None:
    bare = replace(result, moved_label=None, unmoved_label=None, fixed_label=None, uncertainty=None)
    bare = replace(bare, history=result.history[:1], curve=[{"ncc": 0.5}], quality={})
    page = report(bare, tmp_path)
    assert page.headings == [
        "Blend", "Images", "Checkerboard", "Difference", "Deformed grid", "Local change of size", "All figures",
    ]  # fmt: skip
    only_moved = replace(result, fixed_label=None, unmoved_label=None)
    page = report(only_moved, tmp_path)
    assert page.pictures("Label outlines") == [f"Label outlines: After, {plane} plane" for plane in PLANES]


def test_a_picture_of_two_dimensions_has_one_plane(tmp_path: Path) -> None:
    result, _ = make_result(2, size=32)
    page = report(result, tmp_path)
    assert page.pictures("Label outlines") == ["Label outlines: Before", "Label outlines: After"]
    fixed = next(image for image in page.images if image["alt"] == "Images: Fixed")
    width, height = (float(str(fixed[side])) for side in ("width", "height"))
    spacing = result.fixed.affine[:2, :2].norm(dim=0)
    size = torch.tensor(result.fixed.shape[1:]) * spacing
    assert width / height == pytest.approx(float(size[0] / size[1]), rel=0.02)  # thick rows are shown thick


def test_planes_lie_as_a_radiologist_reads_them(result: Registration, tmp_path: Path) -> None:
    """A bright spot on the patient's right, in front and above is at the left and at the top of all three planes."""
    shape = (20, 24, 28)
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = torch.tensor([[0, 0, 1.0], [-1.0, 0, 0], [0, 1.0, 0]])  # axes run to P, S and R
    image = torch.rand(1, *shape) * 0.1
    image[:, 3:9, 14:20, 18:26] = 1
    made = MetaTensor(image, affine=affine)
    field = MetaTensor(torch.zeros(3, *shape), affine=affine)
    working = MetaTensor(torch.cat([image, image]), affine=affine)
    page = report(
        Registration(made, made, made, field, working, fixed_label=MetaTensor(image > 0.5, affine=affine)), tmp_path
    )
    sizes = {"axial": (28, 20), "coronal": (28, 24), "sagittal": (20, 24)}
    for plane, (across, down) in sizes.items():
        image_of_plane = next(i for i in page.images if i["alt"] == f"Images: Fixed, {plane} plane")
        bright = pixels(image_of_plane)[..., 0] > 128
        row, column = (np.nonzero(bright)[i].mean() / bright.shape[i] for i in (0, 1))
        expected = {"axial": (6, 6), "coronal": (7, 6), "sagittal": (7, 6)}[plane]  # rows and columns of the spot
        assert row == pytest.approx(expected[0] / down, abs=0.03)
        assert column == pytest.approx(expected[1] / across, abs=0.03)


def test_before_and_after_show_what_they_say(page: Page, result: Registration) -> None:
    """The difference is dark after a registration that is right, and was not before."""
    energy = {}
    for name in ("Before", "After"):
        images = [i for i in page.images if str(i["alt"]).startswith(f"Difference: {name}")]
        energy[name] = np.mean([(pixels(i).max(-1) - pixels(i).min(-1)).mean() for i in images])
    assert energy["After"] < 0.5 * energy["Before"]


def test_outlines_before_and_after_are_those_of_the_labels(
    result: Registration, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr("monai_rl_reg.panels.outlines", lambda axes, label, colour, **style: drawn.append(label))
    monkeypatch.setattr("monai_rl_reg.panels.grey", lambda axes, image, **style: None)
    pictures = Pictures(result)
    outlines = next(section for section in pictures.sections() if section.title == "Label outlines")
    for row, label in zip(outlines.rows, (result.unmoved_label, result.moved_label), strict=True):
        for plane in pictures.grid.planes:
            row.draw(plane)(None)  # type: ignore[arg-type]
            for name, found in zip((result.fixed_label, label), drawn[-2:], strict=True):
                assert name is not None
                assert torch.equal(found, pictures.grid.cut(name.as_tensor(), plane, pictures.point)[0])


def test_an_initial_alignment_is_shown(result: Registration, tmp_path: Path) -> None:
    """Moved away in its file and brought back by the initial transform: black before, in place after it."""
    elsewhere = result.moving.affine.clone()
    away = torch.tensor([300.0, -10.0, 5.0], dtype=torch.float64)
    elsewhere[:3, 3] += away
    apart = replace(
        result,
        moving=MetaTensor(result.moving.as_tensor(), affine=elsewhere),
        displacement=MetaTensor(result.displacement + away.float().reshape(3, 1, 1, 1), affine=result.fixed.affine),
        quality=result.quality | {"initial": {"kind": "centre"}},
    )
    page = report(apart, tmp_path)
    names = ["Images: Moving, after the initial alignment", "Difference: After the initial alignment"]
    assert [len(page.pictures(name)) for name in names] == [3, 3]
    brightness = {str(i["alt"]): pixels(i).mean() for i in page.images if str(i["alt"]).startswith("Images: Moving")}
    for plane in PLANES:
        assert brightness[f"Images: Moving, before, {plane} plane"] < 1
        assert brightness[f"Images: Moving, after the initial alignment, {plane} plane"] > 30
    for kind in ("none", "identity"):
        still = replace(result, quality={"initial": {"kind": kind}})
        assert [name for name, _ in Pictures(still).before] == ["before"]  # type: ignore[arg-type]


def test_a_refinement_after_the_steps_is_named(result: Registration, tmp_path: Path) -> None:
    page_path = tmp_path / "report.html"
    write_report(replace(result, quality=result.quality | {"steps": 2}), page_path)  # type: ignore[arg-type]
    captions = json.loads(unescape(re.findall(r'data-captions="([^"]*)"', page_path.read_text(encoding="utf-8"))[0]))
    starts = [caption.split(":")[0] for caption in captions]
    assert starts == ["before the first step", "step 1 of 2", "step 2 of 2", "after the refinement"]


def test_folded_voxels_are_counted_and_shown_where_they_are(result: Registration, tmp_path: Path) -> None:
    pictures = Pictures(result)  # type: ignore[arg-type]
    voxels = torch.zeros_like(pictures.displacement)
    corner = pictures.grid.shown([2, 2, 2])
    assert all(a != b for a, b in zip(corner, pictures.point, strict=True))
    voxels[0, 2, 2, 2] = 3.0
    linear = result.fixed.affine[:3, :3].float()
    field = MetaTensor(torch.tensordot(linear, voxels, dims=1), affine=result.fixed.affine)
    folded = int((jacobian_determinant(voxels[None]) <= 0).sum())
    assert folded > 0
    page = report(replace(result, displacement=field), tmp_path)
    assert f"{folded:,} of {voxels[0].numel():,} voxels" in page.text
    assert len(page.pictures("Local change of size: Through the deepest fold")) == 3
    marked = [i for i in page.images if "Through the deepest fold" in str(i["alt"])]
    usual = [i for i in page.images if "Log Jacobian" in str(i["alt"])]

    def red(image: dict[str, str | None]) -> int:
        colours = pixels(image)
        return int(((colours[..., 0] > 200) & (colours[..., 1] < 90) & (colours[..., 2] < 90)).sum())

    assert all(red(image) > 20 for image in marked)
    assert not any(red(image) for image in usual)


def test_the_deformed_grid_is_where_the_voxels_come_from(result: Registration) -> None:
    shift = torch.tensor([2.0, -1.0, 0.5])
    field = MetaTensor(
        torch.zeros_like(result.displacement.as_tensor()) + shift.reshape(3, 1, 1, 1), affine=torch.eye(4)
    )
    pictures = Pictures(replace(result, displacement=field))  # type: ignore[arg-type]
    still = Pictures(replace(result, displacement=field * 0))  # type: ignore[arg-type]
    linear = pictures.grid.affine[:3, :3]
    for plane in pictures.grid.planes:
        moved = pictures._place(plane) - still._place(plane)
        for i, axis in enumerate((plane.across, plane.down)):
            column = linear[:, pictures.grid.axes[axis]]
            sign = -1 if pictures.grid.reversed[axis] else 1
            parts = torch.linalg.solve(linear, shift.double())  # in voxels
            expected = sign * float(parts[pictures.grid.axes[axis]] * column.norm())
            torch.testing.assert_close(moved[i], torch.full_like(moved[i], expected), atol=1e-4, rtol=0)


def test_of_many_steps_some_are_shown_the_last_among_them(result: Registration, tmp_path: Path) -> None:
    steps = 40
    history = [result.history[-1] * i / steps for i in range(steps + 1)]
    page = report(replace(result, history=history, curve=[{"ncc": i / steps} for i in range(steps + 1)]), tmp_path)
    shown = page.pictures("Moved so far, with the grid, axial plane")
    assert len(shown) == MOST_FRAMES
    assert shown[0].endswith("step 0")
    assert shown[-1].endswith(f"step {steps}")


def test_the_page_replaces_another_as_a_whole_or_not_at_all(
    result: Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        with open(self, "w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(InputError, match="room to write it, found: No space left"):
            write_report(result, path)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]
    with pytest.raises(InputError, match="a folder that can be written to"):
        write_report(result, path / "inside.html")  # type: ignore[arg-type]


CHECK = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const check = {}, round = x => Math.round(x * 100) / 100;
  const uppers = [...document.querySelectorAll(".upper")];
  const shown = element => element.getClientRects().length > 0;
  const set = (input, value) => { input.value = value; input.dispatchEvent(new Event("input", {bubbles: true})); };
  const opacities = () => [...new Set(uppers.map(image => round(Number(getComputedStyle(image).opacity))))];
  const overflow = () => [...document.querySelectorAll("body *")].filter(shown)
    .filter(element => !element.closest("svg"))
    .filter(element => element.getBoundingClientRect().right > window.innerWidth + 0.5)
    .map(element => element.outerHTML.slice(0, 80));
  check.width = window.innerWidth;
  check.images = document.images.length;
  check.broken = [...document.images].filter(image => !image.complete || image.naturalWidth === 0).map(i => i.alt);
  check.planes = [...document.querySelectorAll("#blend .pane")].filter(shown).map(pane => pane.dataset.plane);
  check.scroll = document.documentElement.scrollWidth;
  check.overflow = overflow();
  const slider = document.getElementById("blend-slider"), text = document.getElementById("blend-text");
  check.blend = [];
  for (const value of [0, 25, 100]) { set(slider, value); check.blend.push([opacities(), text.textContent]); }
  const moved = uppers.map(image => image.src);
  check.lower = [...document.querySelectorAll(".lower")]
    .every((image, i) => image.src === document.getElementById("fixed-" + i).src);
  document.querySelector("[data-upper=before]").click();
  check.changed = uppers.every((image, i) => image.src !== moved[i]);
  check.beforeText = text.textContent;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.click();
    check[button.dataset.show] = [...document.querySelectorAll("#steps .pane")].filter(shown).length;
    check.overflow.push(...overflow());
  }
  const stepper = document.getElementById("step-slider"), frames = [...document.querySelectorAll("[data-frame]")];
  const visible = () => [...new Set(frames.filter(frame => !frame.hidden).map(frame => frame.dataset.frame))];
  set(stepper, 2);
  check.step = [visible(), document.getElementById("step-text").textContent];
  document.getElementById("play").click();
  setTimeout(() => {
    check.playing = [visible(), document.getElementById("play").textContent];
    document.getElementById("play").click();
    check.paused = document.getElementById("play").textContent;
    parent.postMessage(JSON.stringify(check), "*");
  }, 1200);
}, 200));
</script>
"""


FRAME = """<!DOCTYPE html><body style="margin: 0"><pre id="check"></pre>
<script>window.addEventListener("message", event => document.getElementById("check").textContent = event.data)</script>
<iframe src="checked.html" style="width: {width}px; height: 900px; border: 0"></iframe></body>"""
"""A window of any width: a browser's own has a least one that is wider than a phone."""


def browse(path: Path, width: int, profile: Path) -> dict[str, Any]:
    """Open a copy of the page with the self-check in headless Chromium and return what it found."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser, one of {', '.join(names)}")
    copied = path.read_text(encoding="utf-8").replace("</body>", CHECK + "</body>")
    (profile / "checked.html").write_text(copied, encoding="utf-8")
    frame = profile / "frame.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile / 'profile'}", "--allow-file-access-from-files", "--window-size=1400,1000",
        "--virtual-time-budget=6000", "--dump-dom",
    ]  # fmt: skip
    run = subprocess.run([browser, *options, frame.as_uri()], capture_output=True, encoding="utf-8", timeout=240)
    found = re.search(r'<pre id="check">(.+?)</pre>', run.stdout, flags=re.DOTALL)
    assert found, f"the page's script did not come to its end:\n{run.stderr[-2000:]}"
    checked: dict[str, Any] = json.loads(unescape(found[1]))
    return checked


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_finds_pictures_slider_and_animation_at_work(width: int, page_path: Path, tmp_path: Path) -> None:
    found = browse(page_path, width, tmp_path)
    assert found["width"] == width
    assert found["images"] == len(Page(page_path).images)
    assert found["broken"] == []
    assert found["scroll"] <= width
    assert found["overflow"] == []
    assert found["planes"] == (list(PLANES) if width > 640 else ["axial"])
    assert found["blend"] == [[[0], "fixed"], [[0.25], "75 % fixed, 25 % moved"], [[1], "moved"]]
    assert found["lower"]
    assert found["changed"]
    assert found["beforeText"] == "moving, before"
    assert [found[name] for name in ("all", *PLANES)] == [6, 2, 2, 2]
    frames, told = found["step"]
    assert frames == ["2"]
    assert told.startswith("step 2 of 3: similarity (NCC) 0.")
    assert found["playing"] == [["3"], "Pause"]
    assert found["paused"] == "Play"


def test_a_browser_finds_a_page_of_two_dimensions_at_work(tmp_path: Path) -> None:
    result, _ = make_result(2, size=32)
    write_report(result, tmp_path / "report.html")  # type: ignore[arg-type]
    found = browse(tmp_path / "report.html", 390, tmp_path)
    assert (found["broken"], found["overflow"], found["scroll"] <= 390) == ([], [], True)
    assert found["blend"][1] == [[0.25], "75 % fixed, 25 % moved"]
    assert found["playing"] == [["3"], "Pause"]
