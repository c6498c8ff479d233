from __future__ import annotations

import math

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.inferer import KEPT, FramewiseInferer, StepwiseInferer
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.tasks.translation import TranslationTask
from monai_rl_reg.tasks.video_style import VideoStyleTask
from monai_rl_reg.video import flows_between, temporal_error


class Brighten(nn.Module):
    """A policy that adds a tenth of the source to the picture."""

    def forward(self, observation: Tensor) -> Tensor:
        return 0.1 * observation[:, :3]


class Count(nn.Module):
    """A policy that counts its steps: of a frame in the step memory, of the clip in the frame memory.

    The picture gets darker with each step of the clip.
    """

    def forward(self, observation: Tensor) -> Tensor:
        step, frame = observation[:, 6:7] + 1, observation[:, 7:8] + 1
        return torch.cat([-0.01 * frame.expand(-1, 3, -1, -1), step, frame], 1)


def test_output_is_that_of_the_last_step() -> None:
    image = torch.full((2, 3, 8, 8), 0.5)
    inferer = StepwiseInferer(TranslationTask(), 3)
    torch.testing.assert_close(inferer(image, Brighten()), torch.full((2, 3, 8, 8), 0.5 + 3 * 0.05))
    assert inferer.history == []


def test_history_goes_from_before_the_first_step_to_after_the_last_and_is_that_of_the_last_call() -> None:
    inferer = StepwiseInferer(TranslationTask(), 3, keep_history=True)
    for value in (0.2, 0.8):
        output = inferer(torch.full((2, 3, 8, 8), value), Brighten())
        expected = [torch.full((2, 3, 8, 8), min(1.0, 0.5 + step * 0.1 * value)) for step in range(4)]
        torch.testing.assert_close(inferer.history, expected)
        assert output is inferer.history[-1]


def test_history_does_not_change_the_output() -> None:
    policy, image = PlannerActor(2, 6, 3, channels=(8, 8), plan_channels=2), torch.rand(1, 3, 17, 14)
    nn.init.normal_(policy.actor.head.conv.weight)
    outputs = [StepwiseInferer(TranslationTask(), 3, keep_history=keep)(image, policy) for keep in (False, True)]
    assert torch.equal(outputs[0], outputs[1])
    assert not outputs[0].requires_grad


def test_no_steps_give_the_start_and_negative_ones_are_refused() -> None:
    inferer = StepwiseInferer(TranslationTask(), 0, keep_history=True)
    assert (inferer(torch.rand(1, 3, 8, 8), Brighten()) == 0.5).all()
    assert len(inferer.history) == 1
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        StepwiseInferer(TranslationTask(), -1)


def still(value: float = 0.5) -> Tensor:
    """A frame in which the optical flow finds nothing that moves."""
    texture = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return value + 0.1 * (F.interpolate(texture, size=(48, 64), mode="bicubic") - 0.5)


def test_frames_go_on_from_the_one_before_with_its_frame_memory_and_an_empty_step_memory() -> None:
    pytest.importorskip("cv2")
    inferer, frame = FramewiseInferer(VideoStyleTask(), 2, next_steps=1), still()
    for clip in range(2):
        before = 0.0
        for number, steps in enumerate((0.03, 0.03, 0.04)):  # steps 1 and 2, then 3, then 4
            before = darker = KEPT * before + steps
            result = inferer(frame, Count())
            torch.testing.assert_close(result, frame - darker, msg=f"frame {number} of clip {clip}", atol=1e-3, rtol=0)
        assert (inferer.carried["frame_memory"] == 4).all()
        inferer.restart()


def test_no_more_steps_follow_than_a_first_frame_takes() -> None:
    pytest.importorskip("cv2")
    inferer, frame = FramewiseInferer(VideoStyleTask(), 0, next_steps=2), still()
    for _ in range(2):
        torch.testing.assert_close(inferer(frame, Count()), frame, atol=1e-3, rtol=0)


def test_no_memory_is_carried_that_the_task_has_not() -> None:
    pytest.importorskip("cv2")
    inferer, frame = FramewiseInferer(VideoStyleTask(), 2, next_steps=1, carry=()), still()
    darker = 0.0
    for steps in (0.03, 0.01, 0.01):
        darker = KEPT * darker + steps
        torch.testing.assert_close(inferer(frame, Count()), frame - darker, atol=1e-3, rtol=0)
    assert inferer.carried == {}


