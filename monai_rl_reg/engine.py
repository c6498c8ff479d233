"""The reinforcement-learning iteration for MONAI's SupervisedTrainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import convert_to_tensor
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from monai_rl_reg.convolutions import quick_convolutions
from monai_rl_reg.errors import InputError
from monai_rl_reg.losses import SoftActorCriticLoss
from monai_rl_reg.replay import ReplayBuffer
from monai_rl_reg.rollout import rollout


class ReinforcementUpdate:
    """``iteration_update`` of a SupervisedTrainer: one batched rollout, then a fixed number of updates.

    The trainer's ``network`` is the policy, its ``loss_function`` a :class:`SoftActorCriticLoss` (or
    ``DistributedDataParallel`` around one), its ``optimizer`` holds the parameters of both. The number of updates
    depends on nothing that differs between processes, so that distributed training cannot fall out of step.

    Args:
        replay: where transitions go and come from.
        steps: time limit of an episode; reaching it truncates and does not terminate.
        updates: updates an iteration.
        batch_size: transitions an update.
        warm_up: iterations that only collect transitions.
        max_grad_norm: the gradient of each of the optimiser's parameter groups is clipped to this norm.

    Raises:
        InputError: if one of the numbers is below 1.
    """

    def __init__(
        self,
        replay: ReplayBuffer,
        *,
        steps: int,
        updates: int = 1,
        batch_size: int = 8,
        warm_up: int = 0,
        max_grad_norm: float = 1.0,
    ) -> None:
        for name, value in {"steps": steps, "updates": updates, "update_batch_size": batch_size}.items():
            if value < 1:
                raise InputError(f"{name}: expected a number from 1 up, found {value}")
        self.replay = replay
        self.steps = steps
        self.updates = updates
        self.batch_size = batch_size
        self.warm_up = warm_up
        self.max_grad_norm = max_grad_norm

    def __call__(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> list[dict[str, Any]]:
        """Play and learn from one batch.

        Returns:
            one dictionary for the batch, in a list as MONAI's handlers expect it after decollation: MONAI's
            ``image label pred loss``, the mean ``return`` of the episodes, and every term of the loss.
        """
        image, label = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)[:2]
        engine.state.output = {Keys.IMAGE: image, Keys.LABEL: label}
        engine.state.output |= self._play(
            engine,
            convert_to_tensor(image, track_meta=False),
            None if label is None else convert_to_tensor(label, track_meta=False),
        )
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        figures: dict[str, list[Tensor]] = {}
        updates = self.updates if engine.state.iteration > self.warm_up else 0
        for _ in range(updates):
            for name, value in self._update(engine).items():
                figures.setdefault(name, []).append(value)
        engine.state.output[Keys.LOSS] = math.nan  # of the iterations that only collect
        engine.state.output |= {name: float(torch.stack(values).mean()) for name, values in figures.items()}
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return [engine.state.output]

    def _play(self, engine: SupervisedTrainer, image: Tensor, label: Tensor | None) -> dict[str, Any]:
        loss = unwrap(engine.loss_function)
        policy: Any = engine.network
        total, transitions = 0.0, 0
        loss.train()
        policy.eval()
        device = image.device
        with (
            torch.autocast(device.type, enabled=engine.amp, **engine.amp_kwargs),
            quick_convolutions(device, half=False),
        ):
            final = start = loss.task.reset(image, label)
            for final, transition in rollout(  # noqa: B007
                policy, loss.task, start, self.steps, sample=loss.reinforcement
            ):
                self.replay.extend(transition)
                total += float(transition.reward.sum())
                transitions += len(transition.reward)
        return {Keys.PRED: loss.task.output(final), "return": total / len(image), "transitions": transitions}

    def _update(self, engine: SupervisedTrainer) -> dict[str, Tensor]:
        loss: Any = engine.loss_function
        loss.train()
        batch = self.replay.sample(self.batch_size, device=engine.state.device)
        engine.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(engine.state.device).type, enabled=engine.amp, **engine.amp_kwargs):
            terms, figures = loss(batch)
            total = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(total):
            found = {name: float(value) for name, value in terms.items()}
            raise FloatingPointError(f"the training loss is not finite at iteration {engine.state.iteration}: {found}")
        scaler = engine.scaler if engine.scaler is not None and engine.scaler.is_enabled() else None
        if scaler is None:
            total.backward()
            finite = self._clip(engine.optimizer)
            # torch's bfloat16 convolutions return garbage gradients for grids of 2 voxels a side, now and then (seen in
            # 2.14 on CPUs); as a gradient scaler does, such an update is left out
            if not engine.amp or bool(finite):
                engine.optimizer.step()
        else:
            scaler.scale(total).backward()
            scaler.unscale_(engine.optimizer)
            self._clip(engine.optimizer)
            scaler.step(engine.optimizer)
            scaler.update()
        unwrap(loss).update_targets()
        return {Keys.LOSS: total.detach(), **{name: value.detach() for name, value in (terms | figures).items()}}

    def _clip(self, optimizer: torch.optim.Optimizer) -> Tensor:
        # by group, so that a large error of the critics does not shrink the policy's step; a group without a gradient
        # has a norm of 0 on the CPU, wherever the others are
        groups = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        norms = [torch.nn.utils.clip_grad_norm_(group, self.max_grad_norm) for group in groups if group]
        return torch.isfinite(torch.stack(norms)).all()


def unwrap(loss: Any) -> SoftActorCriticLoss:
    """Return the loss module inside ``DistributedDataParallel``, or the module itself."""
    return getattr(loss, "module", loss)  # type: ignore[no-any-return]


def scalars(output: list[dict[str, Any]]) -> dict[str, float]:
    """Return the numbers in an iteration's output, named ``train/...``: what is worth logging."""
    return {f"train/{name}": float(value) for name, value in output[0].items() if isinstance(value, (int, float))}
