"""Does the policy know when to stop? Dice against mean steps, of pairs that are easy and pairs that are hard.

    python tests/benchmarks/stopping.py pairs.csv --ckpt model.pt --output stopping

Every other pair as it is, and with the moving image turned and shifted by three amounts, registered from where it lies;
by ``--every 1 --as-they-lie`` all pairs, as they are alone. The stops of ``--stop auto`` at several thresholds of their
gain: by what is seen (which weights that see nothing cannot), by the critic (of weights that were trained with
reinforcement) and by the similarity; and one that knew the true Dice of every step and gave the best mean for its
price, against every fixed number of steps.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from monai_rl_reg.data import read_pairs
from monai_rl_reg.networks import PlannerActor
from monai_rl_reg.policy_bundle import PolicyBundle
from monai_rl_reg.request import Pair
from monai_rl_reg.stepping import enough, take_steps
from monai_rl_reg.tasks.registration import RegistrationTask
from monai_rl_reg.working import GivenPair, WorkingPair

MOTIONS = {0.0: 0.0, 13.5: 3.6, 27.0: 7.2, 45.0: 12.0}
"""Degrees to millimetres."""


def moved(pair: Pair, degrees: float, millimetres: float, random: np.random.Generator) -> Pair:
    """Return the pair with its moving image turned about its centre and shifted, in a random direction each."""
    axis, shift = (x / np.linalg.norm(x) for x in random.normal(size=(2, 3)))
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, :3] = torch.from_numpy(Rotation.from_rotvec(np.deg2rad(degrees) * axis).as_matrix())
    affine = pair.moving.affine.double()
    centre = affine[:3, :3] @ (torch.tensor(pair.moving.shape[1:]).double() - 1) / 2 + affine[:3, 3]
    motion[:3, 3] = centre - motion[:3, :3] @ centre + millimetres * torch.from_numpy(shift)
    assert pair.moving_label is not None
    image, label = (
        MetaTensor(volume.as_tensor(), affine=motion @ affine) for volume in (pair.moving, pair.moving_label)
    )
    return replace(pair, moving=image, moving_label=label)


def course(bundle: PolicyBundle, working: WorkingPair, steps: int) -> list[dict[str, float]]:
    """Return the measures that a stop goes by after every step, and the Dice that stopping there comes to."""
    curve = take_steps(bundle, working, steps + 1).curve[:-1]  # the last one comes relaxed
    if bundle.critic is not None:
        for point, value in zip(curve, values(bundle, working, steps), strict=True):
            point["value"] = value
    if cast(RegistrationTask, bundle.task).relax:
        for taken in range(1, steps + 1):
            curve[taken]["dice"] = take_steps(bundle, working, taken).curve[-1]["dice"]
    return curve


@torch.no_grad()
def values(bundle: PolicyBundle, working: WorkingPair, steps: int) -> list[float]:
    """Return the gain in score that the critic expects of all steps to come, before the first and after every step."""
    policy, task, found = cast(PlannerActor, bundle.network), cast(RegistrationTask, bundle.task), []
    none_left = bundle.value_at_goal(working.image.as_tensor()[None])
    structures = None if working.structures is None else working.structures[None]
    for state in islice(
        bundle.trajectory(working.image.as_tensor()[None], steps + 1, structures=structures), steps + 1
    ):
        plan, _, features = policy.decide(task.observe(state))
        assert bundle.critic is not None
        found.append((float(bundle.critic(features, plan).amin(1)) - none_left) / task.reward_scale)
    return found


def stops(curve: list[dict[str, float]], measure: str, least: float, most: int) -> tuple[int, int]:
    """Return the step that the rule of ``--stop auto`` stops at, by this measure and gain, and the one that it keeps.

    It keeps none where the similarity is less than before the first.
    """
    if measure == "value":
        taken = next((n for n in range(most) if curve[n]["value"] < least), most)
        return taken, taken
    taken = next((n for n in range(1, most) if enough(curve[: n + 1], measure, least)), most)
    return taken, 0 if measure != "seen_dice" and curve[taken][measure] < curve[0][measure] else taken


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--ckpt")
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--as-they-lie", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("stopping"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle = PolicyBundle(ckpt=arguments.ckpt, device="cpu")
    most = 2 * bundle.steps  # as many as a stop may take; two more only show what they would give
    total = most + 2
    random = np.random.default_rng(0)
    curves, motions = [], []
    for row in tqdm(read_pairs(arguments.pairs)[:: arguments.every], unit="pair"):
        pair = Pair.read(**row)
        for degrees, millimetres in list(MOTIONS.items())[: 1 if arguments.as_they_lie else None]:
            one = moved(pair, degrees, millimetres, random)
            given = GivenPair(bundle, one.fixed, one.moving, one.fixed_label, one.moving_label)
            working = given.onto_fixed(torch.eye(4, dtype=torch.float64))
            curves.append(course(bundle, working, total))
            motions.append(degrees)
    dice = np.array([[point["dice"] for point in curve] for curve in curves])
    fixed = dice.mean(0)
    rising = np.maximum.accumulate(fixed)
    rows = []

    def note(rule: str, least: float, at: np.ndarray, kept: np.ndarray | None = None) -> None:
        reached = float(dice[np.arange(len(dice)), at if kept is None else kept].mean())
        steps = float(at.mean())
        needed = float(np.interp(reached, rising, np.arange(len(fixed))))
        by = {f"steps at {d:g} degrees": float(at[np.array(motions) == d].mean()) for d in sorted(set(motions))}
        rows.append({"rule": rule, "threshold": least, "steps": steps, "Dice": reached, "fixed needs": needed} | by)

    for number in range(1, total + 1):
        note("fixed", number, np.full(len(dice), number))
    for least in (0.002, 0.005, 0.01, 0.02, 0.05):
        for rule, measure in (("seen", "seen_dice"), ("critic", "value"), ("similarity", bundle.similarity.name)):
            if measure not in curves[0][0]:
                continue
            note(rule, least, *np.array([stops(curve, measure, least, most) for curve in curves]).T)
    for price in (0.0005, 0.001, 0.002, 0.004, 0.008):
        note("true Dice, which nobody knows", price, (dice - price * np.arange(total + 1))[:, : most + 1].argmax(1))
    if bundle.critic is not None:
        expected = np.array([[point["value"] for point in curve] for curve in curves])[:, :most]
        came = dice[:, most, None] - dice[:, :most]
        print(f"before each step, what the critic expects of all to come, and what came by step {most}:")
        print(pd.DataFrame({"expected": expected.mean(0), "came": came.mean(0)}).round(4).to_string())
        print(f"correlation over all pairs and steps: {np.corrcoef(expected.ravel(), came.ravel())[0, 1]:.3f}")
    table = pd.DataFrame(rows)
    table["saved"] = 1 - table["steps"] / table["fixed needs"]
    arguments.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.output / "stopping.csv", index=False, lineterminator="\n")
    print(table.round(4).to_string(index=False))
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for rule, part in table.groupby("rule", sort=False):
        axes.plot(part["steps"], part["Dice"], "o-", label=rule)
    axes.set(xlabel="mean steps", ylabel="mean Dice", xlim=(0.5, most + 0.5), ylim=(float(fixed[2]) - 0.02, None))
    axes.legend()
    figure.savefig(arguments.output / "stopping.png", dpi=110)


if __name__ == "__main__":
    main()
