"""Soft actor-critic on plans as one loss module, and a faster local NCC.

References:
    RL-I2IT, arXiv 2309.13672, the losses J_Q, J_pi, J_alpha and the auxiliary loss; SAC, arXiv 1812.05905.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.rollout import Transition
from monai_rl_reg.separable import box_sum
from monai_rl_reg.tasks.task import State, Task

_TARGETS: Any = WeakTensorKeyDictionary()


class BoxLocalNormalizedCrossCorrelationLoss(LocalNormalizedCrossCorrelationLoss):
    """MONAI's local NCC loss with a rectangular window, by box sums: the same value, several times faster.

    Args:
        spatial_dims: 2 or 3.
        kernel_size: window size in voxels, odd.
        smooth_nr, smooth_dr, reduction: as in MONAI's class.
        every: 2 takes the mean over the windows around every second voxel in each direction, in two fifths of the time.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        kernel_size: int = 9,
        reduction: str = "mean",
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
        every: int = 1,
    ) -> None:
        super().__init__(spatial_dims, kernel_size, "rectangular", reduction, smooth_nr, smooth_dr)
        self.every = every

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss in [-1, 0] of images (B, C, *spatial), which should lie in [0, 1]; computed in fp32.

        Raises:
            ValueError: if the shapes differ or have another number of dimensions.
        """
        if pred.ndim - 2 != self.ndim:
            raise ValueError(f"expected {self.ndim} spatial dimensions, got pred of shape {tuple(pred.shape)}")
        if target.shape != pred.shape:
            raise ValueError(
                f"expected pred and target of one shape, got {tuple(pred.shape)} and {tuple(target.shape)}"
            )
        p, t = pred.float(), target.float()
        count = self.kernel_size**self.ndim
        p_sum, p2_sum, tp_sum = self._sums(p, p * p, t * p)
        t_sum, t_var = self._of_target(target)
        cross = tp_sum - p_sum * t_sum / count
        p_var = (p2_sum - p_sum * p_sum / count).clamp(min=self.smooth_dr)
        # Cauchy-Schwarz bounds it by 1, but for the rounding of two nearly equal sums in flat regions
        ncc = ((cross * cross + self.smooth_nr) / (t_var * p_var)).clamp(max=1.0)
        if self.reduction == "mean":
            return -ncc.mean()
        return -ncc.sum() if self.reduction == "sum" else -ncc

    def _sums(self, *images: Tensor) -> tuple[Tensor, ...]:
        sums = box_sum(torch.stack(images).flatten(0, 1), self.kernel_size, self.every)
        return sums.chunk(len(images))

    def _of_target(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and variance in every window; kept while the target lives, as steps ask for the same fixed image."""
        lasting = not (target.requires_grad or target.is_inference() or torch.is_inference_mode_enabled())
        known = _TARGETS.setdefault(target, {}) if lasting else {}
        key = (target._version, self.kernel_size, self.every, self.smooth_dr) if lasting else None
        if key not in known:
            t = target.float()
            t_sum, t2_sum = self._sums(t, t * t)
            found = t_sum, (t2_sum - t_sum * t_sum / self.kernel_size**self.ndim).clamp(min=self.smooth_dr)
            for before in [k for k in known if k[0] != target._version]:
                del known[before]
            known[key] = found
        return known[key]


