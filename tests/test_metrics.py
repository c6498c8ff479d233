from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import CumulativeIterationMetric, compute_dice
from monai.networks.utils import one_hot
from torch import Tensor

from monai_rl_reg.geometry import identity_grid, jacobian_determinant
from monai_rl_reg.metrics import (
    FoldedPercentMetric,
    LogJacobianStdMetric,
    SimilarityMetric,
    TargetRegistrationErrorMetric,
    folded_percent,
    label_dice,
    local_ncc,
    log_jacobian_std,
    mean_label_dice,
    target_registration_error,
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


def test_target_registration_error_is_in_millimetres() -> None:
    size = (6, 8, 10)
    fixed = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    landmarks = torch.stack([fixed, fixed + torch.tensor([1.0, 2, -1])], dim=2)
    found = target_registration_error(torch.zeros(1, 3, *size), landmarks, (1.0, 2.0, 5.0))
    torch.testing.assert_close(found, torch.full((1, 2), (1 + 16 + 25) ** 0.5))


@pytest.mark.parametrize("size", SIZES)
def test_right_field_has_no_target_registration_error(size: tuple[int, ...]) -> None:
    d = len(size)
    factors = torch.tensor([1.1, 0.8, 1.2])[:d]
    fixed = torch.rand(1, 5, d) * (torch.tensor(size) - 1)
    landmarks = torch.stack([fixed, factors * fixed], dim=2)
    metric = TargetRegistrationErrorMetric((1.0, 2.0, 5.0)[:d])
    metric(scaled_field(factors.tolist(), size), landmarks)
    assert metric.aggregate().item() == pytest.approx(0, abs=1e-4)


def test_target_registration_error_pulls_the_fixed_landmark_to_the_moving_one() -> None:
    size = (8, 8)
    fixed = torch.tensor([[[3.0, 4.0]]])
    landmarks = torch.stack([fixed, fixed + torch.tensor([2.0, 0.0])], dim=2)
    metric = TargetRegistrationErrorMetric((3.0, 1.0))
    metric(constant_field([2.0, 0.0], size), landmarks)
    metric(constant_field([-2.0, 0.0], size), landmarks)
    torch.testing.assert_close(metric.get_buffer(), torch.tensor([[0.0], [12.0]]))


def test_pair_without_a_figure_does_not_count() -> None:
    metric = TargetRegistrationErrorMetric((1.0, 1.0))
    landmarks = torch.zeros(2, 1, 2, 2)
    landmarks[0, 0, 1] = torch.tensor([3.0, 4.0])
    landmarks[1] = torch.nan
    metric(torch.zeros(2, 2, 8, 8), landmarks)
    assert metric.aggregate().item() == pytest.approx(5)
    assert metric.aggregate().item() == pytest.approx(5)


@pytest.mark.parametrize("landmarks", [None, torch.zeros(1, 4, 2), torch.zeros(1, 4, 2, 3)])
def test_landmarks_of_another_shape_are_refused(landmarks: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"landmarks of shape \(B, N, 2, 2\)"):
        TargetRegistrationErrorMetric((1.0, 1.0))(torch.zeros(1, 2, 8, 8), landmarks)


def test_local_ncc_metric_needs_the_fixed_images() -> None:
    with pytest.raises(ValueError, match="fixed images"):
        SimilarityMetric()(torch.rand(1, 1, 8, 8))


def test_metric_without_pairs_cannot_be_aggregated() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        FoldedPercentMetric().aggregate()


IMAGES = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
FIELDS = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(1))
LANDMARKS = 11 * torch.rand(3, 4, 2, 2, generator=torch.Generator().manual_seed(2))
METRICS = [
    (FoldedPercentMetric, {}, FIELDS, IMAGES, folded_percent(FIELDS)),
    (LogJacobianStdMetric, {}, FIELDS, IMAGES, log_jacobian_std(FIELDS)),
    (
        SimilarityMetric,
        {"similarity": LocalNCC(2, window=5)},
        IMAGES.flip(2),
        IMAGES,
        local_ncc(IMAGES.flip(2), IMAGES, 5),
    ),
]


@pytest.mark.parametrize(("kind", "options", "first", "second", "expected"), METRICS)
def test_metric_is_the_mean_over_pairs_of_all_batches(
    kind: type[CumulativeIterationMetric], options: dict[str, Any], first: Tensor, second: Tensor, expected: Tensor
) -> None:
    metric = kind(**options)
    metric(first[:2], second[:2])
    metric(first[2:], second[2:])
    torch.testing.assert_close(metric.get_buffer(), expected[:, None])
    assert metric.aggregate().item() == pytest.approx(expected.mean().item())


@pytest.mark.parametrize(("kind", "options", "first", "second", "expected"), METRICS)
def test_metric_works_in_an_evaluator(
    kind: type[CumulativeIterationMetric], options: dict[str, Any], first: Tensor, second: Tensor, expected: Tensor
) -> None:
    batches = [[{"pred": a, "fixed": b} for a, b in zip(first[i], second[i], strict=True)] for i in ([0, 1], [2])]
    evaluator = Engine(lambda engine, batch: batch)
    handler = IgniteMetricHandler(metric_fn=kind(**options), output_transform=from_engine(["pred", "fixed"]))
    handler.attach(evaluator, "figure")
    for _ in range(2):  # the second run starts afresh
        evaluator.run(batches)
        assert evaluator.state.metrics["figure"] == pytest.approx(expected.mean().item())
        torch.testing.assert_close(evaluator.state.metric_details["figure"], expected[:, None])


def test_target_registration_error_works_in_an_evaluator() -> None:
    evaluator = Engine(lambda engine, batch: batch)
    metric = TargetRegistrationErrorMetric((1.0, 2.0))
    handler = IgniteMetricHandler(metric_fn=metric, output_transform=from_engine(["pred", "landmarks"]))
    handler.attach(evaluator, "error")
    fields = torch.zeros_like(FIELDS)
    evaluator.run([[{"pred": a, "landmarks": b} for a, b in zip(fields, LANDMARKS, strict=True)]])
    distance = (LANDMARKS[:, :, 0] - LANDMARKS[:, :, 1]) * torch.tensor([1.0, 2.0])
    assert evaluator.state.metrics["error"] == pytest.approx(distance.norm(dim=-1).mean().item())
