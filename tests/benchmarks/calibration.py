"""Does the deviation tell where a registration is off? python calibration.py validation_pairs.csv --output OUT

Two errors are compared with what claims to tell it, voxel by voxel. On real pairs: the distance from a boundary voxel
of the moved label to the boundary of the fixed one, known there alone, with the labellers' own doubt in it. On
synthetic ones, the fixed image against itself, deformed by a known smooth field and given noise: the length of the
difference from the true displacement, at every voxel of the labels' surroundings.

What claims to tell it: ``plans``, the deviation over rollouts of sampled plans, as ``register --uncertainty`` gives it;
``plans x 4``, with the plan's standard deviation fourfold; ``images``, over rollouts with noise and contrast changes on
both images; ``inverse``, by how much the registrations there and back miss each other; ``length``, of the displacement.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.utils import distance_transform_edt
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.data import read_pairs
from monai_rl_reg.geometry import compose, identity_grid, sample
from monai_rl_reg.metrics import mean_label_dice
from monai_rl_reg.policy_bundle import PolicyBundle
from monai_rl_reg.request import Pair
from monai_rl_reg.stepping import deviation
from monai_rl_reg.working import GivenPair, WorkingPair

HERE = torch.eye(4, dtype=torch.float64)
CLAIMS = ["plans", "plans x 4", "images", "inverse", "length"]


@contextmanager
def louder(planner: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the standard deviation of the plans that are drawn."""
    handle = planner.register_forward_hook(lambda module, given, out: (out[0], out[1] + math.log(factor), *out[2:]))
    yield
    handle.remove()


def altered(image: Tensor, random: torch.Generator) -> Tensor:
    """Return images (2, *grid) with noise and another contrast each."""
    gamma = torch.exp(0.3 * torch.randn(2, *[1] * (image.ndim - 1), generator=random))
    noise = 0.03 * torch.randn(image.shape, generator=random)
    return (image.clamp(0, 1) ** gamma + noise).clamp(0, 1)


def claims(
    bundle: PolicyBundle, working: WorkingPair, field: Tensor, names: list[str], rollouts: int
) -> dict[str, Tensor]:
    """Return what each claims, (*grid) in mm (voxels of 1 mm)."""
    image, found = working.image.as_tensor(), {}
    if "plans" in names:
        found["plans"] = deviation(bundle, working, HERE, bundle.steps, rollouts)[0]
    if "plans x 4" in names:
        with louder(bundle.network.planner, 4.0):  # type: ignore[arg-type]
            found["plans x 4"] = deviation(bundle, working, HERE, bundle.steps, rollouts)[0]
    if "images" in names:
        random = torch.Generator().manual_seed(0)
        fields = torch.cat([solve(bundle, altered(image, random)) for _ in range(rollouts)])
        found["images"] = fields.var(0).sum(0).sqrt()
    if "inverse" in names:
        back = solve(bundle, image.flip(0))
        found["inverse"] = compose(back, field, bundle.task.warp)[0].norm(dim=0)  # type: ignore[operator, arg-type]
    if "length" in names:
        found["length"] = field[0].norm(dim=0)
    return found


@torch.no_grad()
def solve(bundle: PolicyBundle, image: Tensor) -> Tensor:
    """Return the policy's field, (1, d, *grid) in voxels, of images (2, *grid)."""
    *_, last = bundle.trajectory(image[None], bundle.steps)
    return bundle.task.output(last).cpu()


def boundary(region: np.ndarray) -> np.ndarray:
    """Return the voxels of a region that have a neighbour outside it."""
    inside: np.ndarray = np.asarray(distance_transform_edt(region)) == 1
    return inside


def surface_error(field: Tensor, label: Tensor) -> Tensor:
    """Distance in mm to the fixed boundary at the boundary voxels of the moved labels, (*grid); NaN elsewhere."""
    moved = sample(label[1:], identity_grid(label.shape[1:]).float() + field[0], mode="nearest", outside="zeros")[0]
    error = np.full(label.shape[1:], np.nan)
    for value in torch.unique(label[0])[1:]:
        rim = boundary((moved == value).numpy())
        distance = np.asarray(distance_transform_edt(~boundary((label[0] == value).numpy())))
        error[rim] = distance[rim]
    return torch.from_numpy(error)


