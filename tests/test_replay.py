from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.replay import ReplayBuffer
from monai_rl_reg.rollout import Transition
from monai_rl_reg.tasks.task import State

KEYS = ("fixed", "moved")
LARGE = (1, 65, 64)  # more than ReplayBuffer.small numbers
SMALL = (1, 64, 64)
NOT_HALF = 1 + 2**-12  # a number that half precision rounds to 1


def make_transition(
    numbers: Sequence[float], *, shape: Sequence[int] = (1, 4, 4), dtype: torch.dtype = torch.float32
) -> Transition:
    """Transitions whose every entry tells their number; ``fixed`` is untouched by the step."""
    values = torch.tensor(numbers, dtype=torch.float64)

    def filled(offset: float) -> Tensor:
        return (values + offset).reshape(-1, *[1] * len(shape)).repeat(1, *shape).to(dtype)

    state: State = {"fixed": filled(0), "moved": filled(100)}
    plan = values.float()[:, None, None, None].repeat(1, 3, 1, 1)
    return Transition(state, plan, values.float(), state | {"moved": filled(200)}, values % 2 == 1)


def stored_numbers(buffer: ReplayBuffer) -> set[float]:
    return set(buffer.sample(500).reward.tolist())


def test_ring_overwrites_the_oldest() -> None:
    buffer = ReplayBuffer(4, KEYS)
    buffer.extend(make_transition([1, 2, 3]))
    assert len(buffer) == 3
    assert stored_numbers(buffer) == {1, 2, 3}
    buffer.extend(make_transition([4, 5, 6]))
    assert len(buffer) == 4
    assert stored_numbers(buffer) == {3, 4, 5, 6}
    buffer.extend(make_transition([7]))
    assert stored_numbers(buffer) == {4, 5, 6, 7}


def test_of_a_batch_above_the_capacity_the_last_ones_stay() -> None:
    buffer = ReplayBuffer(3, KEYS)
    buffer.extend(make_transition([0, 1, 2, 3, 4, 5, 6]))
    buffer.extend(make_transition([7]))
    assert stored_numbers(buffer) == {5, 6, 7}


def test_entries_of_a_transition_stay_together() -> None:
    buffer = ReplayBuffer(5, KEYS)
    for i in range(3):
        buffer.extend(make_transition([3 * i, 3 * i + 1, 3 * i + 2]))
    batch = buffer.sample(50)
    numbers = batch.reward
    assert numbers.unique().numel() > 1
    assert torch.equal(batch.plan[:, 0, 0, 0], numbers)
    assert torch.equal(batch.state["fixed"][:, 0, 0, 0], numbers)
    assert torch.equal(batch.state["moved"][:, 0, 0, 0], numbers + 100)
    assert torch.equal(batch.next_state["moved"][:, 0, 0, 0], numbers + 200)
    assert torch.equal(batch.terminated, numbers % 2 == 1)


def test_untouched_entry_is_stored_once() -> None:
    buffer = ReplayBuffer(4, KEYS)
    buffer.extend(make_transition([0, 1]))
    batch = buffer.sample(3)
    assert batch.next_state["fixed"] is batch.state["fixed"]
    assert batch.next_state["moved"] is not batch.state["moved"]


def test_only_the_named_keys_are_stored() -> None:
    buffer = ReplayBuffer(4, ("moved",))
    buffer.extend(make_transition([0, 1]))
    assert set(buffer.sample(1).state) == {"moved"}


@pytest.mark.parametrize(("shape", "kept"), [(LARGE, 1.0), (SMALL, NOT_HALF)])
def test_only_large_floating_point_entries_are_halved(shape: tuple[int, ...], kept: float) -> None:
    buffer = ReplayBuffer(2, KEYS)
    buffer.extend(make_transition([NOT_HALF], shape=shape))
    batch = buffer.sample(1)
    assert batch.state["fixed"].dtype == torch.float32
    assert batch.state["fixed"].unique().tolist() == [kept]
    assert batch.reward.tolist() == [NOT_HALF]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_large_integers_come_back_as_they_were(dtype: torch.dtype) -> None:
    number = min(30001, torch.iinfo(dtype).max - 200)
    buffer = ReplayBuffer(2, KEYS)
    buffer.extend(make_transition([number], shape=LARGE, dtype=dtype))
    batch = buffer.sample(1)
    assert batch.state["fixed"].dtype == dtype
    assert batch.state["fixed"].unique().tolist() == [number]


