"""The relaxation of a field after the last action."""

from __future__ import annotations

import pytest
import torch
from conftest import CONFIGS
from monai.bundle import ConfigParser
from registration_pairs import ODD_SIZES, smooth_action
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.anatomy import Anatomy
from monai_rl_reg.geometry import jacobian_determinant
from monai_rl_reg.similarity import MIND, LocalNCC, MutualInformation, Similarity
from monai_rl_reg.tasks.registration import RegistrationTask
from monai_rl_reg.tasks.task import State


def textured_pair(size: tuple[int, ...]) -> Tensor:
    """Two pairs of a smooth texture and the same, moved by up to a few voxels."""
    torch.manual_seed(1)
    mode = "trilinear" if len(size) == 3 else "bilinear"
    moving = F.interpolate(torch.rand(2, 1, *[5] * len(size)), size=size, mode=mode, align_corners=True)
    fixed = RegistrationTask(len(size)).warp(moving, smooth_action(size, batch=2))
    return torch.cat([fixed, moving], dim=1)


def relaxed(task: RegistrationTask, image: Tensor) -> State:
    return task.settle(task.reset(image), 1)


@pytest.mark.parametrize("field_stride", [1, 2])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_it_settles_the_field_where_the_images_agree(size: tuple[int, ...], field_stride: int) -> None:
    image = textured_pair(size)
    task = RegistrationTask(len(size), field_stride=field_stride, relax=6)
    before, after = task.reset(image), relaxed(task, image)
    unlike = [1 - LocalNCC(len(size))(state["moved"], state["fixed"]).mean() for state in (before, after)]
    assert unlike[1] < 0.75 * unlike[0]
    assert 0 < float(after["displacement"].norm(dim=1).max()) <= 3  # at most half a voxel of the grid each time
    assert (jacobian_determinant(after["displacement"]) > 0).all()
    torch.testing.assert_close(after["moved"], task.warp(after["moving"], task.output(after)))


def test_what_is_seen_moves_with_the_field_that_was_kept() -> None:
    image = textured_pair((16, 14))
    anatomy = Anatomy(2, 2, channels=(4, 8, 8)).eval()
    task = RegistrationTask(2, field_stride=2, relax=3, anatomy=anatomy)
    after = relaxed(task, image)
    assert after["displacement"].any()
    torch.testing.assert_close(after["moved_anatomy"], task.warp(anatomy.see(image[:, 1:]), task.output(after)))


@pytest.mark.parametrize("similarity", [LocalNCC(3), MIND(3), MutualInformation(3)], ids=lambda s: s.name)
def test_any_similarity_can_pull(similarity: Similarity) -> None:
    image = textured_pair((16, 14, 15))
    task = RegistrationTask(3, field_stride=2, relax=3, similarity=similarity)
    before, after = (similarity(s["moved"], s["fixed"]) for s in (task.reset(image), relaxed(task, image)))
    assert (after > before).all()


def test_without_it_the_state_stays_as_it_is() -> None:
    state = RegistrationTask(3).reset(textured_pair((12, 10, 11)))
    assert RegistrationTask(3).settle(state, 3) is state


def test_a_rough_field_is_smoothed_first() -> None:
    task = RegistrationTask(3, relax=1)
    flat = task.reset(torch.full((1, 2, 12, 10, 11), 0.5))
    rough = task.advance(flat, 0.2 * torch.randn(1, 3, 12, 10, 11, generator=torch.Generator().manual_seed(0)))
    after = task.settle(rough, 1)
    assert float(task.smoothness(after["displacement"])) < 0.3 * float(task.smoothness(rough["displacement"]))


def test_without_anything_to_see_nothing_moves() -> None:
    flat = torch.full((1, 2, 12, 10, 11), 0.5)
    assert not relaxed(RegistrationTask(3, field_stride=2, relax=2), flat)["displacement"].any()


@pytest.mark.parametrize("field_stride", [1, 2])
def test_images_that_agree_stay_as_they_are(field_stride: int) -> None:
    """But for the thousandth of a voxel they are off. Steps of any length would swing about if nothing held them."""
    image = torch.rand(1, 1, 24, 22, 20, generator=torch.Generator().manual_seed(2))
    image = F.avg_pool3d(image, 3, 1)
    task = RegistrationTask(3, field_stride=field_stride)
    fixed = task.warp(image, torch.full((1, 3, *image.shape[2:]), 1e-3))
    after = relaxed(RegistrationTask(3, field_stride=field_stride, relax=10), torch.cat([fixed, image], dim=1))
    assert float(after["displacement"].abs().max()) < 3e-3
    torch.testing.assert_close(after["moved"], after["moving"], rtol=0, atol=1e-3)


def test_mixed_precision_does_not_reach_the_field() -> None:
    image = textured_pair((12, 10, 11))
    task = RegistrationTask(3, field_stride=2, relax=2)
    with torch.autocast("cpu", torch.bfloat16):
        half = relaxed(task, image)["displacement"]
    torch.testing.assert_close(half, relaxed(task, image)["displacement"])


def test_each_pair_of_a_batch_is_relaxed_by_itself() -> None:
    image = textured_pair((12, 10, 11))
    task = RegistrationTask(3, field_stride=2, relax=2)
    alone = torch.cat([relaxed(task, pair)["displacement"] for pair in image.split(1)])
    torch.testing.assert_close(relaxed(task, image)["displacement"], alone, rtol=1e-4, atol=1e-4)


def test_a_pair_is_relaxed_only_where_similarity_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pair of the batch is pulled the wrong way."""
    right, sign = LocalNCC.value_and_pull, torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1, 1)

    def wrong(self: LocalNCC, moved: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        value, pull = right(self, moved, fixed)
        return value, sign * pull

    monkeypatch.setattr(LocalNCC, "value_and_pull", wrong)
    after = relaxed(RegistrationTask(3, field_stride=2, relax=2), textured_pair((16, 14, 15)))
    assert after["displacement"][0].any()
    assert not after["displacement"][1].any()
    torch.testing.assert_close(after["moved"][1], after["moving"][1])


@pytest.mark.parametrize(("weights", "relax"), [("model.pt", 0), ("model_without_labels.pt", 4)])
@pytest.mark.parametrize("configs", [["inference.json"], ["train.json", "evaluate.json"]])
def test_weights_that_see_structures_are_not_relaxed(configs: list[str], weights: str, relax: int) -> None:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in configs])
    parser.update({"bundle_root": str(CONFIGS.parent), "ckpt": str(CONFIGS.parent / "models" / weights)})
    assert parser.get_parsed_content("task").relax == relax