def synthetic(working: WorkingPair, seed: int) -> tuple[WorkingPair, Tensor]:
    """Return the fixed image with its own deformed self as the moving one, and the true displacement (d, *grid)."""
    random = torch.Generator().manual_seed(seed)
    fixed = working.image.as_tensor()[:1]
    shape = fixed.shape[1:]
    coarse = 3.0 * torch.randn(1, len(shape), *[max(4, n // 10) for n in shape], generator=random)
    v = F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0]  # moving(y) = fixed(y + v(y))
    at = identity_grid(shape).float()
    moving = sample(fixed, at + v) + 0.02 * torch.randn(fixed.shape, generator=random)
    truth = torch.zeros_like(v)
    for _ in range(40):  # x + u + v(x + u) = x
        truth = 0.5 * truth - 0.5 * sample(v, at + truth)
    image = MetaTensor(torch.cat([fixed, moving.clamp(0, 1)]), affine=working.image.affine)
    return replace(working, image=image, seen=None, structures=None), truth


def measured(arguments: argparse.Namespace) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Yield (real or synthetic, claim, what it claims, the error) of every pair, a value a voxel."""
    bundle = PolicyBundle(ckpt=arguments.ckpt)
    dice = []
    for number, row in enumerate(read_pairs(arguments.pairs)):
        names = arguments.claims if number % arguments.every == 0 else ["plans"]
        pair = Pair.read(**row)
        given = GivenPair(bundle, pair.fixed, pair.moving, pair.fixed_label, pair.moving_label)
        working = given.onto_fixed(HERE)
        assert working.label is not None
        field = solve(bundle, working.image.as_tensor())
        moved = bundle.task.warp_label(working.label[None, 1:].float(), field)  # type: ignore[operator]
        dice.append(float(mean_label_dice(moved.round(), working.label[None, :1])))
        error = surface_error(field, working.label)
        there = ~error.isnan()
        for name, claim in claims(bundle, working, field, names, arguments.rollouts).items():
            yield "real", name, claim[there].numpy(), error[there].numpy()
        if number % arguments.every == 0:
            made, truth = synthetic(working, number)
            field = solve(bundle, made.image.as_tensor())
            error = (field[0] - truth).norm(dim=0)
            labelled = F.max_pool3d((working.label[:1] > 0).float()[None], 7, 1, 3)[0, 0] > 0
            for name, claim in claims(bundle, made, field, names, arguments.rollouts).items():
                yield "synthetic", name, claim[labelled].numpy(), error[labelled].numpy()
    print(f"mean Dice of {len(dice)} pairs: {np.mean(dice):.3f}")


def main() -> None:
    """Print the rank correlations, write them as a table, and plot the error against the deviation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="CSV with fixed,moving,fixed_label,moving_label")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ckpt", help="weights; by default the bundle's")
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=CLAIMS)
    parser.add_argument("--every", type=int, default=5, help="of every Nth pair all claims, and a synthetic one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for kind, name, claim, error in measured(arguments):
        found.setdefault((kind, name), []).append((claim, error))
    print(f"{date.today()}, {arguments.rollouts} rollouts, {time.process_time() - started:.0f} CPU s")
    head = ["error", "claim", "pairs", "within a pair", "pooled", "lowest tenth", "highest tenth", "median claim"]
    rows: list[list[Any]] = []
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for (kind, name), pairs in found.items():
        within = np.mean([spearmanr(*values).statistic for values in pairs])
        claim, error = (np.concatenate([values[i] for values in pairs]) for i in (0, 1))
        tenths = np.array_split(np.argsort(claim, kind="stable"), 10)
        means = [(claim[i].mean(), error[i].mean()) for i in tenths]
        rows.append(
            [kind, name, len(pairs), f"{within:.2f}", f"{spearmanr(claim, error).statistic:.2f}", f"{means[0][1]:.2f}",
             f"{means[-1][1]:.2f}", f"{np.median(claim):.3f}"]
        )  # fmt: skip
        axis = axes[0 if kind == "real" else 1]
        axis.plot(np.arange(1, 11), [mean for _, mean in means], marker="o", markersize=3, label=name)
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(map(str, row)) + " |")
    with open(arguments.output / "calibration.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    for axis, title in zip(axes, ("real pairs: label boundaries", "known deformation"), strict=True):
        axis.set(xlabel="tenth of the voxels, by what is claimed", ylabel="mean error, mm", title=title, ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(arguments.output / "calibration.png", dpi=130)


if __name__ == "__main__":
    main()
