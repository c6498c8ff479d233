from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from monai_rl_reg.averaging import RECENT, WeightAverage


def swinging(iterations: int, *, about: float = 2.0, start: float = 100.0) -> WeightAverage:
    """Train a network of one weight that begins far off, and then swings about a value."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, start)
    average = WeightAverage(network)

    def iterate(engine: Engine, batch: Any) -> None:
        swing = 1.0 if engine.state.iteration % 2 else -1.0
        nn.init.constant_(network.weight, start if engine.state.iteration < 5 else about + swing)

    trainer = Engine(iterate)
    average.attach(trainer)
    trainer.run([0], max_epochs=iterations, epoch_length=1)
    return average


def test_the_mean_is_nearer_than_the_weights_and_forgets_the_beginning() -> None:
    for iterations in (200, 201, 1000):
        assert float(swinging(iterations).module.weight) == pytest.approx(2.0, abs=0.1)
    assert float(swinging(4).module.weight) == 100.0


def test_a_weight_of_the_mean_by_its_formula() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = WeightAverage(network)
    values = [3.0, 5.0, -2.0, 7.0]
    expected = 0.0
    for t, value in enumerate(values, start=1):
        nn.init.constant_(network.weight, value)
        average.update_parameters(network)
        expected += (value - expected) * RECENT / (t + RECENT - 1)
    assert float(average.module.weight) == pytest.approx(expected)


def test_it_goes_on_where_it_was_saved() -> None:
    average = swinging(50)
    assert {name for name, _ in average.state_dict().items()} == {"n_averaged", "module.weight"}
    resumed = WeightAverage(nn.Linear(1, 1, bias=False))
    resumed.load_state_dict(average.state_dict())
    network = nn.Linear(1, 1, bias=False)
    average.update_parameters(network)
    resumed.update_parameters(network)
    torch.testing.assert_close(average.module.weight, resumed.module.weight, rtol=0, atol=0)
    assert not any(p.requires_grad for p in average.parameters())
