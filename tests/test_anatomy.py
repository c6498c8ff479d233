"""The network that sees the labelled structures: by itself, as a part of the registration task, in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from monai.bundle import ConfigParser
from torch import Tensor

from monai_rl_reg.anatomy import Anatomy, fixed_images, single_images
from monai_rl_reg.checkpoints import load_anatomy, load_policy, structures_in
from monai_rl_reg.errors import InputError
from monai_rl_reg.metrics import UNLABELLED
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.tasks.registration import RegistrationTask

CHANNELS = (4, 8, 8)  # a stride of 4
SIZES = [(8, 12), (9, 7), (5, 4), (33, 17), (8, 4, 8), (9, 7, 5), (17, 5, 6)]


def make_anatomy(spatial_dims: int = 2, structures: int = 2) -> Anatomy:
    return Anatomy(spatial_dims, structures, channels=CHANNELS).eval()


def discs(size: Sequence[int], *, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Images of two bright structures on a dark ground, somewhere in the image, and their labels."""
    label = torch.zeros(batch, 1, *size, dtype=torch.int32)
    for item in label:
        for value, shift in ((1, 0), (2, size[0] // 2)):
            i, j = torch.randint(1, size[0] // 2 - 4, (2,)).tolist()
            item[:, i + shift : i + shift + 4, j : j + 5] = value
    return label / 2 * 0.8 + 0.1 * torch.rand(label.shape), label


@pytest.mark.parametrize("structures", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_is_seen_at_its_own_resolution(size: tuple[int, ...], structures: int) -> None:
    anatomy = make_anatomy(len(size), structures)
    image = torch.rand(2, 1, *size)
    assert anatomy(image).shape == (2, 1 + structures, *size)
    assert anatomy.see(image).shape == (2, structures, *size)


@pytest.mark.parametrize("size", [(5, 4), (16, 17), (5, 4, 6)])
def test_the_default_widths_train_on_the_smallest_images(size: tuple[int, ...]) -> None:
    anatomy = Anatomy(len(size), 2).train()
    loss = anatomy.loss(torch.rand(1, 1, *size), torch.randint(0, 3, (1, 1, *size), dtype=torch.int32))
    loss.backward()
    assert loss.isfinite()


def test_the_number_of_threads_changes_nothing() -> None:
    threads = torch.get_num_threads()
    anatomy = make_anatomy(3)
    image = torch.rand(1, 1, 33, 17, 29)  # odd: here torch's softmax over channels would depend on them
    seen = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        seen.append(anatomy.see(image))
    torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("size", [(9, 7), (9, 7, 5)])
def test_what_is_seen_and_the_background_are_probabilities(size: tuple[int, ...]) -> None:
    anatomy = make_anatomy(len(size), 3)
    image = torch.rand(2, 1, *size)
    seen = anatomy.see(image)
    background = anatomy(image)[:, :1]
    assert seen.min() >= 0
    assert seen.max() <= 1
    torch.testing.assert_close(seen.sum(1, keepdim=True) + background, torch.ones_like(background))


@pytest.mark.parametrize(("size", "padded"), [((9, 7), (12, 8)), ((9, 7, 5), (12, 8, 8)), ((13, 3), (16, 8))])
def test_odd_sizes_are_filled_up_by_repeating_the_edge(size: tuple[int, ...], padded: tuple[int, ...]) -> None:
    anatomy = make_anatomy(len(size))
    image = torch.rand(1, 1, *size)
    pads = [pad for old, new in zip(size[::-1], padded[::-1], strict=True) for pad in (0, new - old)]
    seen = anatomy(torch.nn.functional.pad(image, pads, mode="replicate"))
    torch.testing.assert_close(anatomy(image), seen[(..., *(slice(n) for n in size))])


def test_a_few_updates_teach_it_what_the_labels_say() -> None:
    anatomy = make_anatomy()
    optimizer = torch.optim.Adam(anatomy.parameters(), lr=2e-2)
    image, label = discs((24, 23))
    losses = []
    for _ in range(40):
        loss = anatomy.loss(image, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    image, label = discs((24, 23))
    seen = torch.cat([1 - anatomy.see(image).sum(1, keepdim=True), anatomy.see(image)], dim=1).argmax(1, keepdim=True)
    assert (seen == label).float().mean() > 0.95


def task_and_state(size: Sequence[int] = (16, 15)) -> tuple[RegistrationTask, dict[str, Tensor]]:
    task = RegistrationTask(len(size), field_stride=2, anatomy=make_anatomy(len(size)))
    return task, task.reset(torch.rand(2, 2, *size), torch.randint(0, 3, (2, 2, *size)))


def test_the_tasks_own_loss_moves_all_of_it() -> None:
    task, state = task_and_state()
    task.own_loss(state)["anatomy"].backward()
    gradients = [parameter.grad for parameter in task.parameters()]
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients if gradient is not None) > 0


@pytest.mark.parametrize(("amp", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_its_training_is_in_half_precision_where_asked_on_a_cpu_too(amp: bool, dtype: torch.dtype) -> None:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in ("train", "with_labels", "anatomy")])
    parser.update({"anatomy": make_anatomy(), "device": torch.device("cpu"), "amp": amp})
    anatomy = parser.get_parsed_content("anatomy", instantiate=True)
    found = []
    anatomy.unet.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    loss = parser.get_parsed_content("loss_function")(*discs((24, 23)))
    loss.backward()
    assert found == [dtype]
    assert loss.dtype == torch.float32


def test_images_without_labels_teach_nothing() -> None:
    anatomy = make_anatomy().train()
    image, label = discs((24, 23), batch=4)
    label[1] = UNLABELLED
    torch.testing.assert_close(anatomy.loss(image, label), anatomy.loss(image[[0, 2, 3]], label[[0, 2, 3]]))
    nothing = anatomy.loss(image, torch.full_like(label, UNLABELLED))
    nothing.backward()
    assert nothing == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in anatomy.parameters())


def test_an_anatomy_from_a_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    path, trained = str(tmp_path / "model.pt"), make_anatomy()
    torch.save({"anatomy": trained.state_dict()}, path)
    anatomy = make_anatomy()
    image = torch.rand(1, 1, 9, 7)
    assert load_anatomy(anatomy, None) is anatomy
    assert not torch.equal(anatomy.see(image), trained.see(image))
    load_anatomy(anatomy, path)
    assert torch.equal(anatomy.see(image), trained.see(image))
    task = RegistrationTask(2, anatomy=anatomy)
    assert task.own_loss(task.reset(torch.rand(1, 2, 9, 7))) == {}
    with pytest.raises(InputError, match="another architecture"):
        load_anatomy(make_anatomy(structures=3), path)


def test_single_images_of_a_batch_of_pairs() -> None:
    image, label = torch.rand(3, 2, 9, 7), torch.randint(0, 3, (3, 2, 9, 7))
    images, labels = single_images({"image": image, "label": label}, torch.device("cpu"))
    assert images.shape == labels.shape == (6, 1, 9, 7)
    assert torch.equal(images[:3, 0], image[:, 0])
    assert torch.equal(labels[3:, 0], label[:, 1])
    images, labels = fixed_images({"image": image, "label": label}, torch.device("cpu"))
    assert torch.equal(images, image[:, :1])
    assert torch.equal(labels, label[:, :1])


def test_a_label_value_it_does_not_know_is_named() -> None:
    anatomy = make_anatomy(structures=2)
    with pytest.raises(InputError, match=r"anatomy: expected the label values 1 to 2, .* found 3"):
        anatomy.loss(torch.rand(1, 1, 16, 16), torch.full((1, 1, 16, 16), 3))


def test_no_other_term_moves_it() -> None:
    task, state = task_and_state()
    action = torch.rand(2, 2, 8, 8, requires_grad=True)
    terms = task.loss(state, action, lambda observation: observation)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in task.parameters())


def test_what_the_policy_makes_of_the_observation_does_not_move_it() -> None:
    task, state = task_and_state()
    action = torch.rand(2, 2, 8, 8, requires_grad=True)
    task.observe(task.advance(state, action)).square().sum().backward()
    assert action.grad is not None
    assert action.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in task.parameters())


def policy_and_anatomy(structures: int) -> tuple[PlannerActor, Anatomy]:
    policy = PlannerActor(2, 2 + 2 * structures, 2, channels=(4, 4), plan_channels=2, action_stride=2)
    return policy, make_anatomy(structures=structures)


def test_checkpoints_hold_the_anatomy_beside_the_policy(tmp_path: Path) -> None:
    path, (policy, anatomy) = str(tmp_path / "model.pt"), policy_and_anatomy(3)
    torch.save({"network": policy.state_dict(), "anatomy": anatomy.state_dict()}, path)
    assert structures_in(path) == 3
    again, seeing = policy_and_anatomy(3)
    image = torch.rand(1, 1, 9, 7)
    assert not torch.equal(seeing.see(image), anatomy.see(image))
    assert load_policy(again, path, anatomy=seeing) is again
    assert torch.equal(seeing.see(image), anatomy.see(image))
    observation = torch.rand(1, 8, 9, 7)
    assert torch.equal(again(observation), policy(observation))


@pytest.mark.parametrize("bare", [False, True])
def test_checkpoints_of_a_training_without_labels_hold_none(bare: bool, tmp_path: Path) -> None:
    path, (policy, _) = str(tmp_path / "model.pt"), policy_and_anatomy(0)
    torch.save(policy.state_dict() if bare else {"network": policy.state_dict()}, path)
    assert structures_in(path) == 0
    load_policy(policy_and_anatomy(0)[0], path)
    with pytest.raises(InputError, match="expected the weights of this configuration's network"):
        load_policy(policy_and_anatomy(0)[0], path, anatomy=make_anatomy())


def test_checkpoint_of_another_number_of_structures_is_refused(tmp_path: Path) -> None:
    path, (policy, anatomy) = str(tmp_path / "model.pt"), policy_and_anatomy(3)
    torch.save({"network": policy.state_dict(), "anatomy": anatomy.state_dict()}, path)
    with pytest.raises(InputError, match="found another architecture"):
        load_policy(*policy_and_anatomy(2)[:1], path)
    with pytest.raises(InputError, match="found another architecture"):
        load_policy(policy, path, anatomy=make_anatomy(structures=2))


def test_structures_of_a_file_that_is_no_checkpoint_are_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a file, found none"):
        structures_in(str(tmp_path / "model.pt"))
    (tmp_path / "model.pt").write_text("weights")
    with pytest.raises(InputError, match="cannot be loaded"):
        structures_in(str(tmp_path / "model.pt"))
