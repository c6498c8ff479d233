"""The iteration: an update whose gradient is garbage is left out in mixed precision, and in that alone."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer

from monai_rl_reg.engine import ReinforcementUpdate
from monai_rl_reg.inferer import StepwiseInferer
from monai_rl_reg.losses import SoftActorCriticLoss
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.replay import ReplayBuffer
from monai_rl_reg.tasks.registration import RegistrationTask


def test_a_group_without_gradients_is_left_out_of_clipping_on_any_device() -> None:
    learnt = torch.nn.Parameter(torch.zeros(2, device="meta"))  # as on CUDA: not where torch makes a norm of nothing
    learnt.grad = torch.ones(2, device="meta")
    frozen = torch.nn.Parameter(torch.zeros(2, device="meta"), requires_grad=False)
    optimizer = torch.optim.SGD([{"params": [learnt]}, {"params": [frozen]}, {"params": []}], lr=0.1)
    update = ReinforcementUpdate(ReplayBuffer(1, ()), steps=1)
    assert update._clip(optimizer).device.type == "meta"


@pytest.mark.parametrize("amp", [True, False])
def test_an_update_with_a_gradient_that_is_no_number_is_left_out_in_mixed_precision(amp: bool) -> None:
    task = RegistrationTask(2, field_stride=2)
    policy = PlannerActor(2, 2, 2, channels=(4, 8), plan_channels=2, action_stride=2)
    loss = SoftActorCriticLoss(policy, TwinCritic(2, (4, 8), 2), task, reinforcement=False)
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        return gradient * torch.nan if len(calls) == 2 else gradient

    policy.actor.head.conv.weight.register_hook(spoil)  # type: ignore[union-attr,operator]
    weights = []
    update = ReinforcementUpdate(ReplayBuffer(8, task.replay_keys), steps=1, updates=1, batch_size=2)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        epoch_length=3,
        train_data_loader=DataLoader([{"image": torch.rand(2, 16, 16)} for _ in range(6)], batch_size=2),
        network=policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=0.1),
        loss_function=loss,
        inferer=StepwiseInferer(task, 1),
        iteration_update=update,
        decollate=False,
        amp=amp,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: weights.append(copy.deepcopy(policy.state_dict())))
    if not amp:
        with pytest.raises((FloatingPointError, ValueError)):
            trainer.run()
        return
    trainer.run()
    kept = [all(torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(weights)]
    assert kept == [True, False], "the second update changed nothing, the third one did"
    assert all(bool(torch.isfinite(value).all()) for value in policy.state_dict().values())
