"""What a checkpoint holds: weights of the policy, of its critics and of what it sees by, and what goes with them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_rl_reg.errors import InputError


def load_checkpoint(path: str) -> dict[str, Any]:
    """Return what a checkpoint holds, on the CPU.

    Raises:
        InputError: if the file is missing or is no checkpoint.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: expected a file, found none (train one, or name one with ckpt)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"checkpoint {path}: expected a checkpoint of torch.save, found a file that cannot be loaded as one"
        ) from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"checkpoint {path}: expected the weights of a network, found {type(checkpoint).__name__}")
    return checkpoint


def part(checkpoint: dict[str, Any], name: str) -> Any:
    """Return the weights of this name in a checkpoint; one without names is a file of these weights alone."""
    return checkpoint.get(name, checkpoint)


def fill_weights(network: torch.nn.Module, weights: Any, path: str) -> None:
    """Give a network the weights of this file.

    Raises:
        InputError: if they are of another architecture.
    """
    expected = network.state_dict()
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"checkpoint {path}: expected the weights of a network, found {type(weights).__name__}")
    differing = [k for k in expected if k not in weights or weights[k].shape != expected[k].shape]
    differing += [k for k in weights if k not in expected]
    if differing:
        key = differing[0]
        shapes = [tuple(s[key].shape) if key in s else "none" for s in (expected, weights)]
        raise InputError(
            f"checkpoint {path}: expected the weights of this configuration's network, found another architecture "
            f"({len(differing)} of {len(expected)} entries differ, the first is {key}: "
            f"{shapes[0]} expected, {shapes[1]} found)"
        )
    network.load_state_dict(weights)


def load_policy(network: torch.nn.Module, path: str, *, anatomy: torch.nn.Module | None = None) -> torch.nn.Module:
    """Load the policy's weights from a checkpoint of a training or from a file of weights alone.

    Args:
        network: gets the weights.
        path: of the checkpoint.
        anatomy: gets the weights of the network that sees the labelled structures.

    Raises:
        InputError: if the file is missing, is no checkpoint, or is one of another architecture.
    """
    checkpoint = load_checkpoint(path)
    fill_weights(network, part(checkpoint, "network"), path)
    if anatomy is not None:
        fill_weights(anatomy, checkpoint.get("anatomy", {}), path)
    return network


def load_control(network: torch.nn.Module, path: str | None) -> torch.nn.Module | None:
    """Return a second network of the same architecture with the control's weights, or None without a checkpoint.

    Raises:
        InputError: as :func:`load_policy` does.
    """
    return None if path is None else load_policy(copy.deepcopy(network), path)


def load_anatomy(anatomy: torch.nn.Module, path: str | None) -> torch.nn.Module:
    """Load the network that sees the labelled structures, from a checkpoint or a file of its weights alone, and keep
    it as it is in training.

    Without a path it is left alone, to learn beside the policy.

    Raises:
        InputError: as :func:`load_policy` does.
    """
    if path is not None:
        fill_weights(anatomy, part(load_checkpoint(path), "anatomy"), path)
        anatomy.requires_grad_(False)
    return anatomy


def load_critic(critic: torch.nn.Module, path: str) -> Any:
    """Return the critic with the weights that a checkpoint has of it, or None where it was trained without.

    Args:
        critic: gets the weights.
        path: of the checkpoint.

    Raises:
        InputError: as :func:`load_policy` does.
    """
    weights = load_checkpoint(path).get("critic")
    if weights is None:
        return None
    fill_weights(critic, weights, path)
    return critic.eval()


class Kept:
    """Plain values by name, as something that a checkpoint can hold: what a registration must do as its training did.

    :func:`setting_in` finds the values that are kept as ``settings``, :func:`voxel_size_in` the ``millimetres`` kept as
    ``voxel_size``.
    """

    def __init__(self, **values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        """Return the values."""
        return self.values


def structures_in(path: str) -> int:
    """Return how many labelled structures a checkpoint's policy was trained to see; 0 if it was trained without.

    Raises:
        InputError: if the file is missing or is no checkpoint.
    """
    return _facts(path).structures


def guided_in(path: str) -> bool:
    """Return whether a registration checkpoint's policy observes the pull of the similarity: it then takes more
    channels than images and structures have.

    Raises:
        InputError: if the file is missing or is no checkpoint.
    """
    return _facts(path).guided


def voxel_size_in(path: str) -> list[float] | None:
    """Return the voxel size in mm that a checkpoint's policy was trained at, or None where it does not say.

    Raises:
        InputError: if the file is missing or is no checkpoint.
    """
    return _facts(path).voxel_size


def setting_in(path: str, name: str, otherwise: Any = None) -> Any:
    """Return what a setting of the training was, if there is a checkpoint that says so; else ``otherwise``.

    Raises:
        InputError: if the file is no checkpoint.
    """
    if not Path(path).is_file():  # a configuration is looked at without weights, too
        return otherwise
    return _facts(path).settings.get(name, otherwise)


def full_name(instance: object) -> str:
    """Return the name of an instance's class, as a configuration's ``_target_`` has it."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


@dataclass(frozen=True)
class _Facts:
    """What a checkpoint says beside its weights."""

    structures: int
    guided: bool
    voxel_size: list[float] | None
    settings: dict[str, Any]


def _facts(path: str) -> _Facts:
    status = Path(path).stat() if Path(path).is_file() else None
    return _read_facts(path, None if status is None else (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=8)  # a configuration asks for a dozen, one by one; the weights are not kept
def _read_facts(path: str, version: tuple[int, int] | None) -> _Facts:
    checkpoint = load_checkpoint(path)
    anatomy, weights = checkpoint.get("anatomy"), part(checkpoint, "network")
    structures = int(anatomy["structures"]) if isinstance(anatomy, dict) and "structures" in anatomy else 0
    first = weights.get("planner.levels.0.0.conv.weight") if isinstance(weights, dict) else None
    guided = isinstance(first, Tensor) and first.shape[1] > 2 + 2 * structures
    voxel_size = checkpoint.get("voxel_size", {}).get("millimetres")
    return _Facts(structures, guided, voxel_size, checkpoint.get("settings", {}))
