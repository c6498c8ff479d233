"""Refinement of one pair: more steps from the policy's field, by gradient descent on the task's own loss."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_tensor
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from monai_rl_reg.geometry import compose
from monai_rl_reg.tasks.registration import RegistrationTask
from monai_rl_reg.tasks.task import Act, State

LEARNING_RATE = 0.1
"""Of Adam in the first iteration, in voxels of the field's grid: about the most that a voxel moves in it."""
HALVED_AFTER = 20
"""Iterations after which the learning rate is half of that, a third after twice as many, and so on."""
ITERATIONS_A_STEP = 5
"""After so many iterations the step is composed onto the field, and another one begins."""
FOLD_WEIGHT = 10.0
"""Of the task loss's term against folds, where the task itself has none or a smaller one."""
PROXIMITY = 10.0
"""For a policy that knows more than the loss says: one that sees structures."""
MOST_HALVED = 64
"""A step that brings nothing is tried again at half the rate; below this part of the first, descent has ended."""


@dataclass(frozen=True)
class Refinement:
    """The best state that a refinement met, and how it came there.

    Attributes:
        state: the start, or it with a better field; no step was taken that did not lower the loss.
        loss_before: of no step from the start.
        loss_after: of the last step.
        iterations: of gradient descent.
        seconds: wall time.
    """

    state: State
    loss_before: float
    loss_after: float
    iterations: int
    seconds: float


def refine(
    task: RegistrationTask,
    state: State,
    act: Act,
    *,
    seconds: float = math.inf,
    iterations: int | None = None,
    proximity: float = 0.0,
) -> Refinement:
    """Compose more steps onto a state's field, each found by Adam on the task's loss.

    A step a from the field D minimises the task's loss, but with the smoothness of the step alone, and how far and
    roughly the field leaves the first one::

        J_task(a) - smoothness_weight (mean |grad D'|^2 - mean |grad a|^2)
            + proximity (mean |D' - D_0|^2 + mean |grad (D' - D_0)|^2),    D' = a composed onto D

    So the field gives way as a fluid does, to what the images ask of it again and again, where the smoothness of the
    whole field would hold back what is far already, as an elastic does (G. E. Christensen et al., Deformable templates
    using large deformation kinematics, IEEE Transactions on Image Processing 1996).

    Stops at the first of both limits; the iteration under way ends, so that time may run over by one.

    Args:
        task: gives the loss.
        state: to start from, one item.
        act: the policy, which some tasks' losses ask.
        seconds: most wall time.
        iterations: most iterations.
        proximity: keeps the field near where it began.

    Raises:
        ValueError: if neither limit is given.
    """
    if seconds == math.inf and iterations is None:
        raise ValueError("expected a limit: seconds or iterations")
    started = time.monotonic()
    start = state["displacement"]
    first, done, least, over = math.inf, 0, math.inf, False
    rate = LEARNING_RATE / (1 + proximity)  # a steeper bowl, a shorter step
    while not over:
        action, best = torch.zeros_like(start), torch.zeros_like(start)
        with torch.enable_grad():
            action.requires_grad_()
            optimiser = torch.optim.Adam([action], lr=rate)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: 1 / (1 + done / HALVED_AFTER))
            for iteration in range(ITERATIONS_A_STEP + 1):
                terms = task.loss(state, action, act)
                terms["smoothness"] = task.smoothness_weight * task.smoothness(action)
                if proximity > 0:
                    away = compose(state["displacement"], action, task.warp) - start
                    terms["proximity"] = proximity * (away.square().sum(1).mean() + task.smoothness(away))
                loss = torch.stack(list(terms.values())).sum()
                value = float(loss.detach())
                first = value if done == 0 else first
                if value < least:
                    best, least = action.detach().clone(), value
                over = time.monotonic() - started >= seconds or (iterations is not None and done >= iterations)
                if over or iteration == ITERATIONS_A_STEP:
                    break
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                done += 1
        if not best.any():
            rate /= 2
            if rate < LEARNING_RATE / (1 + proximity) / MOST_HALVED:
                break
            continue
        with torch.no_grad():
            state = task.advance(state, best)
    return Refinement(state, first, least, done, time.monotonic() - started)


class RefineDisplacementd(MapTransform):
    """Refine a displacement field by the registration task's loss, as a transform of MONAI's ``Compose``.

    Reads the pair, ``image`` (2, *spatial), fixed and moving scaled to [0, 1], and improves the fields (d, *spatial)
    in voxels of the same grid that the keys name, in place, as :func:`refine` does.

    Args:
        keys: of the fields.
        seconds: most wall time a field.
        iterations: most iterations; None leaves it to the time.
        task: whose loss to use, with ``field_stride`` 1 and without ``relax``; by default a
            :class:`RegistrationTask` with a term against folds.
        allow_missing_keys: whether data without one of the keys is passed on.
    """

    def __init__(
        self,
        keys: Sequence[str] = ("pred",),
        *,
        seconds: float = 10.0,
        iterations: int | None = None,
        task: RegistrationTask | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.seconds = seconds
        self.iterations = iterations
        self.task = task

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the fields improved.

        Raises:
            ValueError: if a field is not on the images' grid, or the task works on another one.
        """
        out = dict(data)
        image = convert_to_tensor(out[Keys.IMAGE], track_meta=False)[None].float()
        task = self.task or RegistrationTask(image.ndim - 2, fold_weight=FOLD_WEIGHT)
        start = task.to(image.device).reset(image)
        for key in self.key_iterator(out):
            field = convert_to_tensor(out[key], track_meta=False)[None].to(image)
            if field.shape != start["displacement"].shape:
                expected, found = tuple(start["displacement"].shape[1:]), tuple(field.shape[1:])
                raise ValueError(f"{key}: expected a field on the task's grid of shape {expected}, got {found}")
            with torch.no_grad():
                state = task.advance(start, field)
            refined = refine(task, state, _no_policy, seconds=self.seconds, iterations=self.iterations)
            out[key] = convert_to_dst_type(refined.state["displacement"][0], out[key])[0]
        return out


def _no_policy(observation: Tensor) -> Tensor:
    raise ValueError("the loss asks a policy, and there is none here")