@pytest.mark.parametrize("size", [(48, 64), (49, 48), (50, 51), (47, 45), (45, 53)])
def test_frames_of_any_size_are_filled_up_by_repeating_their_edge(size: tuple[int, int]) -> None:
    pytest.importorskip("cv2")
    seen: list[Tensor] = []

    class Watch(Count):
        def forward(self, observation: Tensor) -> Tensor:
            seen.append(observation)
            return super().forward(observation)

    frame = F.interpolate(still(), size=size, mode="bilinear")
    inferer = FramewiseInferer(VideoStyleTask(), 1)
    torch.testing.assert_close(inferer(MetaTensor(frame), Watch()), frame - 0.01)
    torch.testing.assert_close(inferer(frame, Watch()), frame - KEPT * 0.01 - 0.02, atol=1e-3, rtol=0)
    for observation in seen:
        height, width = observation.shape[2:]
        assert (height % 4, width % 4) == (0, 0)
        assert height - size[0] in range(4)
        assert width - size[1] in range(4)
        assert torch.equal(observation[:, :3, : size[0], : size[1]], frame)
        assert torch.equal(observation[:, :3, -1, -1], frame[:, :, -1, -1])


STROKE = 6
"""Pixels from one of the strokes to the next."""


class Paint(Count):
    """Adds strokes to the first frame and nothing to those that follow, where the frame memory is not empty."""

    def forward(self, observation: Tensor) -> Tensor:
        columns = torch.arange(observation.shape[3])
        strokes = (0.1 * torch.cos(2 * math.pi * columns / STROKE)).expand_as(observation[:, :3])
        first = not observation[:, 7:8].any()
        return torch.cat([strokes * first, torch.ones_like(observation[:, :2])], 1)


def moving_texture(frames: int) -> list[Tensor]:
    """What is shown moves to the left by a pixel and a half a frame."""
    coarse = torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    whole = 0.2 + 0.6 * F.interpolate(coarse, size=(144, 168), mode="bicubic").clamp(0, 1)
    return [F.avg_pool2d(whole[..., 8:136, 3 * i : 3 * i + 128], 2) for i in range(frames)]


def test_what_a_frame_was_given_moves_with_what_is_shown() -> None:
    pytest.importorskip("cv2")
    frames = moving_texture(7)
    inferer, network = FramewiseInferer(VideoStyleTask(), 1), Paint()
    results = [inferer(frame, network) for frame in frames]
    given = [(result - frame)[0, 0] for frame, result in zip(frames, results, strict=True)]
    here, there = given[0][16:48, 19:49], given[6][16:48, 10:40]  # 9 pixels to the left
    share = float((here * there).sum() / (here * here).sum())
    assert 0.9 < share / KEPT**6 < 1.3, "carried along, not smeared"
    assert float(given[6][:, -7:].abs().max()) < 0.03, "what comes into view has been given nothing"
    flows = flows_between([frame[0] for frame in frames])
    assert temporal_error([result[0] for result in results], flows) < 0.02


def test_a_cut_begins_anew() -> None:
    pytest.importorskip("cv2")
    inferer, network = FramewiseInferer(VideoStyleTask(), 2, next_steps=1), Count()
    for frame in moving_texture(3):
        inferer(frame, network)
    other = 0.2 + 0.6 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(inferer(other, network), other - 0.03)
    assert (inferer.carried["frame_memory"] == 2).all()


@pytest.mark.parametrize("colour", [0.0, 1.0])
def test_a_clip_that_begins_with_one_colour_begins_anew_with_the_first_picture(colour: float) -> None:
    pytest.importorskip("cv2")
    inferer, network = FramewiseInferer(VideoStyleTask(), 2, next_steps=1), Count()
    picture = moving_texture(1)[0]
    inferer(torch.full_like(picture, colour), network)
    torch.testing.assert_close(inferer(picture, network), picture - 0.03)


def test_a_frame_of_another_size_is_a_first_one() -> None:
    pytest.importorskip("cv2")
    inferer = FramewiseInferer(VideoStyleTask(), 2, next_steps=1)
    inferer(still(), Count())
    other = still()[..., :40]
    torch.testing.assert_close(inferer(other, Count()), other - 0.03)


def test_several_frames_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one frame at a time, got 2"):
        FramewiseInferer(VideoStyleTask(), 1)(still().repeat(2, 1, 1, 1), Count())


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        FramewiseInferer(VideoStyleTask(), 2, next_steps=-1)
