"""What a training iteration costs, and what the box-sum NCC and half-resolution fields save: python cost.py

One thread; every figure is the median of repeated runs in this one process, so compare them as ratios. ``cost.py 64``
does that at 64^3. ``cost.py step 128`` and ``cost.py train 128`` measure CPU seconds and peak memory, each in a process
of its own, of what a user waits for: a step of the policy with composing and warping, as inference takes it; and eight
steps of an episode with one update of four transitions.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date

import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor

from monai_rl_reg.inferer import half_pays
from monai_rl_reg.losses import BoxLocalNormalizedCrossCorrelationLoss, SoftActorCriticLoss
from monai_rl_reg.networks import PlannerActor, TwinCritic
from monai_rl_reg.replay import ReplayBuffer
from monai_rl_reg.rollout import follow, rollout
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
    loss = SoftActorCriticLoss(policy, TwinCritic(3, (16, 32, 64, 64), 64), task)
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


def measure_step(size: int) -> Callable[[], object]:
    """Return a run of one step on a pair of images, as inference takes it."""
    task = RegistrationTask(3, field_stride=2)
    policy = PlannerActor(3, 2, 3, action_bound=2.5, action_stride=2).eval()
    half = half_pays(torch.device("cpu"))
    state = task.reset(torch.rand(1, 2, size, size, size))

    def run() -> None:
        with torch.inference_mode():
            list(follow(policy, task, state, 1, half=half))

    return run


def measure_training(size: int) -> Callable[[], object]:
    """Return a run of eight steps of an episode and one update of four transitions."""
    task = RegistrationTask(3, field_stride=2, dice_reward=False)
    policy = PlannerActor(3, 2, 3, action_bound=2.5, action_stride=2)
    loss = SoftActorCriticLoss(policy, TwinCritic(3, (16, 32, 64, 64), 64), task)
    optimizer = torch.optim.Adam(loss.parameters())
    image = torch.rand(1, 2, size, size, size)

    def run() -> None:
        replay = ReplayBuffer(8, task.replay_keys)
        with torch.autocast("cpu", torch.bfloat16, enabled=half_pays(torch.device("cpu"))):
            for _, transition in rollout(policy, task, task.reset(image), 8):
                replay.extend(transition)
            optimizer.zero_grad()
            torch.stack(list(loss(replay.sample(4))[0].values())).sum().backward()
        optimizer.step()
        loss.update_targets()

    return run


def measure(name: str, size: int) -> None:
    """Print CPU seconds of the second run, and the peak memory beyond what the libraries take."""
    torch.set_num_threads(1)
    run = {"step": measure_step, "train": measure_training}[name](size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    started = time.process_time()
    run()
    spent, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = f"{(peak - before) / 2**20:.2f} GiB more than before, {peak / 2**20:.2f} in all"
    print(f"{date.today()}, {name}, {size}^3: {spent:.2f} CPU s, {memory}")


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
        times[name] = seconds(lambda loss=ncc: loss(pred, target).backward())  # type: ignore[misc]
        print(f"local NCC, window 9, forward + backward, {name}: {1000 * times[name]:.1f} ms")
    print(f"  ratio {times['MONAI'] / times['box sums']:.1f}")
    for box, stride in ((False, 1), (False, 2), (True, 1), (True, 2)):
        rate = transitions_per_second(size, box=box, field_stride=stride)
        name = "box sums" if box else "MONAI's NCC"
        print(f"training, {name}, field at 1/{stride} resolution: {rate:.2f} transitions/s")


if __name__ == "__main__":
    if sys.argv[1:2] in (["step"], ["train"]):
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        main(*map(int, sys.argv[1:]))
