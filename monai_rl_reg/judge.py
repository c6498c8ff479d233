"""The judge of a registration without labels: what Dice to expect of it, and between which bounds.

Similarity says little of how well structures agree. Networks that see the structures in each image say more: a
*witness* looks at both images, and how well what it sees agrees after the registration, the seen Dice, goes with the
true Dice. It is not the true Dice: a witness errs, and a policy that sees by the same networks fits their errors. So
the judge keeps, of registrations whose true Dice is known, the seen and the true one, and answers with those nearest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from monai_rl_reg.anatomy import Anatomy
from monai_rl_reg.checkpoints import fill_weights, load_checkpoint, part
from monai_rl_reg.data import read_pairs
from monai_rl_reg.errors import InputError
from monai_rl_reg.files import check_writable, replacing
from monai_rl_reg.nifti import read_image

LEAST_STEPS = 5
"""Of a registration that teaches: early steps are what failures look like."""
NEAREST = 50
"""Known registrations that answer for one whose Dice is not known."""
BOUNDS = (0.05, 0.95)
"""Quantiles of their true Dice that the range is made of."""
WIDER = 1.7
"""How much wider the range is than these: pairs of the same few images are more alike than other people's. Taught by
ten hippocampus images, the quantiles held 0.70 to 0.75 of the pairs of ten others; 1.7 times as far
from the mean they held 0.90 to 0.92 (``tests/benchmarks/judge.py``)."""


@dataclass(frozen=True)
class Expected:
    """What Dice to expect: the mean of the nearest known ones, made to rise, and a range that holds nine of ten."""

    dice: float
    low: float
    high: float


class Judge(nn.Module):
    """A witness, where the policy has none of its own, and the known registrations.

    Args:
        seen: seen Dice of the known registrations, (N,).
        true: their true Dice, (N,).
        witness: sees the structures; None leaves that to the policy's own anatomy.
    """

    def __init__(self, seen: Tensor, true: Tensor, witness: Anatomy | None = None) -> None:
        super().__init__()
        order = seen.argsort()
        self.seen: Tensor
        self.true: Tensor
        self.register_buffer("seen", seen[order].float())
        self.register_buffer("true", true[order].float())
        means = torch.stack([self.true[self._nearest(x)].mean() for x in self.seen.tolist()])
        # late steps go on fitting what the witness sees, and the means fall again: so halfway between the lowest curve
        # above them that never falls and the highest one below
        rising = (means.cummax(0).values + means.flip(0).cummin(0).values.flip(0)) / 2
        self.expected: Tensor
        self.register_buffer("expected", rising, persistent=False)
        self.witness = witness

    def expect(self, seen: float) -> Expected:
        """Return what Dice to expect of a registration with this seen Dice; never less than with a lower one."""
        mean = self.expected[(self.seen - seen).abs().argmin()]
        nearest = self.true[self._nearest(seen)]
        bounds = nearest.quantile(self.true.new_tensor(BOUNDS)) - nearest.mean()
        low, high = (mean + WIDER * bounds).clamp(0, 1).tolist()
        return Expected(float(mean), low, high)

    def _nearest(self, seen: float) -> Tensor:
        return (self.seen - seen).abs().argsort(stable=True)[:NEAREST]

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it; the witness's weights in half precision."""
        found: dict[str, Any] = {"seen": self.seen, "true": self.true}
        if self.witness is not None:
            found["witness"] = _halved(self.witness.state_dict())
        return found


def load_judge(path: str, spatial_dims: int) -> Judge | None:
    """Return the judge that a checkpoint holds, or None where :func:`calibrate` has not put one there.

    Raises:
        InputError: if the file is no checkpoint.
    """
    if not Path(path).is_file():  # a bundle may do without weights
        return None
    saved = load_checkpoint(path).get("judge")
    if saved is None:
        return None
    witness = _witness(saved["witness"], path, spatial_dims) if "witness" in saved else None
    return Judge(saved["seen"], saved["true"], witness)


