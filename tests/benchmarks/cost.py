"""What a training iteration costs, and what the box-sum NCC and half-resolution fields save: python cost.py

One thread; every figure is the median of repeated runs in this one process, so compare them as ratios.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date

import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor

from monai_rl_reg.losses import BoxLocalNormalizedCrossCorrelationLoss, SoftActorCriticLoss
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.replay import ReplayBuffer
from monai_rl_reg.rollout import rollout
from monai_rl_reg.similarity import LocalNCC
from monai_rl_reg.tasks.registration import RegistrationTask

warnings.filterwarnings("ignore")


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of ``run`` after one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class MonaiNCC(LocalNCC):
    """The same by MONAI's convolutions."""

    def forward(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """Return the similarity, (B,)."""
        ncc: Tensor = -LocalNormalizedCrossCorrelationLoss(3, self.window, reduction="none")(moved, fixed)
        return ncc.flatten(1).mean(1)


def transitions_per_second(size: int, *, box: bool, field_stride: int, steps: int = 3) -> float:
    """Transitions of a training iteration (2 episodes, 2 updates of 4 transitions) per second."""
    task = RegistrationTask(3, field_stride=field_stride, dice_reward=False)
    if not box:
        task.similarity = MonaiNCC()
    policy = PlannerActor(3, 2, 3, action_bound=5.0 / field_stride, action_stride=field_stride)
    loss = SoftActorCriticLoss(policy, TwinCritic(3, 2, 64), task)
    optimizer = torch.optim.Adam(loss.parameters())
    replay = ReplayBuffer(12, task.replay_keys)
    image = torch.rand(2, 2, size, size, size)

    def iterate() -> None:
        for _, transition in rollout(policy, task, task.reset(image), steps):
            replay.extend(transition)
        for _ in range(2):
            optimizer.zero_grad()
            torch.stack(list(loss(replay.sample(4))[0].values())).sum().backward()
            optimizer.step()
            loss.update_targets()

    return 2 * steps / seconds(iterate, repeats=3)


def main(size: int = 64) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pred, target = torch.rand(1, 1, size, size, size, requires_grad=True), torch.rand(1, 1, size, size, size)
    print(f"{date.today()}, torch {torch.__version__}, one thread, {size}^3")
    times = {}
    for name, ncc in (
        ("MONAI", LocalNormalizedCrossCorrelationLoss(3, 9)),
        ("box sums", BoxLocalNormalizedCrossCorrelationLoss(3, 9)),
    ):
        times[name] = seconds(lambda ncc=ncc: ncc(pred, target).backward())
        print(f"local NCC, window 9, forward + backward, {name}: {1000 * times[name]:.1f} ms")
    print(f"  ratio {times['MONAI'] / times['box sums']:.1f}")
    for box, stride in ((False, 1), (False, 2), (True, 1), (True, 2)):
        rate = transitions_per_second(size, box=box, field_stride=stride)
        ncc = "box sums" if box else "MONAI's NCC"
        print(f"training, {ncc}, field at 1/{stride} resolution: {rate:.2f} transitions/s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
