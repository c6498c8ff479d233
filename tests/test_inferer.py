from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.inferer import FramewiseInferer, StepwiseInferer
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


def test_frames_carry_the_frame_memory_and_start_with_an_empty_step_memory() -> None:
    inferer, frame = FramewiseInferer(VideoStyleTask(), 2), torch.full((1, 3, 8, 8), 0.5)
    for clip in range(2):
        for number in range(3):
            first = 2 * number + 1  # steps of the clip, counted by the frame memory
            darker = 0.01 * (first + first + 1)
            torch.testing.assert_close(inferer(frame, Count()), frame - darker, msg=f"frame {number} of clip {clip}")
        assert (inferer.carried["frame_memory"] == 6).all()
        inferer.restart()


def test_frames_by_themselves_carry_nothing() -> None:
    inferer, frame = FramewiseInferer(VideoStyleTask(), 2, carry=()), torch.full((1, 3, 8, 8), 0.5)
    for _ in range(2):
        torch.testing.assert_close(inferer(frame, Count()), frame - 0.03)
    assert inferer.carried == {}


def test_every_memory_can_be_carried() -> None:
    inferer = FramewiseInferer(VideoStyleTask(), 2, carry=("frame_memory", "step_memory"))
    for _ in range(2):
        inferer(torch.full((1, 3, 8, 8), 0.5), Count())
    assert (inferer.carried["step_memory"] == 4).all()


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (10, 11), (7, 5), (5, 13)])
def test_frames_of_any_size_are_filled_up_by_repeating_their_edge(size: tuple[int, int]) -> None:
    seen: list[Tensor] = []

    class Watch(Count):
        def forward(self, observation: Tensor) -> Tensor:
            seen.append(observation)
            return super().forward(observation)

    frame = 0.3 + 0.4 * torch.rand(1, 3, *size)
    inferer = FramewiseInferer(VideoStyleTask(), 1)
    torch.testing.assert_close(inferer(MetaTensor(frame), Watch()), frame - 0.01)
    torch.testing.assert_close(inferer(frame, Watch()), frame - 0.02)
    height, width = seen[0].shape[2:]
    assert (height % 4, width % 4) == (0, 0)
    assert height - size[0] in range(4)
    assert width - size[1] in range(4)
    assert torch.equal(seen[0][..., :3, : size[0], : size[1]][:, :3], frame)
    assert torch.equal(seen[0][:, :3, -1, -1], frame[:, :, -1, -1])


class Flicker(Count):
    """Brightens every frame by a different amount, which no frame deserves."""

    calls = 0

    def forward(self, observation: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(observation[:, :5], 0.2 * (self.calls % 2))


def moving_texture(frames: int) -> list[Tensor]:
    coarse = torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    whole = 0.1 + 0.6 * F.interpolate(coarse, size=(72, 84), mode="bicubic").clamp(0, 1)
    return [whole[..., 4:68, 2 * i : 2 * i + 64] for i in range(frames)]


@pytest.mark.parametrize("steadiness", [0.5, 0.8])
def test_steadiness_takes_flicker_away_and_lets_things_move(steadiness: float) -> None:
    pytest.importorskip("cv2")
    frames = moving_texture(6)
    flows = flows_between([frame[0] for frame in frames])

    def clip(inferer: FramewiseInferer) -> list[Tensor]:
        network = Flicker()
        return [inferer(frame, network)[0] for frame in frames]

    inferer = FramewiseInferer(VideoStyleTask(), 1, steadiness=steadiness)
    steady, restless = clip(inferer), clip(FramewiseInferer(VideoStyleTask(), 1))
    before, after = temporal_error(restless, flows), temporal_error(steady, flows)
    assert after < 1.3 * (1 - steadiness) * before
    sharp = [(a.mean(), a.std()) for a in (frames[-1][0], steady[-1])]
    assert sharp[1][1] > 0.9 * sharp[0][1], "what moves is carried along, not smeared"
    inferer.restart()
    assert torch.equal(clip(inferer)[0], restless[0]), "the first frame of a clip has none before it"


@pytest.mark.parametrize("steadiness", [-0.1, 1.0])
def test_a_steadiness_out_of_range_is_refused(steadiness: float) -> None:
    with pytest.raises(ValueError, match=f"expected a steadiness from 0 to less than 1, got {steadiness}"):
        FramewiseInferer(VideoStyleTask(), 1, steadiness=steadiness)
