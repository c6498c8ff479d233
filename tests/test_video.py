"""Clips: what is written is what is read, flow points the right way, and steadiness is measured."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.errors import InputError
from monai_rl_reg.pictures import write_picture
from monai_rl_reg.video import VideoFile, VideoFrames, flows_between, list_clips, optical_flow, temporal_error

av = pytest.importorskip("av")
pytest.importorskip("cv2")


def texture(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 6 + 2, width // 6 + 2, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0]


def pan(count: int, *, down: int = 1, right: int = 2, size: tuple[int, int] = (64, 96)) -> list[Tensor]:
    """A view that moves over a texture: what is seen moves up and to the left."""
    height, width = size
    whole = texture(height + down * count, width + right * count)
    return [whole[:, down * i : down * i + height, right * i : right * i + width] for i in range(count)]


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001)])
def test_size_rate_and_frames_are_kept(size: tuple[int, int], rate: Fraction, tmp_path: Path) -> None:
    frames = pan(5, size=size)
    with VideoFile(tmp_path / "clip.mp4", rate) as file:
        for frame in frames:
            file.add(frame)
    read = VideoFrames(tmp_path / "clip.mp4")
    assert (len(read), read.size, read.rate) == (5, size, rate)
    for i, frame in enumerate(frames):
        assert (read[i]["image"] - frame).abs().mean() < 0.06, "colours are kept at half the resolution"
    assert (read[1]["image"] - frames[1]).abs().mean() < 0.06, "going back"
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("size", [(64, 96), (720, 1280)])
def test_players_are_told_the_colours(size: tuple[int, int], tmp_path: Path) -> None:
    colour = torch.tensor([40, 160, 60])[:, None, None].expand(3, *size) / 255
    with VideoFile(tmp_path / "clip.mp4", 24) as file:
        file.add(colour)
        file.add(colour)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        frame = next(container.decode(video=0))
        luma = frame.to_ndarray()[: size[0]].mean()  # BT.601 would make it 113
    assert abs(luma - (16 + 219 / 255 * (0.2126 * 40 + 0.7152 * 160 + 0.0722 * 60))) < 1.5
    assert (VideoFrames(tmp_path / "clip.mp4")[0]["image"] - colour).abs().mean() < 0.015


def test_a_clip_of_variable_rate_lasts_as_long_as_it_did(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width = stream.height = 64
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in (0, 100, 700, 1000, 1900, 2500, 3000):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = VideoFrames(tmp_path / "clip.mkv")
    assert len(frames) == 7
    assert float(frames.rate) == pytest.approx(2, abs=0.05)


def test_an_interrupted_clip_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with VideoFile(path, 24) as file:
            file.add(texture(32, 32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_folder_of_pictures_is_a_clip(tmp_path: Path) -> None:
    (tmp_path / "walk").mkdir()
    for i, frame in enumerate(pan(12)):
        write_picture(tmp_path / "walk" / f"{i}.png", frame)
    clip = list_clips(tmp_path)["walk"]
    assert (len(clip), clip.rate) == (12, 24)
    torch.testing.assert_close(clip[10]["image"], pan(12)[10], atol=0.003, rtol=0)


def test_frames_of_a_folder_have_one_size(tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png", texture(32, 48))
    write_picture(tmp_path / "1.png", texture(32, 40))
    with pytest.raises(InputError, match=r"one size, found 0\.png of 48 x 32 and 1\.png of 40 x 32"):
        VideoFrames(tmp_path)


@pytest.mark.parametrize(("matrix", "turned"), [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)])
def test_a_clip_that_was_filmed_lying_is_upright(
    matrix: tuple[int, int, int, int], turned: int, tmp_path: Path
) -> None:
    frames = pan(2, size=(48, 64))
    path = tmp_path / "clip.mp4"
    with VideoFile(path, 24) as file:
        for frame in frames:
            file.add(frame)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # past version, times, track, duration, layer, volume
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 20] = struct.pack(">5i", a, b, 0, c, d)
    path.write_bytes(content)
    clip = VideoFrames(path)
    upright = torch.rot90(frames[0], turned, (1, 2))  # counterclockwise
    assert clip.size == upright.shape[1:]
    assert (clip[0]["image"] - upright).abs().mean() < 0.06


def test_a_clip_that_was_cut_without_a_copy_has_the_frames_that_show(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    with VideoFile(whole, 24) as file:
        for frame in pan(24):
            file.add(frame)
    with av.open(str(whole)) as source, av.open(str(cut), "w") as goal:  # as ``ffmpeg -ss 0.25 -c copy`` does
        stream = goal.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                shift = int(Fraction(1, 4) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                goal.mux(packet)
    clip = VideoFrames(cut)
    assert len(clip) < 24
    assert len([clip[i] for i in range(len(clip))]) == len(clip)


@pytest.mark.parametrize("content", [None, b"", b"no video at all"])
def test_bad_files(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"clip\.mp4: expected a video"):
        VideoFrames(path)
    with pytest.raises(InputError, match="expected a folder with clips"):
        list_clips(tmp_path / "none")


def test_frames_too_small_for_the_flow_are_said() -> None:
    assert optical_flow(*torch.rand(2, 3, 12, 12)).shape == (2, 12, 12)
    with pytest.raises(InputError, match="at least 12 x 12 for the optical flow, found 20 x 11"):
        optical_flow(*torch.rand(2, 3, 11, 20))


def test_flow_is_in_the_convention_of_warp() -> None:
    a, b = pan(2, down=2, right=5)
    flow = optical_flow(a, b)[:, 12:-12, 12:-12]
    assert flow.flatten(1).median(1).values.tolist() == pytest.approx([-2, -5], abs=0.3)
    error = (Warp("bilinear", "border")(b[None], optical_flow(a, b)[None])[0] - a)[:, 12:-12, 12:-12].abs().mean()
    assert error < 0.1 * (b - a)[:, 12:-12, 12:-12].abs().mean()


def test_only_what_flickers_counts() -> None:
    frames = pan(4)
    flows = flows_between(frames)
    assert all(float(holds.float().mean()) > 0.7 for _, holds in flows)
    steady = temporal_error(frames, flows)  # what leaves the picture does not count
    generator = torch.Generator().manual_seed(1)
    flickering = [(frame + 0.1 * torch.randn(frame.shape, generator=generator)).clamp(0, 1) for frame in frames]
    assert steady < 0.005
    assert temporal_error(flickering, flows) > 5 * steady


def test_frames_of_one_size_and_a_name_in_mp4(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.mp4"):
        VideoFile(tmp_path / "clip.txt", 24)

    def two_sizes() -> None:
        with VideoFile(tmp_path / "clip.mp4", 24) as file:
            file.add(texture(32, 32))
            file.add(texture(32, 48))

    with pytest.raises(InputError, match="expected frames of one size, 32 x 32, found one of 48 x 32"):
        two_sizes()
    assert not list(tmp_path.iterdir())
