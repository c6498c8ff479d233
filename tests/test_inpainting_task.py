from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monai_rl_reg.errors import InputError
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.rollout import follow
from monai_rl_reg.tasks.inpainting import InpaintingTask
from monai_rl_reg.tasks.translation import GREY, SpectralDiscriminator

HOLE = (slice(None), slice(None), slice(3, 9), slice(4, 12))
"""Where a hole of one half lies in a picture of 12 x 16."""


def make_policy() -> PlannerActor:
    policy = PlannerActor(2, 3, 3, channels=(8, 16), plan_channels=4, action_stride=1)
    nn.init.normal_(policy.actor.head.conv.weight, std=0.1)
    return policy.eval()


def test_first_state_is_the_image_with_a_grey_hole() -> None:
    image = torch.rand(2, 3, 12, 16)
    kept = image.clone()
    state = InpaintingTask().reset(image)
    outside = torch.ones_like(image, dtype=torch.bool)
    outside[HOLE] = False
    for key in ("source", "prediction"):
        assert torch.equal(state[key][outside], image[outside])
        assert (state[key][HOLE] == GREY).all()
    assert torch.equal(state["target"], kept)
    assert torch.equal(image, kept)


def test_hole_cannot_be_seen() -> None:
    task = InpaintingTask()
    first, second = torch.rand(2, 3, 12, 16), torch.rand(2, 3, 12, 16)
    other = first.clone()
    other[HOLE] = second[HOLE]
    assert torch.equal(task.observe(task.reset(first)), task.observe(task.reset(other)))


@pytest.mark.parametrize("views", [1, 2, 4])
def test_prediction_is_the_mean_of_looks_from_every_side(views: int) -> None:
    task, policy, image = InpaintingTask(views=views), make_policy(), torch.rand(2, 3, 12, 16)
    state = task.reset(image)
    *_, last = follow(policy, task, state, views)

    def looked(*turns: int) -> Tensor:
        """What the policy makes of the hole of the picture when it is turned by hand, and the result turned back."""
        turned = state["source"].flip(turns)
        return task.region((turned + policy(turned)).clamp(0, 1).flip(turns))

    proposals = torch.stack([looked(), looked(3), looked(2), looked(2, 3)][:views])
    torch.testing.assert_close(task.region(task.output(last)), proposals.mean(0))
    assert last["looks"].tolist() == [views] * 2
    assert views == 1 or not torch.allclose(proposals[0], proposals[-1])


def test_looks_may_differ_within_a_batch() -> None:
    task, image, action = InpaintingTask(), torch.rand(2, 3, 12, 16), torch.rand(2, 3, 12, 16) - 0.5
    state = task.reset(image)
    both = task.advance(state | {"looks": torch.tensor([0, 3])}, action)["prediction"]
    for k, looks in enumerate((0, 3)):
        alone = task.advance(state | {"looks": torch.tensor([looks] * 2)}, action)["prediction"]
        assert torch.equal(both[k], alone[k])


def test_loss_is_that_of_the_proposal_whatever_was_filled_in_before() -> None:
    task, action = InpaintingTask(), torch.rand(2, 3, 12, 16) - 0.5
    state = task.reset(torch.rand(2, 3, 12, 16)) | {"looks": torch.tensor([3, 3])}
    other = state | {"prediction": state["target"]}
    assert task.loss(state, action, lambda x: x)["l1"] == task.loss(other, action, lambda x: x)["l1"]


def test_outside_of_the_hole_nothing_changes() -> None:
    task = InpaintingTask()
    state = task.reset(torch.rand(2, 3, 12, 16))
    for _ in range(3):
        after = task.advance(state, 0.4 * torch.rand(2, 3, 12, 16) - 0.2)
        changed = after["prediction"] != state["prediction"]
        assert changed[HOLE].all()
        changed[HOLE] = False
        assert not changed.any()
        state = after


def test_reward_by_hand() -> None:
    task = InpaintingTask()
    state = task.reset(torch.full((1, 3, 12, 16), 0.7))  # 13.98 dB away from grey
    reward = task.step(state, torch.full((1, 3, 12, 16), 0.1))[1]  # 20 dB
    assert float(reward) == pytest.approx(0.1 * (20 - 13.9794), rel=1e-4)


def test_discriminator_judges_the_hole() -> None:
    class Seen(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            sizes.append(tuple(x.shape))
            return [x.mean((1, 2, 3), keepdim=True)]

    sizes: list[tuple[int, ...]] = []
    task = InpaintingTask(adversarial_weight=0.5, discriminator=Seen())
    task.loss(task.reset(torch.rand(2, 3, 12, 16)), torch.zeros(2, 3, 12, 16), lambda x: x)
    assert sizes == [(2, 6, 6, 8)] * 3


def test_wrong_views_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="views must be 1, 2 or 4, got 3"):
        InpaintingTask(views=3)
    with pytest.raises(ValueError, match="expected images of shape"):
        InpaintingTask().reset(torch.rand(3, 12, 16))


@pytest.mark.parametrize("hole", [0.0, -0.5, 1.5])
def test_a_hole_is_a_share(hole: float) -> None:
    with pytest.raises(InputError, match="hole: expected a share above 0 and up to 1"):
        InpaintingTask(hole=hole)


def test_a_hole_too_small_for_the_discriminator_is_one_sentence() -> None:
    task = InpaintingTask(hole=0.25, discriminator=SpectralDiscriminator(), adversarial_weight=0.1)
    with pytest.raises(InputError, match=r"expected at least 12 pixels a side to be made, .* found 8 x 8"):
        task.loss(task.reset(torch.rand(2, 3, 32, 32)), torch.zeros(2, 3, 32, 32), lambda observation: observation)
