"""The pair on the working grid: at the voxel size that the policy knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor

from monai_rl_reg.checkpoints import load_checkpoint, voxel_size_in
from monai_rl_reg.nifti import read_image
from monai_rl_reg.policy_bundle import PolicyBundle
from monai_rl_reg.working import ANOTHER_SIZE, GivenPair

HERE = torch.eye(4, dtype=torch.float64)


@pytest.fixture
def images(cohort: Path) -> list[MetaTensor]:
    return [read_image(str(cohort / "imagesTr" / f"phantom_{i:03d}.nii.gz")) for i in (0, 1)]


def spacing(image: MetaTensor) -> torch.Tensor:
    return image.affine[:3, :3].norm(dim=0)


@pytest.mark.parametrize(("factor", "resampled"), [(0.5, True), (2.0, True), (0.97 * ANOTHER_SIZE, False)])
def test_images_of_another_voxel_size_than_the_training_s_are_resampled_to_it(
    images: list[MetaTensor], factor: float, resampled: bool
) -> None:
    bundle = PolicyBundle(device="cpu")
    own = spacing(images[0])
    bundle.voxel_size = (factor * own).tolist()
    working = GivenPair(bundle, *images).onto_fixed(HERE)
    expected = factor * own if resampled else own
    torch.testing.assert_close(spacing(working.image), expected, rtol=0.03, atol=0)
    assert working.structures is not None
    assert working.structures.shape[2:] == working.image.shape[1:]


def test_a_voxel_size_that_the_configuration_asks_for_comes_first(images: list[MetaTensor]) -> None:
    bundle = PolicyBundle(device="cpu")
    bundle.voxel_size = (2 * spacing(images[0])).tolist()
    bundle.pixdim = spacing(images[0]).tolist()  # type: ignore[assignment]
    working = GivenPair(bundle, *images).onto_fixed(HERE)
    torch.testing.assert_close(spacing(working.image), spacing(images[0]))


def test_a_training_keeps_its_voxel_size_in_the_checkpoint(trained: Path) -> None:
    found = voxel_size_in(str(trained / "model.pt"))
    assert found is not None
    assert all(0.5 < size < 2.5 for size in found)
    checkpoint = load_checkpoint(str(trained / "model.pt"))
    assert checkpoint["voxel_size"] == {"millimetres": found}
