"""The initial affine: found where images lie apart, left out where they do not, the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA
from monai.data import MetaTensor
from torch import Tensor

from monai_rl_reg.affine import align
from monai_rl_reg.geometry import carry, identity_grid, reduced, sample, transform_points
from monai_rl_reg.initial import initial_transform
from monai_rl_reg.metrics import mean_label_dice
from monai_rl_reg.nifti import read_volume
from monai_rl_reg.phantoms import make_case
from monai_rl_reg.policy_bundle import PolicyBundle
from monai_rl_reg.working import GivenPair

BRAINS = DATA / "brain_oasis35"


def posed(affine: Tensor, shape: tuple[int, ...], degrees: float, millimetres: float, seed: int) -> Tensor:
    """A rigid motion (4, 4) about the centre of a grid: so many degrees about some axis, so far in some direction."""
    random = torch.Generator().manual_seed(seed)
    axis, way = (torch.nn.functional.normalize(torch.randn(3, generator=random).double(), dim=0) for _ in range(2))
    cross = torch.tensor([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]]).double()
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, :3] = torch.linalg.matrix_exp(cross * np.radians(degrees))
    centre = (affine.double() @ torch.tensor([*((n - 1) / 2 for n in shape), 1.0]).double())[:3]
    motion[:3, 3] = centre - motion[:3, :3] @ centre + millimetres * way
    return motion


def distance(found: Tensor, true: Tensor, image: MetaTensor) -> float:
    """The mean distance in millimetres between where two transforms carry the image's bright voxels."""
    where = image.as_tensor()[0] > image.as_tensor().mean()
    world = transform_points(image.affine.double(), identity_grid(image.shape[1:]))[:, where]
    return float((carry(found, world) - carry(true, world)).norm(dim=0).mean())


@pytest.fixture(scope="module")
def phantom() -> MetaTensor:
    image, _, affine = make_case(torch.Generator().manual_seed(3), size=40)
    image = torch.nn.functional.pad(image, [8] * 6, value=float(image.min()))
    return MetaTensor(image, affine=affine)


@pytest.mark.parametrize("one_modality", [True, False])
def test_a_known_motion_is_found(phantom: MetaTensor, one_modality: bool) -> None:
    motion = posed(phantom.affine, phantom.shape[1:], 20, 25, seed=1)
    moving = MetaTensor(phantom.as_tensor(), affine=motion @ phantom.affine.double())
    found = align(phantom, moving, one_modality=one_modality)
    assert found.kind in ("rigid", "affine")
    assert found.correlation_before < 0.5 < 0.98 < found.correlation_after
    assert distance(found.transform, motion, phantom) < 1.0  # of voxels of about 1 mm


def test_a_known_stretch_is_found(phantom: MetaTensor) -> None:
    stretch = torch.diag(torch.tensor([1.15, 0.9, 1.1, 1.0])).double()
    motion = posed(phantom.affine, phantom.shape[1:], 10, 10, seed=2) @ stretch
    found = align(phantom, MetaTensor(phantom.as_tensor(), affine=motion @ phantom.affine.double()))
    assert found.kind == "affine"
    assert distance(found.transform, motion, phantom) < 1.0


def test_images_that_do_not_overlap_meet(phantom: MetaTensor) -> None:
    motion = posed(phantom.affine, phantom.shape[1:], 5, 500, seed=3)
    found = align(phantom, MetaTensor(phantom.as_tensor(), affine=motion @ phantom.affine.double()))
    assert found.correlation_before == 0
    assert distance(found.transform, motion, phantom) < 1.0


def test_an_aligned_pair_is_left_as_it_lies(phantom: MetaTensor) -> None:
    noisy = phantom.as_tensor() + 0.05 * phantom.as_tensor().std() * torch.randn(phantom.shape)
    found = align(phantom, MetaTensor(noisy, affine=phantom.affine))
    assert found.kind == "identity"
    assert torch.equal(found.transform, torch.eye(4, dtype=torch.float64))


def test_the_result_is_the_same_every_time(phantom: MetaTensor) -> None:
    motion = posed(phantom.affine, phantom.shape[1:], 15, 10, seed=4)
    moving = MetaTensor(phantom.as_tensor(), affine=motion @ phantom.affine.double())
    assert torch.equal(align(phantom, moving).transform, align(phantom, moving).transform)


