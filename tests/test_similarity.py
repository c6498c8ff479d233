"""Similarities: what each ignores, what each sees, and that every part of a registration follows the one named."""

from __future__ import annotations

import math

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import GlobalMutualInformationLoss
from monai.networks.blocks import Warp
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.metrics import local_ncc
from monai_rl_reg.refinement import refine
from monai_rl_reg.similarity import (
    MIND,
    LocalNCC,
    MutualInformation,
    Similarity,
    correlation,
    mutual_information,
    title,
)
from monai_rl_reg.tasks.registration import RegistrationTask
from monai_rl_reg.transforms import MovingToFixedGridd

KINDS = [LocalNCC, MutualInformation, MIND]


def picture(dims: int, size: int = 32, seed: int = 0) -> Tensor:
    """A smooth random picture, (1, 1, *spatial) in [0, 1]."""
    noise = torch.rand(1, 1, *[size // 4] * dims, generator=torch.Generator().manual_seed(seed))
    mode = "trilinear" if dims == 3 else "bilinear"
    image = F.interpolate(noise, [size] * dims, mode=mode, align_corners=True)
    return (image - image.min()) / (image.max() - image.min())


def other_modality(image: Tensor) -> Tensor:
    """A contrast that no local linear map undoes: middle grey is black, dark and bright are bright."""
    return (2 * image - 1).abs()


def waves(dims: int, size: int, amplitude: float) -> Tensor:
    """A smooth field, (1, d, *spatial) in voxels."""
    at = torch.stack(torch.meshgrid(*[torch.linspace(0, 2 * math.pi, size)] * dims, indexing="ij"))
    return amplitude * torch.sin(at.roll(1, 0) + torch.arange(dims).reshape(-1, *[1] * dims))[None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_each_item_has_its_own_and_alike_images_have_more(kind: type[Similarity], dims: int) -> None:
    one, two = picture(dims, seed=0), picture(dims, seed=1)
    found = kind(dims)(torch.cat([one, two, one]), torch.cat([one, one, two]))
    assert found.shape == (3,)
    assert found[0] > found[1] + kind.gain
    torch.testing.assert_close(found[2], kind(dims)(one, two)[0])


def test_local_ncc_is_the_mean_over_its_scales() -> None:
    one, two = picture(2), picture(2, seed=1)
    expected = (local_ncc(one, two, 5) + local_ncc(F.avg_pool2d(one, 2), F.avg_pool2d(two, 2), 5)) / 2
    torch.testing.assert_close(LocalNCC(2, window=5, scales=2)(one, two), expected)


def test_mutual_information_is_that_of_monai() -> None:
    one, two = picture(3, 12), picture(3, 12, seed=1)
    torch.testing.assert_close(
        MutualInformation(3, bins=16)(one, two), -GlobalMutualInformationLoss(num_bins=16)(one, two)[None]
    )


def test_mutual_information_of_large_images_is_that_of_blocks_and_pulls_at_every_voxel() -> None:
    one, two = picture(2, 16), picture(2, 16, seed=1)
    coarse = MutualInformation(2, most_voxels=100)
    expected = MutualInformation(2)(F.avg_pool2d(one, 2), F.avg_pool2d(two, 2))
    torch.testing.assert_close(coarse(one, two), expected)
    assert not torch.allclose(MutualInformation(2)(one, two), expected)
    assert (coarse.pull(one, two).abs().amax(1) > 0).float().mean() > 0.9


def test_mutual_information_keeps_its_digits_where_the_networks_compute_in_bfloat16() -> None:
    one, two = picture(3, 12), picture(3, 12, seed=1)
    exact = MutualInformation(3)(one, two)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(MutualInformation(3)(one, two), exact)


@pytest.mark.parametrize(("dims", "channels"), [(2, 4), (3, 12)])
def test_mind_has_a_channel_for_every_two_directions(dims: int, channels: int) -> None:
    described = MIND(dims).describe(picture(dims))
    assert described.shape == (1, channels, *[32] * dims)
    assert ((described >= 0) & (described <= 1)).all()
    torch.testing.assert_close(described.amax(1), torch.ones_like(described[:, 0]))  # of the closest two


def test_mind_by_its_definition() -> None:
    image = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0))

    def patch_distance(a: tuple[int, int], b: tuple[int, int], x: tuple[int, int]) -> float:
        total = 0.0
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                one, two = (image[0, 0, x[0] + i + o[0], x[1] + j + o[1]] for o in (a, b))
                total += float((one - two) ** 2) / 9
        return total

    near = [(-1, 0), (1, 0), (0, -1), (0, 1)]
    distance = torch.tensor([patch_distance(a, b, (4, 4)) for a in near[:2] for b in near[2:]])
    distance = distance - distance.min()
    expected = torch.exp(-distance / distance.mean())
    torch.testing.assert_close(MIND(2, dilation=1).describe(image)[0, :, 4, 4], expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_mind_ignores_brightness_and_contrast(dims: int) -> None:
    image = picture(dims)
    assert MIND(dims)(0.2 + 0.3 * image, image).item() == pytest.approx(1, abs=1e-4)
    assert MIND(dims)(1 - image, image).item() == pytest.approx(1, abs=1e-4)


def test_flat_images_give_finite_gradients() -> None:
    for kind in KINDS:
        flat = torch.full((1, 1, 12, 12), 0.5, requires_grad=True)
        kind(2)(flat, picture(2, 12)).sum().backward()
        assert flat.grad is not None
        assert torch.isfinite(flat.grad).all()


def recovered(similarity: Similarity, dims: int) -> tuple[float, float]:
    """Mean distance in voxels before and after registering a picture to its deformed self of another modality."""
    size = 40 if dims == 3 else 64
    image = picture(dims, size)
    # moved(x) = moving(x + u(x)): with the moving image as it is, the fixed one is it at x + u(x)
    truth = waves(dims, size, 2.0)
    pair = torch.cat([other_modality(Warp("bilinear", "border")(image, truth)), image], 1)
    task = RegistrationTask(dims, field_stride=2, similarity=similarity, smoothness_weight=0.3)
    refined = refine(task, task.reset(pair), lambda observation: observation, iterations=80).state
    inner = (..., *[slice(4, -4)] * dims)
    field = task.output(refined)
    return tuple(float((f - truth)[inner].norm(dim=1).mean()) for f in (torch.zeros_like(truth), field))  # type: ignore[return-value]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", [MutualInformation, MIND])
def test_a_deformation_between_two_modalities_is_found(kind: type[Similarity], dims: int) -> None:
    before, after = recovered(kind(dims), dims)
    by_ncc = recovered(LocalNCC(dims), dims)[1]
    print(kind.__name__, dims, before, after, by_ncc)
    assert after < 0.6 * before
    assert after < by_ncc - 0.2


def test_the_alignment_goes_by_mutual_information_where_the_modalities_differ() -> None:
    image = picture(2, 40)[0]
    other = torch.where(image < 0.75, image / 0.75, 4 * (1 - image))  # bright tops become dark
    shift = torch.eye(4)
    shift[0, 3] = 9.0  # the affines are wrong: the grids' centres are right
    pair = {"fixed": MetaTensor(image, affine=torch.eye(4)), "moving": MetaTensor(1 - other, affine=shift)}
    by_information = MovingToFixedGridd("auto", MutualInformation(2))(pair)["initial"]
    assert by_information[0, 3] == 9.0
    assert MovingToFixedGridd("world", MutualInformation(2))(pair)["initial"][0, 3] == 0.0


def test_the_whole_images_measures() -> None:
    image = picture(2)
    assert correlation(image, 1 - image) == pytest.approx(-1)
    assert abs(correlation(image, other_modality(image))) < 0.5
    halves = (image > image.median()).float()
    assert mutual_information(halves, 1 - halves) == pytest.approx(math.log(2), abs=1e-3)
    assert mutual_information(halves, torch.zeros_like(halves)) == pytest.approx(0, abs=1e-9)


def test_names_as_one_writes_them() -> None:
    assert [title(kind.name) for kind in KINDS] == ["NCC", "mutual information", "MIND"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_the_pull_is_the_gradient_along_a_displacement(kind: type[Similarity], dims: int) -> None:
    fixed = picture(dims)
    moved = Warp("bilinear", "border")(fixed, waves(dims, 32, 1.5))
    similarity = kind(dims)
    value, pull = similarity.value_and_pull(moved, fixed)
    torch.testing.assert_close(value, similarity.estimate(moved, fixed))
    assert pull.shape == (1, dims, *moved.shape[2:])
    step = 1e-3 * waves(dims, 32, 1.0).roll(1, 1)
    inside = (slice(None), slice(None), *[slice(1, -1)] * dims)  # at the border nothing is seen beyond it
    mask = torch.zeros_like(step)
    mask[inside] = 1.0
    gradient = torch.cat(torch.gradient(moved[0, 0], dim=list(range(dims)))).reshape(1, dims, *moved.shape[2:])
    there = moved + (step * mask * gradient).sum(1, keepdim=True)
    after, before = (similarity.estimate(image.double(), fixed.double()) for image in (there, moved))
    gain = float(after - before)
    expected = float((pull * step * mask).sum()) / moved[0].numel()
    assert gain == pytest.approx(expected, rel=0.1)


def test_an_estimate_is_nearly_the_similarity() -> None:
    fixed = picture(3)
    moved = Warp("bilinear", "border")(fixed, waves(3, 32, 1.5))
    exact, estimate = (float(f(moved, fixed)) for f in (LocalNCC(3), LocalNCC(3).estimate))
    assert estimate != exact
    assert estimate == pytest.approx(exact, rel=0.01)


def test_the_pull_does_not_depend_on_how_much_surrounds_it() -> None:
    fixed = picture(2)
    moved = Warp("bilinear", "border")(fixed, waves(2, 32, 1.5))
    alone, beside = LocalNCC(2).pull(moved, fixed), LocalNCC(2).pull(*(torch.cat([x, x], 2) for x in (moved, fixed)))
    torch.testing.assert_close(beside[:, :, 8:24], alone[:, :, 8:24], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_following_the_pull_raises_the_similarity(kind: type[Similarity]) -> None:
    fixed, warp = picture(2), Warp("bilinear", "border")
    moving, similarity = warp(fixed, waves(2, 32, 1.5)), kind(2)
    displacement, start = torch.zeros(1, 2, 32, 32), float(similarity(moving, fixed))
    for _ in range(20):
        pull = similarity.pull(warp(moving, displacement), fixed)
        pull = F.avg_pool2d(pull, 5, 1, 2)
        displacement = displacement + 0.3 * pull / pull.norm(dim=1).amax()
    assert float(similarity(warp(moving, displacement), fixed)) > start + 10 * kind.gain


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pull_is_there_where_no_gradients_are(kind: type[Similarity], mode: type[torch.no_grad]) -> None:
    similarity, one, two = kind(2), picture(2, seed=0), picture(2, seed=1)
    with mode():
        found = similarity.pull(one.clone(), two.clone())
    torch.testing.assert_close(found, similarity.pull(one.requires_grad_(), two))
    assert not found.requires_grad
    assert not similarity.pull(one, two).requires_grad, "none flows back"
