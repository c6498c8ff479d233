from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import compute_dice
from monai.networks.utils import one_hot
from torch import Tensor

from monai_rl_reg.geometry import identity_grid, jacobian_determinant
from monai_rl_reg.metrics import (
    folded_percent,
    label_dice,
    local_ncc,
    log_jacobian_std,
    mean_label_dice,
)
from monai_rl_reg.similarity import LocalNCC

SIZES = [(9, 12), (8, 6, 7)]


def monai_dice(moved: Tensor, fixed: Tensor, classes: int) -> Tensor:
    return compute_dice(one_hot(moved, classes), one_hot(fixed, classes), include_background=False)


def scaled_field(factors: Sequence[float], size: Sequence[int]) -> Tensor:
    """The field of x -> factor x, one factor a direction."""
    d = len(size)
    scale = torch.tensor(factors[:d], dtype=torch.float64).reshape(-1, *[1] * d) - 1
    return (scale * identity_grid(size)).float()[None]


def constant_field(shift: Sequence[float], size: Sequence[int]) -> Tensor:
    return torch.tensor(shift).reshape(1, -1, *[1] * len(size)).repeat(1, 1, *size)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_label_dice_equals_that_of_monai(size: tuple[int, ...], dtype: torch.dtype) -> None:
    moved, fixed = torch.randint(0, 6, (2, 3, 1, *size)).to(dtype)
    torch.testing.assert_close(label_dice(moved, fixed), monai_dice(moved, fixed, 6))


@pytest.mark.parametrize("size", SIZES)
def test_nested_label_dice_equals_that_of_monai(size: tuple[int, ...]) -> None:
    moved, fixed = torch.randint(0, 4, (2, 3, 1, *size))
    masks = (torch.cat([label >= value for value in (1, 2, 3)], dim=1) for label in (moved, fixed))
    torch.testing.assert_close(label_dice(moved, fixed, nested=True), compute_dice(*masks))


def test_label_dice_is_nan_where_the_fixed_map_lacks_the_label() -> None:
    fixed, moved = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    fixed[0, 0, :2] = 1
    fixed[1, 0, :2] = 3
    moved[0, 0, 1:3] = 1
    moved[0, 0, 3] = 2
    moved[1, 0, :1] = 3
    expected = torch.tensor([[0.5, torch.nan, torch.nan], [torch.nan, torch.nan, 2 / 3]])
    torch.testing.assert_close(label_dice(moved, fixed), expected, equal_nan=True)
    torch.testing.assert_close(label_dice(moved, fixed), monai_dice(moved, fixed, 4), equal_nan=True)


def test_label_dice_is_zero_where_only_the_moved_map_lacks_the_label() -> None:
    fixed = torch.ones(1, 1, 4, 4)
    assert label_dice(torch.zeros_like(fixed), fixed).tolist() == [[0.0]]


def test_mean_label_dice_leaves_out_labels_that_the_fixed_map_lacks() -> None:
    fixed, moved = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    fixed[0, 0, :2], fixed[0, 0, 3] = 1, 3
    moved[0, 0, 1:3], moved[0, 0, 0], moved[0, 0, 3] = 1, 2, 3
    torch.testing.assert_close(mean_label_dice(moved, fixed), torch.tensor([(0.5 + 1.0) / 2]))


@pytest.mark.parametrize("moved_value", [0, 1])
def test_mean_label_dice_of_a_fixed_map_without_labels_is_nan(moved_value: int) -> None:
    fixed = torch.zeros(2, 1, 4, 4)
    assert mean_label_dice(torch.full_like(fixed, moved_value), fixed).isnan().all()


@pytest.mark.parametrize("size", SIZES)
def test_identity_has_no_folds(size: tuple[int, ...]) -> None:
    assert folded_percent(torch.zeros(2, len(size), *size)).tolist() == [0, 0]


@pytest.mark.parametrize("size", SIZES)
def test_mirroring_folds_every_voxel(size: tuple[int, ...]) -> None:
    assert folded_percent(scaled_field([-1, 1, 1], size)).item() == 100


def test_folded_percent_counts_the_folded_voxels_of_each_item() -> None:
    field = torch.zeros(2, 2, 10, 10)
    # a slope of -1.5 around row 5: central differences see it in two rows of ten
    field[1, 0, 5:] = -3.0
    assert folded_percent(field).tolist() == [0, 20]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("size", SIZES)
def test_uniform_scaling_has_no_spread_of_log_jacobian(size: tuple[int, ...], factor: float) -> None:
    assert log_jacobian_std(scaled_field([factor] * 3, size)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_log_jacobian_std_is_that_of_numpy(size: tuple[int, ...]) -> None:
    field = 0.1 * torch.randn(2, len(size), *size)
    determinants = jacobian_determinant(field).double().numpy()
    assert determinants.min() > 0
    expected = np.log(determinants).reshape(2, -1).std(axis=1)
    torch.testing.assert_close(log_jacobian_std(field).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-6)


def test_log_jacobian_std_of_a_fold_is_finite() -> None:
    field = torch.zeros(1, 2, 10, 10)
    field[0, 0, 5:] = -3.0
    assert log_jacobian_std(field).item() > 1


@pytest.mark.parametrize("size", SIZES)
def test_local_ncc_of_a_textured_image_with_itself_is_one(size: tuple[int, ...]) -> None:
    image = torch.rand(2, 1, *size)
    torch.testing.assert_close(local_ncc(image, image, 5), torch.ones(2), rtol=0, atol=1e-3)


def test_local_ncc_ignores_contrast() -> None:
    image = torch.rand(1, 1, 24, 24)
    assert local_ncc(0.3 * image, image, 5).item() == pytest.approx(1, abs=1e-3)


def test_local_ncc_of_unrelated_images_is_low_and_of_each_item_its_own() -> None:
    image, other = torch.rand(2, 1, 1, 30, 30)
    ncc = local_ncc(torch.cat([image, other]), torch.cat([image, image]), 5)
    assert ncc[0] > 0.99
    assert ncc[1] < 0.4


@pytest.mark.parametrize(("first", "second"), [(0.9, 0.9), (0.7, 0.3)])
def test_local_ncc_of_flat_images_stays_between_zero_and_one(first: float, second: float) -> None:
    flat = torch.ones(1, 1, 20, 20, 20)
    ncc = local_ncc(first * flat, second * flat).item()
    assert 0 <= ncc <= 1


IMAGES = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
FIELDS = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(1))
FIGURES = [
    (lambda field, fixed: folded_percent(field), FIELDS, folded_percent(FIELDS)),
    (lambda field, fixed: log_jacobian_std(field), FIELDS, log_jacobian_std(FIELDS)),
    (LocalNCC(2, window=5), IMAGES.flip(2), local_ncc(IMAGES.flip(2), IMAGES, 5)),
]


@pytest.mark.parametrize(("figure", "predictions", "expected"), FIGURES)
def test_figure_is_the_mean_over_pairs_in_an_evaluator(
    figure: Callable[[Tensor, Tensor], Tensor], predictions: Tensor, expected: Tensor
) -> None:
    batches = [[{"pred": a, "fixed": b} for a, b in zip(predictions[i], IMAGES[i], strict=True)] for i in ([0, 1], [2])]
    evaluator = Engine(lambda engine, batch: batch)
    handler = IgniteMetricHandler(loss_fn=figure, output_transform=from_engine(["pred", "fixed"]))
    handler.attach(evaluator, "figure")
    for _ in range(2):  # the second run starts afresh
        evaluator.run(batches)
        assert evaluator.state.metrics["figure"] == pytest.approx(expected.mean().item())