def test_two_dimensions() -> None:
    image, _, affine = make_case(torch.Generator().manual_seed(3), size=64, spatial_dims=2)
    image = torch.nn.functional.pad(image, [16] * 4, value=float(image.min()))
    motion = torch.eye(4, dtype=torch.float64)
    c, s = np.cos(0.3), np.sin(0.3)
    motion[:2, :2], motion[:2, 3] = torch.tensor([[c, -s], [s, c]]), torch.tensor([12.0, -5.0])
    found = align(MetaTensor(image, affine=affine), MetaTensor(image, affine=motion @ affine.double()))
    at = transform_points(reduced(affine.double(), 2), identity_grid(image.shape[1:]))
    assert (carry(found.transform, at) - carry(motion, at)).norm(dim=0).mean() < 1.0


def test_thin_slabs_do_not_fail(phantom: MetaTensor) -> None:
    thin = MetaTensor(phantom.as_tensor()[..., 20:23], affine=phantom.affine)
    assert torch.isfinite(align(thin, phantom).transform).all()


def test_a_known_motion_is_found_between_two_modalities(phantom: MetaTensor) -> None:
    image = phantom.as_tensor()
    low, high = image.quantile(0.01), image.quantile(0.99)
    scaled = ((image - low) / (high - low)).clamp(0, 1)
    other = (2 * scaled - 0.9).abs()  # dark and bright change places with the middle: no function of the correlation
    motion = posed(phantom.affine, phantom.shape[1:], 15, 12, seed=1)
    moving = MetaTensor(other, affine=motion @ phantom.affine.double())
    found = align(phantom, moving, one_modality=False)
    assert distance(found.transform, motion, phantom) < 1.0
    assert distance(align(phantom, moving).transform, motion, phantom) > 3.0


@pytest.mark.skipif(not BRAINS.is_dir(), reason=f"needs the brains in {BRAINS}")
@pytest.mark.parametrize(("fixed", "moving", "seed"), [(1000, 1001, 0), (1036, 1015, 1), (1019, 1018, 5)])
def test_brains_moved_apart_come_together_as_well_as_in_place(fixed: int, moving: int, seed: int) -> None:
    def read(what: str, case: int) -> MetaTensor:
        return read_volume(Path(BRAINS, f"{what}Tr_2mm_native", f"{case}.nii.gz"))

    f, m, f_label, m_label = (
        read("images", fixed),
        read("images", moving),
        read("labels", fixed),
        read("labels", moving),
    )
    motion = posed(m.affine, m.shape[1:], 25, 40, seed)

    def dice(transform: Tensor, label: MetaTensor) -> float:
        world = transform_points(f.affine.double(), identity_grid(f.shape[1:]))
        at = transform_points(torch.linalg.inv(label.affine.double()), carry(transform, world)).float()
        moved = sample(label.as_tensor(), at, mode="nearest", outside="zeros")
        return float(mean_label_dice(moved[None], f_label.as_tensor()[None]))

    in_place = dice(align(f, m).transform, m_label)
    m, m_label = (MetaTensor(x.as_tensor(), affine=motion @ x.affine.double()) for x in (m, m_label))
    apart = dice(torch.eye(4, dtype=torch.float64), m_label)
    assert apart < 0.05
    found = align(f, m).transform
    assert dice(found, m_label) > max(0.35, in_place - 0.01)
    chosen, figures = initial_transform(GivenPair(PolicyBundle(device="cpu"), f, m), "auto")
    assert torch.equal(chosen, found), figures  # a policy that knows no brains gives nothing up


@pytest.mark.parametrize("size", [1.0, 0.02])
def test_a_motion_is_found_whatever_the_voxel_size(phantom: MetaTensor, size: float) -> None:
    scaling = torch.diag(torch.tensor([size, size, size, 1.0], dtype=torch.float64))
    small = MetaTensor(phantom.as_tensor(), affine=scaling @ phantom.affine.double())
    angle = torch.eye(4, dtype=torch.float64)
    angle[:2, :2] = torch.tensor([[0.92, -0.392], [0.392, 0.92]], dtype=torch.float64)
    centre = small.affine.double() @ torch.tensor([*((n - 1) / 2 for n in phantom.shape[1:]), 1], dtype=torch.float64)
    angle[:3, 3] = centre[:3] - angle[:3, :3] @ centre[:3]
    moved = MetaTensor(phantom.as_tensor(), affine=angle @ small.affine.double())
    assert align(small, moved).correlation_after > 0.95


def test_a_black_image_does_not_fail(phantom: MetaTensor) -> None:
    dark = torch.ones_like(phantom.as_tensor())
    dark[0, 0, 0, 0] = 0
    align(phantom, MetaTensor(dark, affine=phantom.affine))
