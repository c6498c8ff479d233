from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from monai_rl_reg.finishing import Correspondence
from monai_rl_reg.fusion import disagreement, fuse, local_similarity
from monai_rl_reg.geometry import DenseTransform

AFFINE = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64))


def block(low: int, high: int, value: int = 1) -> MetaTensor:
    label = torch.zeros(1, 12, 12, 12)
    label[:, low:high, 3:9, 3:9] = value
    return MetaTensor(label, affine=AFFINE)


def still() -> MetaTensor:
    return MetaTensor(torch.zeros(3, 12, 12, 12), affine=AFFINE)


def test_one_atlas_keeps_its_label() -> None:
    label = block(2, 6, 3)
    fused = fuse([label], [still()], [torch.rand(1, 12, 12, 12) + 0.1])
    assert fused.dtype == torch.uint8
    assert torch.equal(fused.as_tensor(), label.as_tensor().to(torch.uint8))


def test_labels_follow_the_displacement() -> None:
    field = still()
    field[0] = 4.0  # millimetres: two voxels along the first axis
    fused = fuse([block(4, 8)], [field], [torch.ones(1, 12, 12, 12)])
    assert torch.equal(fused.as_tensor(), block(2, 6).as_tensor().to(torch.uint8))


@pytest.mark.parametrize("size", [(14, 12, 10), (16, 12)])
def test_votes_are_those_of_whole_volumes(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    d = len(size)
    affine = torch.eye(4, dtype=torch.float64)
    affine[:d, :d] = torch.tensor([[1.5, 0.2, 0.0], [-0.2, 1.1, 0.1], [0.0, 0.1, 0.9]])[:d, :d]
    labels = [MetaTensor(torch.randint(0, 4, (1, *size)).float(), affine=affine) for _ in range(3)]
    labels[0][:, 3:] = 0
    labels[1][labels[1] == 2] = 0
    fields = [MetaTensor(4 * torch.randn(d, *size), affine=AFFINE) for _ in range(3)]
    weights = [torch.rand(1, *size) + 0.1 for _ in range(3)]
    votes = torch.zeros(4, *size)
    for label, field, weight in zip(labels, fields, weights, strict=True):
        way = DenseTransform(field.as_tensor(), field.affine)
        for value in (1, 2, 3):
            region = MetaTensor((label.as_tensor() == value).float(), affine=affine)
            moved = Correspondence(torch.eye(4, dtype=torch.float64), way, way).move(region)
            votes[value] += weight[0] * moved.as_tensor()[0]
    votes[0] = sum(weight[0] for weight in weights) - votes[1:].sum(0)
    top = votes.topk(2, dim=0).values
    clear = top[0] - top[1] > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(fuse(labels, fields, weights).as_tensor()[0][clear], votes.argmax(0)[clear].to(torch.uint8))


def test_the_majority_wins_unless_the_weights_say_otherwise() -> None:
    labels, fields = [block(2, 6, 1), block(2, 6, 1), block(2, 6, 2)], [still()] * 3
    alike = [torch.ones(1, 12, 12, 12)] * 3
    assert torch.unique(fuse(labels, fields, alike)).tolist() == [0, 1]
    weights = [torch.ones(1, 12, 12, 12), torch.ones(1, 12, 12, 12), torch.ones(1, 12, 12, 12)]
    weights[2] = weights[2].clone()
    weights[2][..., 6:] = 3.0  # here the third atlas is the one that fits
    fused = fuse(labels, fields, weights).as_tensor()
    assert set(fused[..., 3:6].unique().tolist()) == {0, 1}
    assert set(fused[..., 6:9].unique().tolist()) == {0, 2}


def test_where_no_atlas_is_alike_or_unlike_they_vote_all_the_same() -> None:
    weights = [torch.ones(1, 12, 12, 12) for _ in range(3)]
    for weight in weights:
        weight[:, 3:5, 4:7, 4:7] = 0.0  # a flat part of the image
    fused = fuse([block(2, 6), block(2, 6), block(2, 5)], [still()] * 3, weights)
    assert torch.equal(fused.as_tensor(), block(2, 6).as_tensor().to(torch.uint8))


def test_similarity_is_local_and_ignores_scale() -> None:
    torch.manual_seed(0)
    fixed = torch.rand(1, 24, 24, 24)
    moved = 1000 + 50 * fixed
    moved[:, :, :, 14:] = 1000 + 50 * torch.rand(1, 24, 24, 10)
    found = local_similarity(moved, fixed)
    assert found.shape == fixed.shape
    assert found[:, 6:18, 6:18, 5:8].mean() > 0.95
    assert found[:, 6:18, 6:18, 19].mean() < 0.1


def test_disagreement() -> None:
    a, b, away = block(2, 6).as_tensor(), block(4, 8).as_tensor(), block(8, 11, 2).as_tensor()
    assert disagreement([a, a]) == 0
    assert disagreement([a, b]) == pytest.approx(0.5)
    assert disagreement([a, away]) == 1
    assert disagreement([a, a, b]) == pytest.approx(1 / 3)
    only, both = a, torch.maximum(a, away)
    assert disagreement([only, both]) == pytest.approx(0.5)
    assert disagreement([both, only]) == pytest.approx(0.5)
