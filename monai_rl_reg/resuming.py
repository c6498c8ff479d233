"""A training that may be interrupted: its output folder, checkpoints that survive a kill, and going on from them."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.transforms import Randomizable
from monai.utils import get_seed

from monai_rl_reg.checkpoints import load_checkpoint, load_policy
from monai_rl_reg.errors import InputError
from monai_rl_reg.files import check_writable

NUMBERED = re.compile(r"checkpoint_epoch=(\d+)\.pt")
LEFTOVER = re.compile("tmp[a-z0-9_]{8}")
"""Names of the files that a killed save leaves, which Python's ``tempfile`` chose."""

_claimed: list[int] = []
"""Handles of the folders that this process holds locked, until it ends."""


class SafeCheckpointSaver(CheckpointSaver):
    """MONAI's CheckpointSaver with files that are written beside and moved into place.

    MONAI's own writes in place, so that a kill while saving leaves half a file, and removes the best model before it
    writes the better one. It can also be saved itself, so that a resumed training knows the best score so far.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for checkpoint in (self._final_checkpoint, self._key_metric_checkpoint, self._interval_checkpoint):
            if checkpoint is not None:
                saver: Any = checkpoint.save_handler
                saver._atomic = True
                if saver.filename is not None:
                    saver.remove = lambda filename: None

    def attach(self, engine: Engine) -> None:
        """Follow this engine, and save its counters as ``trainer`` where checkpoints are for resuming.

        So is, of a training in half precision, what it scales gradients by.
        """
        if self._interval_checkpoint is not None:
            self.save_dict["trainer"] = engine
            if (scaler := _scaler(engine)) is not None:
                self.save_dict["scaler"] = scaler
        super().attach(engine)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes: the best scores so far."""
        return dict(self._key_metric_checkpoint.state_dict()) if self._key_metric_checkpoint is not None else {}


class ResumeTraining(CheckpointLoader):
    """Go on from the newest checkpoint of a run, or start afresh, saying so, where it has none yet.

    Args:
        folder: the run's output folder.
        load_dict: what was saved, without the trainer, which is added here.
        map_location: as in :func:`torch.load`.
    """

    def __init__(self, folder: str, load_dict: dict[str, Any], map_location: Any = None) -> None:
        self.folder = folder
        super().__init__(latest_checkpoint(folder) or "", dict(load_dict), map_location=map_location)

    def attach(self, engine: Engine) -> None:
        """Follow this trainer."""
        if not self.load_path:
            print(f"No checkpoint in {self.folder} yet: starting from the beginning")
            return
        self.load_dict["trainer"] = engine
        scaler = _scaler(engine)
        if scaler is not None and "scaler" in load_checkpoint(self.load_path):  # it may have begun in full precision
            self.load_dict["scaler"] = scaler
        super().attach(engine)
        engine.add_event_handler(Events.STARTED, _reseed)
        print(f"Resuming from {self.load_path}")

    def __call__(self, engine: Engine) -> None:
        """Load it.

        Raises:
            InputError: if it is one of another configuration.
        """
        try:
            super().__call__(engine)
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"checkpoint {self.load_path}: expected one of a training with this configuration, found another "
                f"({' '.join(str(error).split())[:200]})"
            ) from error


