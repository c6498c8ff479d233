"""Refinement: it lowers the loss, never raises it, keeps to its limits, and works inside MONAI's Compose."""

from __future__ import annotations

import time

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from monai.transforms import Compose
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.metrics import folded_percent, local_ncc
from monai_rl_reg.refinement import RefineDisplacementd, refine
from monai_rl_reg.tasks.registration import RegistrationTask
from monai_rl_reg.tasks.task import State


def pair(dims: int = 3, size: int = 20) -> Tensor:
    """A smooth random picture, and the same one deformed: (1, 2, *spatial) in [0, 1]."""
    mode = "trilinear" if dims == 3 else "bilinear"
    shape = [size] * dims
    image = F.interpolate(torch.rand(1, 1, *[size // 3] * dims), shape, mode=mode, align_corners=True)
    field = 3 * F.interpolate(torch.randn(1, dims, *[3] * dims), shape, mode=mode, align_corners=True)
    return torch.cat([image, Warp("bilinear", "border")(image, field)], 1)


def loss_of(task: RegistrationTask, state: State) -> float:
    return float(sum(task.loss(state, torch.zeros_like(state["displacement"]), unused).values()))


def unused(observation: Tensor) -> Tensor:
    raise AssertionError("registration's loss asks no policy")


@pytest.mark.parametrize("stride", [1, 2])
def test_the_loss_falls_and_the_images_agree_more(stride: int) -> None:
    task = RegistrationTask(3, field_stride=stride, fold_weight=10.0)
    start = task.reset(pair())
    done = refine(task, start, unused, iterations=40)
    assert done.iterations == 40
    assert done.loss_before == pytest.approx(loss_of(task, start), abs=1e-6)
    at_rest = loss_of(task, done.state) - task.smoothness_weight * float(task.smoothness(done.state["displacement"]))
    assert at_rest - 1e-5 <= done.loss_after < done.loss_before - 0.02
    before, after = (local_ncc(s["moved"], s["fixed"]) for s in (start, done.state))
    assert after > before + 0.05
    assert folded_percent(done.state["displacement"]) == 0
    assert not done.state["displacement"].requires_grad


def test_proximity_keeps_the_field_near_where_it_began() -> None:
    task = RegistrationTask(3, field_stride=2, fold_weight=10.0)
    start = task.reset(pair())
    free, held = (refine(task, start, unused, iterations=30, proximity=p).state for p in (0.0, 10.0))
    lengths = [float(state["displacement"].norm(dim=1).mean()) for state in (free, held)]
    assert 0 < lengths[1] < 0.5 * lengths[0]
    roughness = [float(task.smoothness(state["displacement"])) for state in (free, held)]
    assert roughness[1] < 0.1 * roughness[0]
    assert loss_of(task, held) < loss_of(task, start) - 1e-3


def test_a_field_that_is_right_is_not_held_back_for_being_long() -> None:
    torch.manual_seed(0)
    field = torch.zeros(1, 3, 20, 20, 20)
    field[:, 0] = 3 * torch.sin(torch.linspace(0, 2 * torch.pi, 20)).reshape(-1, 1, 1)
    task, moving = RegistrationTask(3, fold_weight=10.0), pair()[:, :1]
    start = task.advance(task.reset(torch.cat([Warp("bilinear", "border")(moving, field), moving], 1)), field)
    done = refine(task, start, unused, iterations=40)
    assert float((done.state["displacement"] - field).abs().mean()) < 0.1


def test_smooth_steps_add_up_to_what_one_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    task = RegistrationTask(3, smoothness_weight=20.0)
    start, alike = task.reset(pair()), []
    for iterations in (60, 15):
        monkeypatch.setattr("monai_rl_reg.refinement.ITERATIONS_A_STEP", iterations)
        after = refine(task, start, unused, iterations=60).state
        alike.append(float(local_ncc(after["moved"], after["fixed"])))
    assert alike[1] > alike[0] + 0.05


def test_it_is_never_worse_than_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_rl_reg.refinement.LEARNING_RATE", 50.0)  # every iteration makes it worse
    task = RegistrationTask(3)
    start = task.reset(pair())
    done = refine(task, start, unused, iterations=30)
    assert done.iterations == 30  # more than one step, each of which brings nothing
    assert done.loss_after == done.loss_before
    assert torch.equal(done.state["displacement"], start["displacement"])


def test_no_time_gives_back_the_start() -> None:
    task = RegistrationTask(2)
    start = task.reset(pair(2))
    done = refine(task, start, unused, seconds=0.0)
    assert done.iterations == 0
    assert done.state is start


def test_time_is_kept_to() -> None:
    task, began = RegistrationTask(2), time.monotonic()
    done = refine(task, task.reset(pair(2)), unused, seconds=0.5)
    assert done.iterations > 3
    assert time.monotonic() - began < 5.0  # one iteration may run over, on a busy machine


def test_a_limit_is_needed() -> None:
    with pytest.raises(ValueError, match="expected a limit"):
        refine(RegistrationTask(2), {}, unused)


def test_it_works_where_gradients_are_off() -> None:
    task = RegistrationTask(2)
    with torch.no_grad():
        done = refine(task, task.reset(pair(2)), unused, iterations=5)
    assert done.loss_after < done.loss_before


@pytest.mark.parametrize("dims", [2, 3])
def test_as_a_transform_of_monai(dims: int) -> None:
    image = pair(dims)[0]
    start = torch.zeros(dims, *image.shape[1:])
    transform = Compose([RefineDisplacementd("pred", iterations=40)])
    out = transform({"image": image, "pred": start})
    assert out["pred"].shape == start.shape
    moved = Warp("bilinear", "border")(image[None, 1:], out["pred"][None])
    assert local_ncc(moved, image[None, :1]) > local_ncc(image[None, 1:], image[None, :1]) + 0.05
    assert torch.equal(out["image"], image)
    assert not start.any()  # what was given stays as it was


def test_the_transform_starts_from_the_field_it_is_given() -> None:
    image = pair(2)[0]
    field = 0.3 * torch.randn(2, *image.shape[1:])
    out = RefineDisplacementd("pred", iterations=0)({"image": image, "pred": field})
    assert torch.allclose(out["pred"], field)


def test_the_field_keeps_its_affine() -> None:
    image, affine = pair(3)[0], torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    field = MetaTensor(torch.zeros(3, *image.shape[1:]), affine=affine)
    out = RefineDisplacementd("pred", iterations=1)({"image": image, "pred": field})
    assert isinstance(out["pred"], MetaTensor)
    assert torch.equal(out["pred"].affine, affine)


def test_a_field_on_another_grid() -> None:
    with pytest.raises(ValueError, match=r"pred: expected a field on the task's grid of shape \(2, 20, 20\)"):
        RefineDisplacementd("pred", iterations=1)({"image": pair(2)[0], "pred": torch.zeros(2, 10, 10)})
