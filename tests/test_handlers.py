from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.handlers import EpochValidation, TrainingTime
from monai_rl_reg.pictures import CAPTION, GAP, read_picture
from monai_rl_reg.writers import PictureWriter

pytest.importorskip("PIL")


class Clock:
    """A clock that only the training moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("monai_rl_reg.handlers.time.monotonic", clock)
    return clock


def train(handler: TrainingTime, clock: Clock, *, epochs: int, seconds: float = 10.0) -> tuple[Engine, list[float]]:
    """Train with three iterations of so many seconds an epoch; return the engine and each epoch's progress."""
    progress: list[float] = []

    def iterate(engine: Engine, batch: Any) -> None:
        clock.seconds += seconds

    engine = Engine(iterate)
    handler.attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: progress.append(handler.progress()))
    engine.run(range(3), max_epochs=epochs, epoch_length=3)
    return engine, progress


def test_training_ends_after_the_minutes_with_a_whole_epoch(clock: Clock) -> None:
    handler = TrainingTime(1.75, 100)
    assert handler.progress() == 0
    engine, progress = train(handler, clock, epochs=100)  # half a minute an epoch
    assert (engine.state.epoch, engine.state.iteration) == (4, 12)
    assert progress == pytest.approx([0.5 / 1.75, 1 / 1.75, 1.5 / 1.75, 1])


@pytest.mark.parametrize(("minutes", "validated"), [(1.75, [3, 4]), (None, [3, 6, 7])])
def test_last_epoch_is_validated_whatever_the_interval(
    clock: Clock, minutes: float | None, validated: list[int]
) -> None:
    class Validator(Evaluator):
        def __init__(self) -> None:
            super().__init__(torch.device("cpu"), [None])  # type: ignore[arg-type]
            self.epochs: list[int] = []

        def run(self, global_epoch: int = 1) -> None:
            self.epochs.append(global_epoch)

    def iterate(engine: Engine, batch: Any) -> None:
        clock.seconds += 10

    engine, validator = Engine(iterate), Validator()
    TrainingTime(minutes, 7).attach(engine)
    EpochValidation(3, validator).attach(engine)
    engine.run(range(3), max_epochs=7)
    assert validator.epochs == validated


def test_training_that_takes_all_its_epochs_has_no_other_end(clock: Clock) -> None:
    for minutes in (None, 60.0):
        engine, progress = train(TrainingTime(minutes, 4), clock, epochs=4)
        assert engine.state.epoch == 4
        assert progress == [0.25, 0.5, 0.75, 1]


def test_time_before_the_training_and_of_validation_within_it(clock: Clock) -> None:
    handler = TrainingTime(1.0, 100)
    clock.seconds += 3600
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)

    @engine.on(Events.EPOCH_COMPLETED)
    def validate() -> None:
        clock.seconds += 25

    engine.run([0], max_epochs=100)
    assert engine.state.epoch == 4  # validation after the fourth is of no account any more
    assert handler.elapsed == pytest.approx(75 / 60)


def test_resumed_training_goes_on_with_the_time_that_is_left(clock: Clock) -> None:
    first = TrainingTime(10.0, 100)
    train(first, clock, epochs=3)
    resumed = TrainingTime(2.5, 100)
    resumed.load_state_dict(first.state_dict())
    assert resumed.progress() == pytest.approx(1.5 / 2.5)
    clock.seconds += 3600  # a break
    engine, progress = train(resumed, clock, epochs=100)
    assert engine.state.epoch == 2
    assert progress == pytest.approx([2 / 2.5, 1])


def run_writer(writer: PictureWriter, histories: list[list[Tensor]]) -> None:
    """Evaluate one batch a history."""

    def infer(engine: Engine, history: list[Tensor]) -> None:
        writer.inferer.history = history

    engine = Engine(infer)
    writer.attach(engine)
    engine.run(histories)


def make_writer(folder: Path, **options: Any) -> PictureWriter:
    return PictureWriter(str(folder), SimpleNamespace(history=[]), **options)  # type: ignore[arg-type]


def greys(*values: float, batch: int = 1) -> list[Tensor]:
    return [torch.full((batch, 3, 12, 40), value) for value in values]


def shown(strip: Tensor, width: int = 40) -> list[float]:
    """Return the grey of each picture of a strip."""
    return [round(float(strip[0, -1, left + width // 2]), 2) for left in range(0, strip.shape[2], width + GAP)]


def test_writer_writes_the_result_and_the_steps_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "out"
    run_writer(make_writer(folder, name="filled"), [greys(0, 0.2, 0.4, 0.6)])
    assert {path.name for path in folder.iterdir()} == {"filled.png", "steps.png"}
    assert torch.equal(read_picture(folder / "filled.png"), torch.full((3, 12, 40), 0.6))
    strip = read_picture(folder / "steps.png")
    assert strip.shape == (3, 12 + CAPTION, 4 * 40 + 3 * GAP)
    assert shown(strip) == [0, 0.2, 0.4, 0.6]
    assert strip[:, :CAPTION].min() < 0.1, "captions"
    assert f"Wrote {folder / 'filled.png'} and, beside it, steps.png" in capsys.readouterr().out


def test_strip_of_many_steps_shows_some_of_them_with_the_first_and_the_last(tmp_path: Path) -> None:
    run_writer(make_writer(tmp_path, most=3), [greys(*(0.1 * i for i in range(9)))])
    assert shown(read_picture(tmp_path / "steps.png")) == [0, 0.4, 0.8]


def test_strip_of_no_step_at_all(tmp_path: Path) -> None:
    run_writer(make_writer(tmp_path), [greys(0.4)])
    assert shown(read_picture(tmp_path / "steps.png")) == [0.4]


def test_several_batches_are_numbered(tmp_path: Path) -> None:
    run_writer(make_writer(tmp_path), [greys(0, 0.2), greys(0, 0.4)])
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}_{i:04d}.png" for name in ("result", "steps") for i in range(2)
    }
    assert float(read_picture(tmp_path / "result_0001.png").mean()) == pytest.approx(0.4)


def test_several_pictures_of_one_batch_are_numbered(tmp_path: Path) -> None:
    history = greys(0, 0.2, batch=2)
    history[-1][1] = 0.8
    run_writer(make_writer(tmp_path), [history])
    results = [float(read_picture(tmp_path / f"result_{i:04d}.png").mean()) for i in range(2)]
    assert results == pytest.approx([0.2, 0.8])


def test_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(
        InputError, match=f"output {tmp_path / 'out'}/steps.png: expected a folder that can be written to"
    ):
        run_writer(make_writer(tmp_path / "out"), [greys(0.4)])