class SoftActorCriticLoss(nn.Module):
    """All that training minimises, as one module with one forward: named terms to be summed, one backward.

    With d = terminated (never a time limit), Qbar the slow target critics and n the number of values in a plan::

        J_Q     = E[ (Q_i(s,p) - r - gamma (1-d) (min_j Qbar_j(s',p') - alpha log pi(p'|s') / n))^2 ]
        J_pi    = E[ alpha log pi(p|s) / n - min_i Q_i(s,p) ]
        J_alpha = E[ -log alpha (log pi(p|s) / n + H_target) ]
        J_task  = the task's own loss after 1 to ``unroll`` steps, drawn at random; and of what the task itself learns

    J_Q moves the critics, J_pi the planner, J_alpha the temperature, J_task planner and actor.

    The log-probability counts per number of the plan, so that temperature and target entropy mean the same for a
    vector of 64 as for a map of 4096; this is a rescaling of alpha.

    Args:
        policy: planner and actor.
        critic: the twin critics.
        task: gives the task loss.
        reinforcement: False is the control: the same network, deterministic, by the task loss alone.
        unroll: most steps that the task loss follows, with the gradient through all of them; 1 looks at the action
            alone.
        planner_weight: weight of J_pi against the task loss.
        planner_warm_up: updates before J_pi enters; the critics learn from the first one.
        discount: gamma.
        target_rate: tau, the share of the critics that moves into the targets after every update.
        initial_temperature: alpha before the first update.
        target_entropy: H_target in nats per number of the plan; uniform over (-1, 1) would be log 2.
    """

    def __init__(
        self,
        policy: PlannerActor,
        critic: TwinCritic,
        task: Task,
        *,
        reinforcement: bool = True,
        unroll: int = 1,
        planner_weight: float = 0.1,
        planner_warm_up: int = 0,
        discount: float = 0.99,
        target_rate: float = 0.005,
        initial_temperature: float = 0.01,
        target_entropy: float = -1.0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.task = task
        self.target_critic = copy.deepcopy(critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(initial_temperature)))
        self.register_buffer("updates", torch.tensor(0))
        self.updates: Tensor
        self.reinforcement = reinforcement
        self.unroll = unroll
        self.planner_weight = planner_weight
        self.planner_warm_up = planner_warm_up
        self.discount = discount
        self.target_rate = target_rate
        self.target_entropy = target_entropy
        if not reinforcement:  # DistributedDataParallel waits for the gradient of every parameter that asks for one
            self.critic.requires_grad_(False)
            self.log_temperature.requires_grad_(False)

    def forward(self, batch: Transition) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms to be summed and minimised, and detached figures worth logging."""
        observation = self.task.observe(batch.state)
        if not self.reinforcement:
            return self._task_loss(batch.state, self.policy(observation)), {}
        plan, log_prob, action, features = self.policy.sample(observation)
        log_prob = log_prob / plan[0].numel()
        temperature = self.log_temperature.exp().detach()

        # J_Q
        with torch.no_grad():
            next_observation = self.task.observe(batch.next_state)
            next_plan, next_log_prob, next_features = self.policy.draw(next_observation)
            next_value = self.target_critic(next_features, next_plan).amin(1)
            next_value = next_value - temperature * next_log_prob / plan[0].numel()
            target = batch.reward + self.discount * (~batch.terminated) * next_value
        values = self.critic(features, batch.plan)
        critic_loss = F.mse_loss(values, target[:, None].expand_as(values))

        # J_pi: critics frozen by detached parameters, so that one backward serves all terms
        frozen = {name: value.detach() for name, value in self.critic.named_parameters()}
        plan_value = functional_call(self.critic, frozen, (features, plan)).amin(1)
        active = (self.updates >= self.planner_warm_up).float()
        planner_loss = active * self.planner_weight * (temperature * log_prob - plan_value).mean()

        # J_alpha
        entropy_gap = (log_prob + self.target_entropy).detach()
        temperature_loss = -(self.log_temperature * entropy_gap).mean()

        terms = {"critic": critic_loss, "planner": planner_loss, "temperature": temperature_loss}
        figures = {
            "value": values.detach().mean(),
            "entropy": -log_prob.detach().mean(),
            "alpha": temperature,
        }
        return terms | self._task_loss(batch.state, action), figures

    def _task_loss(self, state: State, action: Tensor) -> dict[str, Tensor]:
        own = self.task.own_loss(state)
        # the last state alone is judged: a step may be what pays off later, and every number of steps has its turn
        for _ in range(int(torch.randint(self.unroll, ()))):
            state = self.task.advance(state, action)
            action = self.policy(self.task.observe(state))
        return self.task.loss(state, action, self.policy) | own

    @torch.no_grad()
    def update_targets(self) -> None:
        """Move the target critics by ``target_rate`` towards the critics; call it after every optimiser step."""
        self.updates += 1
        if self.reinforcement:
            for target, source in zip(self.target_critic.parameters(), self.critic.parameters(), strict=True):
                target.lerp_(source, self.target_rate)
