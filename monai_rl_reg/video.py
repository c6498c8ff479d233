"""Video: read and write clips, optical flow between frames, and how steady a stylised clip is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import identity_grid
from monai_rl_reg.pictures import import_extra, list_pictures, picture_size, read_picture, to_bytes
from monai_rl_reg.warping import Warp

RATE = Fraction(24)
"""Frames a second of a folder of pictures, which does not say."""
SMALLEST = 12
"""Pixels a side that OpenCV's DIS needs."""
SAME_RATE = 0.05
"""Share by which the frame rate that a file names may differ from that of its frames' times."""
BT709, LIMITED = 1, 1
"""FFmpeg's numbers for the colours of HD video, and for luma from 16 to 235."""


class VideoFrames(Dataset[dict[str, Any]]):
    """The frames of a clip, read in their order: ``image``, (3, H, W) in [0, 1], and ``name``, the frame's number.

    Args:
        path: a video file of any format that PyAV reads, or a folder of pictures.

    Attributes:
        rate: frames a second.
        size: (H, W) in pixels.

    Raises:
        InputError: if there is no such file, or no video in it that can be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rate = RATE
        self.pictures: list[Path] = []
        self.count = 0
        self._frames: Iterator[Tensor] | None = None
        self._next = 0
        if self.path.is_dir():
            self.pictures = list_pictures(self.path)
            self.count = len(self.pictures)
            self.size = picture_size(self.pictures[0])
            for picture in self.pictures:
                height, width = picture_size(picture)
                if (height, width) != self.size:
                    raise InputError(
                        f"video {self.path}: expected pictures of one size, found {self.pictures[0].name} of "
                        f"{self.size[1]} x {self.size[0]} and {picture.name} of {width} x {height}"
                    )
            return
        if not self.path.is_file():
            raise InputError(f"video {self.path}: expected a video file or a folder of pictures, found none")
        av = import_extra("av")
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ValueError("no video stream")
                stream = container.streams.video[0]
                # Containers may not know, and one that was cut counts what it hides; decoding once costs little beside
                # what is done with the frames.
                for self.count, frame in enumerate(container.decode(stream), start=1):
                    if self.count == 1:
                        self.size, first = _upright(frame).shape[:2], frame.time
                self.rate = _rate(stream.average_rate, self.count, (frame.time or 0) - (first or 0))
        except Exception as error:
            raise InputError(
                f"video {self.path}: expected a video that can be read, found {self.path.stat().st_size:,} bytes that "
                f"cannot ({type(error).__name__}: {' '.join(str(error).split())})"
            ) from error
        if not self.count:
            raise InputError(f"video {self.path}: expected at least one frame, found none")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the frame of this number; going on from the last one is quick, anything else starts anew.

        Raises:
            InputError: if the frame cannot be read.
        """
        if self.pictures:
            return {"image": read_picture(self.pictures[index]), "name": index}
        if self._frames is None or index != self._next:
            self._frames, self._next = self._decode(), 0
        for frame in self._frames:
            self._next += 1
            if self._next == index + 1:
                return {"image": frame, "name": index}
        raise InputError(f"video {self.path}: expected {self.count} frames, found {self._next}")

    def _decode(self) -> Iterator[Tensor]:
        with import_extra("av").open(str(self.path)) as container:
            for frame in container.decode(video=0):
                pixels = _upright(frame).astype(np.float32) / 255
                yield torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _rate(told: Fraction | None, count: int, seconds: float) -> Fraction:
    """Return frames a second: as the file says, unless its frames' times say otherwise, as of variable rates."""
    seen = (count - 1) / seconds if count > 1 and seconds > 0 else None
    if told and (seen is None or abs(seen / told - 1) < SAME_RATE):
        return Fraction(told)
    if seen is None:
        raise ValueError("no frame rate")
    return Fraction(seen).limit_denominator(1000)


def _upright(frame: Any) -> np.ndarray:
    """Return a frame's colours (H, W, 3), turned as its display matrix asks: phones film lying."""
    degrees = getattr(frame, "rotation", 0)  # counterclockwise; older versions of PyAV do not say
    return np.rot90(frame.to_ndarray(format="rgb24"), round(degrees / 90))


