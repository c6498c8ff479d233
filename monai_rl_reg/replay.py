"""Replay buffer: a ring of preallocated tensors."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.memory import available_memory
from monai_rl_reg.rollout import Transition
from monai_rl_reg.tasks.task import State

logger = logging.getLogger(__name__)


class ReplayBuffer:
    """The last ``capacity`` transitions; what is sampled comes back in the dtype it went in with.

    Floating-point entries of more than ``small`` numbers are kept in half precision. An entry that a step hands back
    as the same object is stored once, not twice. The buffer is not part of a checkpoint: it refills within
    ``capacity`` transitions.

    Args:
        capacity: number of transitions.
        keys: entries of the state to store: the task's ``replay_keys``.
        device: where the ring lives.
    """

    small = 4096

    def __init__(self, capacity: int, keys: tuple[str, ...], *, device: str | torch.device = "cpu") -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.keys = keys
        self.device = torch.device(device)
        self._ring: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._next = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def extend(self, transition: Transition) -> None:
        """Store a batch of transitions, over the oldest ones where the ring is full.

        Raises:
            InputError: on the first call, if the ring does not fit into the memory that is free.
            ValueError: if an entry's shape is not that of the first call.
        """
        entries = self._entries(transition)
        if not self._ring:
            self._allocate(entries)
        if entries.keys() != self._ring.keys():
            raise ValueError(f"expected the entries {sorted(self._ring)}, got {sorted(entries)}")
        for key, value in entries.items():
            expected, got = tuple(self._ring[key].shape[1:]), tuple(value.shape[1:])
            if expected != got:
                raise ValueError(f"replay entry {key}: expected shape {expected}, got {got}")
        # of more than fit, the last ones: no row is written twice
        rows = (self._next + torch.arange(min(len(transition.reward), self.capacity))) % self.capacity
        for key, value in entries.items():
            self._ring[key][rows] = value[-len(rows) :].detach().to(self._ring[key])
        self._next = int((self._next + len(rows)) % self.capacity)
        self._size = min(self._size + len(rows), self.capacity)

    def sample(self, batch_size: int, *, device: str | torch.device = "cpu") -> Transition:
        """Draw a batch of transitions, with replacement, onto ``device``."""
        if self._size == 0:
            raise ValueError("the replay buffer is empty: extend it before sampling from it")
        rows = torch.randint(self._size, (batch_size,))
        device = torch.device(device)

        def fetch(key: str) -> Tensor:
            value = self._ring[key][rows]
            if device.type == "cuda" and value.device.type == "cpu":
                value = value.pin_memory()
            return value.to(device, self._dtypes[key], non_blocking=True)

        state = {key: fetch(f"state/{key}") for key in self.keys}
        next_state: State = {
            key: fetch(f"next/{key}") if f"next/{key}" in self._ring else state[key] for key in self.keys
        }
        return Transition(state, fetch("plan"), fetch("reward"), next_state, fetch("terminated"))

    def _entries(self, transition: Transition) -> dict[str, Tensor]:
        entries = {"plan": transition.plan, "reward": transition.reward, "terminated": transition.terminated}
        for key in self.keys:
            entries[f"state/{key}"] = transition.state[key]
            if transition.next_state[key] is not transition.state[key]:
                entries[f"next/{key}"] = transition.next_state[key]
        return entries

    def _allocate(self, entries: dict[str, Tensor]) -> None:
        def stored(value: Tensor) -> torch.dtype:
            return torch.float16 if value.is_floating_point() and value[0].numel() > self.small else value.dtype

        needed = sum(self.capacity * value[0].numel() * stored(value).itemsize for value in entries.values())
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else available_memory()
        if needed > free:
            shape = max((tuple(v.shape[2:]) for k, v in entries.items() if k.startswith("state/")), default=())
            raise InputError(
                f"the replay buffer of {self.capacity} transitions at image size {shape} needs {needed:,} bytes, "
                f"{free:,} are available on {self.device}: lower replay_capacity, or the resolution (a larger pixdim)"
            )
        self._dtypes = {key: value.dtype for key, value in entries.items()}
        self._ring = {
            key: torch.empty((self.capacity, *value.shape[1:]), dtype=stored(value), device=self.device)
            for key, value in entries.items()
        }
        logger.info("replay buffer: %d transitions, %.1f MiB on %s", self.capacity, needed / 2**20, self.device)
