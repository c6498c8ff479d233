"""The policy's steps on one pair: taken, stopped when they gain no more, refined, repeated with sampled plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monai_rl_reg.geometry import WorldTransform, voxels_to_millimetres
from monai_rl_reg.metrics import mean_label_dice
from monai_rl_reg.policy_bundle import PolicyBundle
from monai_rl_reg.quality import LEAST_SEEN
from monai_rl_reg.refinement import PROXIMITY, refine
from monai_rl_reg.tasks.task import State
from monai_rl_reg.warping import Warp
from monai_rl_reg.working import WorkingPair

WORTH = 5e-3
"""Dice, or similarity where there were no labels in training, that the critic must expect the steps to come to gain."""
GAIN = 5e-3
"""Dice of seen structures that a step must gain for another one to follow, when the steps stop by themselves."""


@dataclass(frozen=True)
class Steps:
    """What the steps came to.

    Attributes:
        history: displacement (d, *working) in working voxels after 0, 1, ... steps, then after the refinement.
        curve: the similarity of each under its name and, with labels, ``dice``; if the policy or its judge's witness
            sees structures, ``seen_dice``, by what it saw in each of the two images by itself.
        taken: number of steps.
        refinement: its figures, if there was one.
    """

    history: list[Tensor]
    curve: list[dict[str, float]]
    taken: int
    refinement: dict[str, Any] | None = None


@torch.no_grad()
def take_steps(
    bundle: PolicyBundle,
    working: WorkingPair,
    limit: int | str,
    *,
    refine_seconds: float = 0.0,
    tick: Callable[[], object] = lambda: None,
) -> Steps:
    """Let the policy take its steps, and refine their result.

    Args:
        bundle: policy and task.
        working: the pair.
        limit: number of steps; ``auto`` stops, at the latest after twice the bundle's number: where structures are seen
            by :func:`enough`; where not, before a step from which on the bundle's critic expects less than
            :data:`WORTH`, or without a critic by :func:`enough` again, and then steps that led to less similarity than
            there was before the first are all taken back.
        refine_seconds: most wall time of the refinement; 0 for none.
        tick: called after each step.
    """
    maps = {"dice": working.label, "seen_dice": working.seen}
    labels = {key: x[None].to(bundle.device) for key, x in maps.items() if x is not None}
    similarity = bundle.similarity
    measure, least = (similarity.name, similarity.gain) if working.seen is None else ("seen_dice", GAIN)
    warp = Warp("nearest", "border")
    history: list[Tensor] = []
    curve: list[dict[str, float]] = []
    state: State = {}

    def note(now: State) -> None:
        field = bundle.task.output(now)
        history.append(field[0].cpu())
        curve.append({similarity.name: float(similarity(now["moved"], now["fixed"]))})
        for key, label in labels.items():
            moved = label[:, 1:].float()
            moved = warp(moved, field).round() if len(curve) > 1 else moved  # nothing has moved before
            curve[-1][key] = float(mean_label_dice(moved, label[:, :1]).nan_to_num(0.0))

    most = 2 * bundle.steps
    by_critic = limit == "auto" and working.seen is None and bundle.critic is not None
    # one more than may be taken, for the last one comes settled: whether it is to be is decided here
    count = most + 1 if limit == "auto" else int(limit)
    for state in _trajectory(bundle, working, count, worth=WORTH if by_critic else None):
        note(state)
        taken = len(history) - 1
        if taken == 0:
            start = state
            continue
        tick()
        if limit == "auto" and (taken == most or (not by_critic and enough(curve, measure, least))):
            break
    taken = len(history) - 1
    if limit == "auto" and taken > 0:
        if not by_critic and working.seen is None and curve[-1][measure] < curve[0][measure]:
            state, history, curve = start, history[:1], curve[:1]
        else:
            state = bundle.task.settle(state, taken)
            del history[-1], curve[-1]
            note(state)
    taken, figures = len(history) - 1, None
    if refine_seconds > 0:
        proximity = PROXIMITY if bundle.sees else 0.0
        task = bundle.refinement_task
        refined = refine(task, state, bundle.network, seconds=refine_seconds, proximity=proximity)
        note(refined.state)
        figures = {"loss_before": refined.loss_before, "loss_after": refined.loss_after}
        figures |= {"iterations": refined.iterations, "seconds": round(refined.seconds, 3)}
    return Steps(history, curve, taken, figures)


def enough(curve: Sequence[Mapping[str, float]], measure: str, least: float) -> bool:
    """Return whether the last step gained so little that another one is not worth its time.

    Structures that are seen must agree by :data:`~monai_rl_reg.quality.LEAST_SEEN` besides: a pair that begins far
    apart gains little in its first steps. Of the similarity the last two steps count together: one that lost may be
    made good by the next.

    Args:
        curve: of :class:`Steps`, after at least one step.
        measure: what is to gain: ``seen_dice``, or the similarity's name where nothing is seen.
        least: by how much.
    """
    now = curve[-1][measure]
    if measure == "seen_dice":
        return now - curve[-2][measure] < least and now >= LEAST_SEEN
    return now - curve[max(0, len(curve) - 3)][measure] < least


def _trajectory(bundle: PolicyBundle, working: WorkingPair, steps: int, **options: Any) -> Iterator[State]:
    structures = None if working.structures is None else working.structures[None]
    return bundle.trajectory(working.image.as_tensor()[None], steps, structures=structures, **options)


@torch.no_grad()
def deviation(
    bundle: PolicyBundle, working: WorkingPair, initial: WorldTransform, steps: int, rollouts: int, *, seed: int = 0
) -> Tensor:
    """Return how far the displacement varies between rollouts of sampled plans, (1, *working), in millimetres.

    The square root of the summed variances of its components.

    Args:
        bundle: policy and task.
        working: the pair.
        initial: what the displacement is followed by; if linear it is allowed for.
        steps: of each rollout.
        rollouts: at least 2.
        seed: of the plans; the caller's random state stays as it is.
    """
    affine = working.image.affine.double()
    linear = initial @ affine if isinstance(initial, Tensor) else affine
    mean: Tensor | None = None
    squares = torch.zeros(working.image.shape[1:])
    devices = [bundle.device] if bundle.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for count in range(1, rollouts + 1):
            states = _trajectory(bundle, working, steps, sample=True)
            *_, last = states
            field = voxels_to_millimetres(bundle.task.output(last)[0].cpu(), linear)
            if mean is None:
                mean = field
                continue
            off = field - mean
            mean = mean + off / count
            squares += (off * (field - mean)).sum(0)
    return (squares / (rollouts - 1)).sqrt()[None]
