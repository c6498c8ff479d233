"""Handlers of a training beside MONAI's: its time, its progress with the validation figures, when it validates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import ValidationHandler
from tqdm import tqdm

from monai_rl_reg.errors import InputError


class TrainingProgress:
    """One progress bar over all iterations of a training, with the loss, the return and the validation figures.

    Args:
        evaluator: the validation evaluator whose metrics are shown after each validation.
        metrics: names of its metrics to show.
        time: of a training by minutes: the bar's end is told by the share of them that has gone.
    """

    def __init__(
        self,
        evaluator: Engine | None = None,
        metrics: Sequence[str] = ("dice_before", "dice", "similarity"),
        time: TrainingTime | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.metrics = metrics
        self.time = time
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}
        self.figures: dict[str, str] = {}

    def attach(self, engine: Engine) -> None:
        """Follow this trainer, and the evaluator if one was given."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iterate)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._estimate)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.TERMINATE, self._close)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self._validated)

    def _start(self, engine: Engine) -> None:
        total = (engine.state.max_epochs or 0) * (engine.state.epoch_length or 0) if self._by_epochs() else None
        self.bar = tqdm(total=total, initial=engine.state.iteration, desc="training", unit="it", dynamic_ncols=True)

    def _iterate(self, engine: Engine) -> None:
        if self.bar is None:
            return
        output: Any = engine.state.output
        figures = {key: float(output[0].get(key, np.nan)) for key in ("loss", "return")}
        self.shown = {key: f"{value:.3f}" for key, value in figures.items() if np.isfinite(value)}
        self.bar.set_postfix(self.shown | self.figures, refresh=False)
        self.bar.update()

    def _by_epochs(self) -> bool:
        return self.time is None or self.time.minutes is None

    def _estimate(self, engine: Engine) -> None:
        if self.bar is not None and self.time is not None and not self._by_epochs():
            self.bar.total = round(engine.state.iteration / self.time.progress())

    def _validated(self, engine: Engine) -> None:
        self.figures = {n: f"{engine.state.metrics[n]:.4f}" for n in self.metrics if n in engine.state.metrics}
        if self.bar is not None and self.figures:
            self.bar.write("validation: " + ", ".join(f"{name} {value}" for name, value in self.figures.items()))
            self.bar.set_postfix(self.shown | self.figures)

    def _close(self, engine: Engine) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class TrainingTime:
    """End a training after some minutes, at the end of an epoch, and tell how far it is: for the learning rate.

    Args:
        minutes: the time to train for, in minutes; None trains for all of ``max_epochs``.
        max_epochs: the trainer's.
    """

    def __init__(self, minutes: float | None, max_epochs: int) -> None:
        self.minutes = minutes
        self.max_epochs = max_epochs
        self.epoch = 0
        self.elapsed = 0.0  # in minutes, of all runs that this one resumes
        self._since = 0.0

    def attach(self, engine: Engine) -> None:
        """Follow this trainer; attach it before the handlers that end an epoch."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def progress(self) -> float:
        """Return the share of the training that is done, in [0, 1]."""
        share = self.epoch / self.max_epochs
        return min(1.0, share if self.minutes is None else max(share, self.elapsed / self.minutes))

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed training needs."""
        return {"epoch": self.epoch, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.epoch, self.elapsed = int(state["epoch"]), float(state["elapsed"])

    def _start(self, engine: Engine) -> None:
        self._since = time.monotonic()

    def _epoch(self, engine: Engine) -> None:
        now = time.monotonic()
        self.elapsed += (now - self._since) / 60
        self._since = now
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            elapsed = torch.tensor(self.elapsed, device=engine.state.device)  # type: ignore[attr-defined]
            torch.distributed.broadcast(elapsed, 0)  # all processes end with the same epoch
            self.elapsed = float(elapsed)
        self.epoch = engine.state.epoch
        if self.minutes is not None and self.elapsed >= self.minutes:
            engine.state.max_epochs = engine.state.epoch


class EpochValidation(ValidationHandler):
    """MONAI's handler, which besides validates the last epoch: what a training ends with, whatever the interval.

    Args:
        interval: validate after every so many epochs.
        validator: MONAI's evaluator.

    Raises:
        InputError: if the interval is below 1.
    """

    def __init__(self, interval: int, validator: Evaluator) -> None:
        if interval < 1:
            raise InputError(f"val_interval: expected a number of epochs from 1 up, found {interval}")
        super().__init__(interval, validator)

    def attach(self, engine: Engine) -> None:
        """Follow this trainer; attach it after what may end the training, such as :class:`TrainingTime`."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=self._due), self)

    def _due(self, engine: Engine, epoch: int) -> bool:
        return epoch % self.interval == 0 or epoch == engine.state.max_epochs
