"""The pair on the working grid: at the voxel size that the policy knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SMALL, run_bundle
from monai.data import MetaTensor

from monai_rl_reg.checkpoints import load_checkpoint, setting_in, voxel_size_in
from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import DenseTransform
from monai_rl_reg.nifti import read_image
from monai_rl_reg.policy_bundle import PolicyBundle
from monai_rl_reg.tasks.registration import RegistrationTask
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


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_thick_slices_are_compared_with_those_of_the_training_however_they_are_stored(order: tuple[int, ...]) -> None:
    bundle = PolicyBundle(device="cpu")
    bundle.voxel_size = [0.5, 0.6, 3.0]  # along right, anterior and superior
    size, shape = torch.tensor([0.5, 0.6, 3.0, 1.0], dtype=torch.float64), (30, 28, 9)
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[3, 3] = 1.0
    for axis, world in enumerate(order):
        affine[world, axis] = size[world]
    image = MetaTensor(torch.rand(1, *[shape[world] for world in order]), affine=affine)
    assert GivenPair(bundle, image, image).onto_fixed(HERE).image.shape[1:] == shape  # as it is
    affine[2, order.index(2)] = 1.0  # thin ones are not
    thin = MetaTensor(image.as_tensor(), affine=affine)
    assert GivenPair(bundle, thin, thin).onto_fixed(HERE).image.shape[3] == 4  # of 9, three times as thick


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


def test_a_training_keeps_its_settings_and_what_uses_its_weights_goes_by_them(
    cohort: Path, images: list[MetaTensor], tmp_path: Path
) -> None:
    how = SMALL | {"epoch_length": 1, "output_dir": tmp_path, "intensity_range": "[100,300]"}
    how |= {"similarity::_target_": "monai_rl_reg.similarity.MIND", "smoothness_weight": 0.3}
    how |= {"field_stride": 1, "network_def::action_bound": 1.5, "network_def::plan_channels": 24}
    done = run_bundle("training", "train", dataset_dir=cohort, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    ckpt = str(tmp_path / "model.pt")
    assert setting_in(ckpt, "intensity_range") == [100, 300]
    assert "Training on 4 cases, 4 of them with labels; validating on 2 pairs" in done.stdout
    bundle = PolicyBundle(ckpt=ckpt, device="cpu")
    assert isinstance(bundle.task, RegistrationTask)
    assert (bundle.similarity.name, bundle.task.field_stride) == ("mind", 1)
    assert bundle.network.actor.action_bound == 1.5
    assert bundle.refinement_task.smoothness_weight == 0.3
    evaluated = run_bundle("evaluating", "train", "evaluate", dataset_dir=cohort, ckpt=ckpt, output_dir=tmp_path / "e")
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    working = GivenPair(bundle, *images).onto_fixed(HERE)
    torch.testing.assert_close(working.image[:1].as_tensor(), ((images[0] - 100) / 200).clamp(0, 1).as_tensor())


def by_brightness(network: object, image: torch.Tensor) -> torch.Tensor:
    """See two structures: what is bright, and what is half as bright."""
    bright, half = image > 2 / 3, (image > 1 / 3) & (image <= 2 / 3)
    return torch.cat([~(bright | half), bright, half]).float()


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> PolicyBundle:
    bundle = PolicyBundle(device="cpu")
    monkeypatch.setattr(bundle, "see", by_brightness)
    return bundle


@pytest.fixture
def label(images: list[MetaTensor], bundle: PolicyBundle) -> MetaTensor:
    """The moving image's structures, as somebody else numbers them."""
    case: dict[str, MetaTensor] = bundle.case_transform({"image": images[1]})
    seen = by_brightness(None, case["image"].as_tensor()).argmax(0, keepdim=True)
    return MetaTensor(torch.tensor([0, 9, 5])[seen], affine=case["image"].affine)


def test_structures_that_the_moving_label_has_take_the_place_of_what_is_seen(
    images: list[MetaTensor], bundle: PolicyBundle, label: MetaTensor
) -> None:
    rough = label.clone()
    rough.as_tensor()[:, ::2, ::3, ::3] = 0
    known = GivenPair(bundle, *images, moving_label=rough, by_label=True).onto_fixed(HERE)
    seen = GivenPair(bundle, *images).onto_fixed(HERE)
    assert known.recognised == {1: 9, 2: 5}
    assert known.structures is not None
    assert seen.structures is not None
    torch.testing.assert_close(known.structures[0], seen.structures[0])  # in the fixed image as before
    assert known.structures[1].sum() < seen.structures[1].sum()
    given = GivenPair(bundle, images[1], images[1], moving_label=rough, by_label=True)
    same = given.onto_fixed(HERE)
    assert same.structures is not None
    expected = torch.cat([given.cases["moving"]["label"].as_tensor() == value for value in (9, 5)])
    torch.testing.assert_close(same.structures[1], expected.float())
    assert same.label is None  # it takes both to compare them


def test_a_label_of_something_else_is_not_gone_by(
    images: list[MetaTensor], bundle: PolicyBundle, label: MetaTensor
) -> None:
    seen = GivenPair(bundle, *images).onto_fixed(HERE)
    found = GivenPair(bundle, *images, moving_label=label.roll(8, -1), by_label=True).onto_fixed(HERE)
    assert found.recognised == {}
    torch.testing.assert_close(found.structures, seen.structures)


def test_large_images_with_coarse_voxels_are_resampled_as_far_as_there_is_room(
    images: list[MetaTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = PolicyBundle(device="cpu")
    bundle.voxel_size = (spacing(images[0]) * torch.tensor([1.0, 1.0, 0.5])).tolist()  # the slices are thick
    whole = GivenPair(bundle, *images).onto_fixed(HERE)
    monkeypatch.setattr("monai_rl_reg.working.MOST_VOXELS", int(0.8 * whole.image[0].numel()))
    working = GivenPair(bundle, *images).onto_fixed(HERE)
    assert working.coarsened
    sizes = spacing(working.image)
    assert working.image[0].numel() < 0.9 * whole.image[0].numel()
    assert sizes[2] < 0.9 * spacing(images[0])[2], "the slices too are brought nearer to the training's size"


def test_an_image_of_a_few_voxels_at_the_training_s_size_is_named(images: list[MetaTensor]) -> None:
    bundle = PolicyBundle(device="cpu")
    bundle.voxel_size = (15 * spacing(images[0])).tolist()
    with pytest.raises(InputError, match=r"fixed image .*: expected at least 4 voxels .*, found \d x \d x \d of"):
        GivenPair(bundle, *images)


def test_the_networks_look_wherever_an_initial_field_leads(bundle: PolicyBundle) -> None:
    fixed = MetaTensor(torch.rand(1, 24, 24, 24), affine=torch.eye(4))
    moving = MetaTensor(torch.rand(1, 24, 24, 90), affine=torch.eye(4))
    field = torch.zeros(3, 24, 24, 24)
    field[2, 6:18, 6:18, 6:18] = 50.0  # at the corners nothing
    pair = GivenPair(bundle, fixed, moving)
    assert pair._box(DenseTransform(field, torch.eye(4)))[2].stop > 17 + 50
    assert pair._box(HERE)[2] == slice(0, 32)