def _scaler(engine: Engine) -> Any:
    scaler = getattr(engine, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _reseed(engine: Engine) -> None:
    """Let the random transforms of the data, which no checkpoint holds, draw other numbers than from the beginning."""
    dataset = engine.data_loader.dataset  # type: ignore[attr-defined]
    for transform in (getattr(dataset, name, None) for name in ("transform", "augment")):
        if isinstance(transform, Randomizable):
            transform.set_random_state((get_seed() or 0) + engine.state.iteration)


class StartFrom:
    """Begin a training with weights of another one.

    Args:
        path: of its checkpoint.
        network: gets the weights; so does ``anatomy``, if there is one, as :func:`load_policy` has it.
        anatomy: the network that sees the labelled structures.
    """

    def __init__(self, path: str, network: torch.nn.Module, anatomy: torch.nn.Module | None = None) -> None:
        self.path = path
        self.network = network
        self.anatomy = anatomy

    def attach(self, engine: Engine) -> None:
        """Follow this trainer; attach it before :class:`ResumeTraining`."""
        engine.add_event_handler(Events.STARTED, self._load)

    def _load(self, engine: Engine) -> None:
        load_policy(self.network, self.path, anatomy=self.anatomy)
        print(f"Starting from the weights in {self.path}")


class RandomState:
    """The random generators' states as something that a checkpoint can hold (and load with ``weights_only``)."""

    def state_dict(self) -> dict[str, Any]:
        """Return the states of Python's, numpy's and torch's generators."""
        version, python, gauss = random.getstate()
        numpy: Any = np.random.get_state()
        state = {
            "python": [version, list(python), gauss],
            "numpy": [str(numpy[0]), torch.from_numpy(np.asarray(numpy[1]).astype(np.int64)), *map(float, numpy[2:])],
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generators to these states."""
        version, python, gauss = state["python"]
        random.setstate((version, tuple(python), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), int(position), int(has_gauss), cached))
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"][: torch.cuda.device_count()]])
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        if rank > 0:  # the first process saved its own states: let each other one draw numbers of its own
            seed = int(torch.randint(2**31, ())) + rank
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)


def prepare_output(output_dir: str, *, resume: bool = False) -> Path:
    """Make the output folder and say its name; a run that does not resume moves an earlier one's folder aside.

    Among distributed processes the first one does it and the others wait.

    Raises:
        InputError: if the folder cannot be made or written to, or another training is writing to it.
    """
    folder = Path(output_dir)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() > 0:
        torch.distributed.barrier()
        return folder
    try:
        if folder.is_dir():
            _claim(folder)
        if not resume and any(folder.glob("checkpoint*.pt")):
            aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            folder.rename(aside)
            print(f"Moved the earlier run in {folder} to {aside}")
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder)
        of_epochs = [path for path in folder.glob("checkpoint_epoch=*.pt") if NUMBERED.fullmatch(path.name)]
        for outdated in sorted(of_epochs, key=_epoch)[:-2]:
            outdated.unlink()  # the process that saved them is gone, and with it its count of what to keep
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name) and path.is_file():
                path.unlink()
        check_writable(folder)
    except OSError as error:
        raise InputError(
            f"output {folder}: expected a folder that can be written to, found: {error.strerror}"
        ) from error
    print(f"Output folder: {folder.resolve()}")
    if distributed:
        torch.distributed.barrier()
    return folder


def _claim(folder: Path) -> None:
    """Keep other processes from training into a folder for as long as this one lives, where the system has locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    if any(os.path.samestat(os.fstat(held), folder.stat()) for held in _claimed):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(
            f"output {folder}: expected a folder that no other training is writing to, found that one is (give each an "
            "output_dir of its own)"
        ) from error
    except OSError:  # a file system without locks
        os.close(handle)
    else:
        _claimed.append(handle)


def latest_checkpoint(output_dir: str) -> str | None:
    """Return the newest training checkpoint of a run, or None where it has none.

    One that cannot be read, as after a power failure, is passed over, with a word.
    """
    for path in sorted(Path(output_dir).glob("checkpoint*.pt"), key=_epoch, reverse=True):
        try:
            load_checkpoint(str(path))
        except InputError as error:
            print(f"Passing over a damaged file: {error}")
        else:
            return str(path)
    return None


def _epoch(path: Path) -> float:
    """Return after how many epochs a checkpoint was saved: a folder's copy has other times, in the names' order.

    A file that cannot be read or is of no training comes before all others.
    """
    if named := NUMBERED.fullmatch(path.name):
        return int(named[1])
    with contextlib.suppress(InputError, TypeError, KeyError, IndexError):
        trainer = load_checkpoint(str(path))["trainer"]
        return float(trainer["iteration"] / trainer["epoch_length"])
    return -1.0