@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sample_has_the_dtype_that_went_in(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    buffer = ReplayBuffer(2, KEYS)
    buffer.extend(make_transition([1], shape=shape, dtype=dtype))
    assert buffer.sample(1).next_state["moved"].dtype == dtype
    assert buffer.sample(1).terminated.dtype == torch.bool


def test_no_graph_is_stored() -> None:
    transition = make_transition([0, 1])
    transition.state["moved"].requires_grad_()
    buffer = ReplayBuffer(2, KEYS)
    buffer.extend(transition)
    assert not buffer.sample(1).state["moved"].requires_grad


def test_later_changes_of_a_stored_tensor_do_not_reach_the_ring() -> None:
    transition = make_transition([1])
    buffer = ReplayBuffer(2, KEYS)
    buffer.extend(transition)
    transition.state["fixed"].zero_()
    assert buffer.sample(1).state["fixed"].unique().tolist() == [1]


# fixed once and moved twice; the plan's 3 numbers and the reward in 4 bytes, terminated in 1
NEEDED_SMALL = 10 * (3 * 64 * 64 * 4 + 3 * 4 + 4 + 1)
NEEDED_LARGE = 10 * (3 * 65 * 64 * 2 + 3 * 4 + 4 + 1)


@pytest.mark.parametrize(("shape", "needed"), [(SMALL, NEEDED_SMALL), (LARGE, NEEDED_LARGE)])
def test_refuses_to_outgrow_the_memory(shape: tuple[int, ...], needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(InputError, match=f"needs {needed:,} bytes, {needed - 1:,} are available on cpu"):
        ReplayBuffer(10, KEYS).extend(make_transition([0], shape=shape))


def test_takes_exactly_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=NEEDED_SMALL))
    buffer = ReplayBuffer(10, KEYS)
    buffer.extend(make_transition([0], shape=SMALL))
    assert len(buffer) == 1


def test_size_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    buffer = ReplayBuffer(10, KEYS)
    with caplog.at_level(logging.INFO, logger="monai_rl_reg.replay"):
        buffer.extend(make_transition([0], shape=SMALL))
        buffer.extend(make_transition([1], shape=SMALL))
    assert [record.getMessage() for record in caplog.records] == ["replay buffer: 10 transitions, 0.5 MiB on cpu"]


def test_refuses_another_shape() -> None:
    buffer = ReplayBuffer(4, KEYS)
    buffer.extend(make_transition([0], shape=(1, 4, 4)))
    with pytest.raises(ValueError, match=r"expected shape \(1, 4, 4\), got \(1, 5, 4\)"):
        buffer.extend(make_transition([1], shape=(1, 5, 4)))


def test_refused_transition_leaves_no_trace() -> None:
    buffer = ReplayBuffer(1, KEYS)
    buffer.extend(make_transition([0]))
    refused = make_transition([1])
    refused.next_state["moved"] = torch.zeros(1, 1, 5, 5)
    with pytest.raises(ValueError, match="next/moved"):
        buffer.extend(refused)
    assert buffer.sample(1).state["moved"].unique().tolist() == [100]
    assert stored_numbers(buffer) == {0}


def test_refuses_other_entries() -> None:
    buffer = ReplayBuffer(4, KEYS)
    buffer.extend(make_transition([0]))
    touched = make_transition([1])
    touched.next_state["fixed"] = touched.state["fixed"].clone()
    with pytest.raises(ValueError, match="next/fixed"):
        buffer.extend(touched)


def test_empty_buffer_cannot_be_sampled() -> None:
    with pytest.raises(ValueError, match="empty"):
        ReplayBuffer(4, KEYS).sample(1)


def test_capacity_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ReplayBuffer(0, KEYS)