def _halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[int, Tensor] = {}  # a U-Net names some weights twice; what is shared a file keeps once
    for value in weights.values():
        made.setdefault(value.data_ptr(), value.half() if value.is_floating_point() else value)
    return {key: made[value.data_ptr()] for key, value in weights.items()}


def _witness(weights: dict[str, Tensor], path: str, spatial_dims: int) -> Anatomy:
    anatomy = Anatomy(spatial_dims, int(weights["structures"]))
    fill_weights(anatomy, weights, path)
    return anatomy.eval()


def calibrate(
    pairs: str | Path | Sequence[Any],
    ckpt: str,
    *,
    witness: str | None = None,
    bundle: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Judge:
    """Give a checkpoint its judge: register pairs with known labels, and keep seen and true Dice after every step.

    Args:
        pairs: CSV with the columns ``fixed,moving,fixed_label,moving_label``, or its rows as dictionaries; of images
            that no training saw.
        ckpt: the policy's weights; the file gets the judge beside them.
        witness: checkpoint of a training with labels, or of its network that sees structures, which bears witness. By
            default the policy's own does, where it was trained with labels.
        bundle: folder of the bundle; by default the package's ``rl_reg``.
        device: where to compute.
        progress: show a progress bar.

    Raises:
        InputError: if a pair has no labels, there are too few, or neither checkpoint sees structures.
    """
    from monai_rl_reg.registration import Registrar  # which asks the judge
    from monai_rl_reg.request import Options, Pair

    rows = read_pairs(pairs) if isinstance(pairs, str | Path) else list(pairs)
    registrar = Registrar(bundle=bundle, ckpt=ckpt, device=device)
    dimensions = read_image(rows[0]["fixed"], spatial_dims=None).ndim - 1
    policy = registrar.bundle(dimensions)
    bears = None if policy.judge is None else policy.judge.witness
    policy.judge = None
    if witness is not None:
        weights = part(load_checkpoint(witness), "anatomy")
        if "structures" not in weights:
            raise InputError(f"witness {witness}: expected weights of a training with labels, found others")
        policy.witness = bears = _witness(_halved(weights), witness, dimensions).to(policy.device)  # as kept
    elif policy.witness is None:
        raise InputError(
            f"checkpoint {ckpt}: expected one that sees structures, or a witness that does (--witness FILE), found none"
        )
    check_writable(Path(os.path.realpath(ckpt)).parent)  # before the work
    for row in rows:
        missing = [key for key in ("fixed_label", "moving_label") if not row.get(key)]
        if missing:
            raise InputError(f"pair of {row['fixed']}: expected labels of both images, found no {missing[0]}")
    limit = max(policy.steps, LEAST_STEPS)
    if len(rows) * (limit + 1) < NEAREST:
        raise InputError(f"calibration: expected at least {-(-NEAREST // (limit + 1))} pairs, found {len(rows)}")
    seen, true = [], []
    for row in tqdm(rows, desc="calibrating", unit="pair", disable=not progress, dynamic_ncols=True):
        pair = Pair.read(**{key: row[key] for key in ("fixed", "moving", "fixed_label", "moving_label")})
        options = Options(limit, inverse=False)
        for step in registrar.register(pair, options).curve:
            if "dice" not in step:
                raise InputError(f"pair of {row['fixed']}: expected labels that show at the policy's voxel size")
            seen.append(step["seen_dice"])
            true.append(step["dice"])
    judge = Judge(torch.tensor(seen), torch.tensor(true), bears)
    checkpoint = load_checkpoint(ckpt)
    kept = checkpoint if "network" in checkpoint else {"network": checkpoint}
    with replacing(Path(os.path.realpath(ckpt))) as temporary:
        torch.save(kept | {"judge": judge.saved()}, temporary)
    return judge