class VideoFile:
    """Write an mp4 (H.264) frame by frame, beside its place; it is moved there when the ``with`` block ends well.

    The size and the frame rate are kept as they are. Sizes that are not even are written without chroma subsampling,
    which needs even ones.

    Args:
        path: the file, ``.mp4``.
        rate: frames a second.

    Raises:
        InputError: if the suffix is another one, the folder cannot be written to, or frames differ in size.
    """

    def __init__(self, path: str | Path, rate: Fraction | float) -> None:
        self.path = Path(path)
        if self.path.suffix != ".mp4":
            raise InputError(f"output {path}: expected a name that ends in .mp4, found {self.path.name}")
        self.rate = Fraction(rate).limit_denominator(100_000)
        self.temporary = self.path.with_name(f".{self.path.name}.tmp.mp4")
        self.container: Any = None
        self.stream: Any = None

    def __enter__(self) -> VideoFile:
        av = import_extra("av")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.container = av.open(str(self.temporary), "w")
        except OSError as error:
            raise InputError(
                f"output {self.path}: expected a folder that can be written to, found: {error.strerror}"
            ) from error
        return self

    def add(self, frame: Tensor) -> None:
        """Append a frame, (3, H, W) in [0, 1]; all frames have one size."""
        av = import_extra("av")
        pixels = to_bytes(frame)
        if self.stream is None:
            height, width = pixels.shape[:2]
            self.stream = self.container.add_stream("libx264", rate=self.rate, options={"crf": "17"})
            self.stream.width, self.stream.height = width, height
            self.stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            context = self.stream.codec_context  # untagged, players take small frames for BT.601 and large ones for 709
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED
        if pixels.shape[:2] != (self.stream.height, self.stream.width):
            raise InputError(
                f"output {self.path}: expected frames of one size, {self.stream.width} x {self.stream.height}, "
                f"found one of {pixels.shape[1]} x {pixels.shape[0]}"
            )
        coloured = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        coloured = coloured.reformat(format=self.stream.pix_fmt, dst_colorspace=BT709, dst_color_range=LIMITED)
        self.container.mux(self.stream.encode(coloured))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.stream is not None:
                self.container.mux(self.stream.encode())
            if self.container is not None:
                self.container.close()
            if kind is None and self.stream is not None:
                self.temporary.replace(self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


class VideoWriter:
    """Handler that writes an evaluator's results as one clip, frame by frame, with a progress bar.

    Args:
        path: the file, ``.mp4``.
        frames: the clip that is being worked on, for its rate and length.
    """

    def __init__(self, path: str, frames: VideoFrames) -> None:
        self.path = Path(path)
        self.frames = frames

    def attach(self, engine: Engine) -> None:
        """Follow this evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Engine) -> None:
        self.file = VideoFile(self.path, self.frames.rate)
        self.bar = tqdm(total=len(self.frames), desc="frames", unit="frame", dynamic_ncols=True)
        self.file.__enter__()

    def _add(self, engine: Engine) -> None:
        results: Any = engine.state.output
        for result in results:
            self.file.add(result["pred"])
            self.bar.update()

    def _end(self, engine: Engine) -> None:
        self.bar.close()
        self.file.__exit__(None, None, None)
        print(f"Wrote {self.path.resolve()}")

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self.bar.close()
        self.file.__exit__(type(error), error, None)
        raise error


def optical_flow(a: Tensor, b: Tensor) -> Tensor:
    """Return the flow from frame a to frame b by OpenCV's DIS, (2, H, W) in pixels: b(x + flow(x)) resembles a(x).

    Args:
        a: (3, H, W) in [0, 1].
        b: likewise.

    Raises:
        InputError: if the frames are too small for it.
    """
    if min(a.shape[1:]) < SMALLEST:
        height, width = a.shape[1:]
        raise InputError(
            f"clip: expected frames of at least {SMALLEST} x {SMALLEST} for the optical flow, found {width} x {height}"
        )
    cv2 = import_extra("cv2")
    grey = [cv2.cvtColor(to_bytes(frame), cv2.COLOR_RGB2GRAY) for frame in (a, b)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    return torch.from_numpy(flow).permute(2, 0, 1).flip(0).contiguous()  # OpenCV has columns first


def flows_between(frames: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return, for each frame but the first, the flow back to the one before, (2, H, W), and where it holds, (1, H, W).

    It holds where the flow there and back ends within a pixel of where it began, so that nothing was hidden, and
    stays inside the picture.
    """
    flows = []
    warp = Warp("bilinear", "border")
    size = torch.tensor(frames[0].shape[1:]).reshape(2, 1, 1)
    here = identity_grid(frames[0].shape[1:])
    for before, after in pairwise(frames):
        back, there = optical_flow(after, before), optical_flow(before, after)
        returned = back + warp(there[None], back[None])[0]
        from_where = here + back
        inside = ((from_where >= 0) & (from_where <= size - 1)).all(0, keepdim=True)
        flows.append((back, inside & (returned.norm(dim=0, keepdim=True) < 1.0)))
    return flows


def temporal_error(stylised: Sequence[Tensor], flows: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the warp error of a stylised clip: how much frames differ beyond what moved, as mean absolute difference.

    Args:
        stylised: (3, H, W) each, in [0, 1].
        flows: of the clip before it was stylised, by :func:`flows_between`.
    """
    warp = Warp("bilinear", "border")
    errors = []
    for before, after, (back, holds) in zip(stylised, stylised[1:], flows, strict=False):
        difference = (warp(before[None], back[None])[0] - after).abs().mean(0, keepdim=True)
        errors.append(float((difference * holds).sum() / holds.sum().clamp(min=1)))
    return float(np.mean(errors))


def list_clips(folder: str | Path) -> dict[str, VideoFrames]:
    """Return the clips of a folder by name: video files and subfolders of pictures.

    Raises:
        InputError: if there is no such folder or no clip in it.
    """
    folder = Path(folder)
    found = sorted(p for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else []
    if not found:
        raise InputError(f"clips {folder}: expected a folder with clips (video files or folders of frames), found none")
    return {path.name: VideoFrames(path) for path in found}
