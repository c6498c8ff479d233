"""MR to ultrasound of the prostate, by cross validation: python prostate.py FOLDER --output OUT

FOLDER is laid out as DeepReg's test data: mr_images, us_images, mr_labels, us_labels with files of the same names; the
labels have the prostate alone, or in channels the prostate and then landmarks, in the same order in both. Ultrasound is
fixed, and the pair begins with the centres of both grids on each other. Labels of held-out cases only measure.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import run
from torch import Tensor

from monai_rl_reg.affine import align
from monai_rl_reg.finishing import Correspondence
from monai_rl_reg.geometry import reduced, transform_points
from monai_rl_reg.metrics import folded_percent, label_dice
from monai_rl_reg.policy_bundle import DEFAULT_BUNDLE, PolicyBundle
from monai_rl_reg.request import Pair
from monai_rl_reg.working import GivenPair

CONFIGS = DEFAULT_BUNDLE / "configs"
PIXDIM = [0.8, 0.8, 0.8]
"""Half the resolution that the images have by their headers (0.4): a small model, trained in minutes."""
COMMON: dict[str, Any] = {
    "align": "centre",
    "amp": False,  # at this size the gradient of a convolution in bfloat16 was seen to be NaN on a CPU
    "pixdim": PIXDIM,
    "image_size": [32, 32, 32],
    "smoothness_weight": 0.3,
    "fold_weight": 10.0,
    "reinforcement": False,
}
SEEN = "policy, prostate seen"
"""It goes by a U-Net that first learns the prostate in ultrasound and in MR alike."""
POLICIES: dict[str, dict[str, Any]] = {
    "policy, local NCC": {},
    "policy, mutual information": {"similarity::_target_": "monai_rl_reg.similarity.MutualInformation"},
    "policy, MIND": {"similarity::_target_": "monai_rl_reg.similarity.MIND"},
    "policy, MIND and labels in training": {
        "similarity::_target_": "monai_rl_reg.similarity.MIND",
        "similarity_weight": 0.1,
        "dice_weight": 1.0,
    },
    SEEN: {
        "similarity::_target_": "monai_rl_reg.similarity.MIND",
        "smoothness_weight": 0.1,
        "batch_size": 2,
        "updates": 2,
    },
}
METHODS = ["centres", "rigid and affine, mutual information", *POLICIES]


@dataclass
class Case:
    """A pair, its landmarks in world coordinates (3, N), and the transform that brings the centres together."""

    name: str
    files: list[str]
    pair: Pair
    landmarks: tuple[Tensor, Tensor]
    centres: Tensor


def read_cases(folder: Path, output: Path) -> list[Case]:
    """Read all cases; the prostate's channel of each label goes to a file of its own."""
    cases = []
    for path in sorted((folder / "us_images").glob("*.nii.gz")):
        files, points = {}, []
        for role, kind in (("fixed", "us"), ("moving", "mr")):
            label: Any = nib.load(folder / f"{kind}_labels" / path.name)
            volume = np.asarray(label.dataobj) > 0.5
            channels = volume[..., None] if volume.ndim == 3 else volume
            files[role] = str((folder / f"{kind}_images" / path.name).resolve())
            files[f"{role}_label"] = str((output / f"{kind}_{path.name}").resolve())
            nib.save(nib.Nifti1Image(channels[..., 0].astype(np.uint8), label.affine), files[f"{role}_label"])
            centres = [np.argwhere(channels[..., i]).mean(0) for i in range(1, channels.shape[-1])]
            index = torch.tensor(np.array(centres).reshape(-1, 3)).T
            points.append(transform_points(torch.tensor(label.affine), index))
        pair = Pair.read(**files)
        middle = [
            transform_points(
                reduced(image.affine.double(), 3), torch.tensor(image.shape[1:]).double()[:, None] / 2 - 0.5
            )
            for image in (pair.fixed, pair.moving)
        ]
        centring = torch.eye(4, dtype=torch.float64)
        centring[:3, 3] = (middle[1] - middle[0]).flatten()
        cases.append(Case(path.name.split(".")[0], [*files.values()], pair, (points[0], points[1]), centring))
    return cases


def file_name(method: str) -> str:
    """Return a method's name as part of a file's."""
    return method.replace(",", "").replace(" ", "_")


def measure(case: Case, bundle: PolicyBundle, initial: Tensor, solve: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Return the figures of a case, registered by ``solve``: images (1, 2, *grid) to the field (1, 3, *grid)."""
    pair, started = case.pair, time.process_time()
    working = GivenPair(bundle, pair.fixed, pair.moving).onto_fixed(initial)
    field = solve(working.image.as_tensor()[None])
    seconds = time.process_time() - started
    way = Correspondence.on_fixed_grid(field[0].detach(), working.image.affine, initial, pair.fixed)
    assert pair.moving_label is not None
    assert pair.fixed_label is not None
    moved = way.move(pair.moving_label, nearest=True)
    dice = label_dice(moved.as_tensor()[None], pair.fixed_label.as_tensor()[None])[0, 0]
    off = torch.tensor(torch.nan)
    if case.landmarks[0].numel():
        off = (way.forth(case.landmarks[0]) - case.landmarks[1]).norm(dim=0) / pair.fixed.affine[:3, 0].norm()
    folded = folded_percent(field.detach())[0]
    return {"dice": float(dice), "landmarks": float(off.mean()), "folded": float(folded), "seconds": seconds}


def bundle_of(name: str, output: Path, ckpt: Path) -> PolicyBundle:
    """Return a bundle whose inference.json has the settings of the training."""
    folder = output / file_name(name)
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    config = json.loads((CONFIGS / "inference.json").read_text())
    config["pixdim"] = PIXDIM
    config["similarity"]["_target_"] = POLICIES[name].get("similarity::_target_", config["similarity"]["_target_"])
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    return PolicyBundle(folder, ckpt=ckpt)


def train(name: str, cases: list[Case], fold: int, arguments: argparse.Namespace) -> Path:
    """Train a policy on the cases that are not of this fold; return its last weights."""
    output = arguments.output / f"{file_name(name)}_{fold}"
    for part, inside in (("train", False), ("held_out", True)):
        with open(f"{output}_{part}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["fixed", "fixed_label", "moving", "moving_label"])
            for i, case in enumerate(cases):
                if (i % arguments.folds == fold) == inside:
                    writer.writerow(case.files)
    started = time.process_time()
    epochs = max(1, arguments.iterations // 50)
    common: dict[str, Any] = COMMON | {
        "bundle_root": str(DEFAULT_BUNDLE),
        "pairs": f"{output}_train.csv",
        "val_pairs": f"{output}_held_out.csv",
        "max_epochs": epochs,
        "val_interval": epochs,  # only the last: its weights are taken, not the best: the held-out cases choose nothing
        "epoch_length": min(50, arguments.iterations),
    }
    configs, settings = [str(CONFIGS / "train.json")], common | POLICIES[name]
    if name == SEEN:
        configs.append(str(CONFIGS / "with_labels.json"))
        seeing = f"{output}_seeing"
        learning = common | {"batch_size": 4, "learning_rate": 0.002}  # as the documented figures were measured
        run(run_id="training", config_file=[*configs, str(CONFIGS / "anatomy.json")], output_dir=seeing, **learning)
        settings["anatomy_ckpt"] = f"{seeing}/checkpoint_final.pt"
    run(run_id="training", config_file=configs, output_dir=str(output), **settings)
    print(f"{name}, fold {fold}: trained for {time.process_time() - started:.0f} CPU s", flush=True)
    return output / "checkpoint_final.pt"


def rows_of(name: str, cases: list[Case], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of every case."""
    if name not in POLICIES:
        plain = PolicyBundle()  # for its preprocessing

        def stay(image: Tensor) -> Tensor:
            return torch.zeros(1, 3, *image.shape[2:])

        for case in cases:
            initial = case.centres
            if name.startswith("rigid"):
                initial = align(case.pair.fixed, case.pair.moving, one_modality=False).transform
            yield {"case": case.name} | measure(case, plain, initial, stay)
        return
    for fold in range(arguments.folds):
        bundle = bundle_of(name, arguments.output, train(name, cases, fold, arguments))
        for case in cases[fold :: arguments.folds]:

            def policy(image: Tensor, bundle: PolicyBundle = bundle) -> Tensor:
                *_, last = bundle.trajectory(image, bundle.steps)
                return bundle.task.output(last)

            yield {"case": case.name} | measure(case, bundle, case.centres, policy)


def main() -> None:
    """Measure each method on all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=300, help="of each training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    cases = read_cases(arguments.folder, arguments.output)
    print(f"{date.today()}, {len(cases)} cases, {sum(case.landmarks[0].shape[1] for case in cases)} landmarks")
    print("| method | Dice | deviation | lowest | landmarks, voxels | folded, % | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.methods:
        rows = list(rows_of(name, cases, arguments))
        with open(arguments.output / f"{file_name(name)}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        dice = np.array([row["dice"] for row in rows])
        mean = {key: np.nanmean([row[key] for row in rows]) for key in ("landmarks", "folded", "seconds")}
        print(
            f"| {name} | {dice.mean():.3f} | {dice.std():.3f} | {dice.min():.3f} | {mean['landmarks']:.2f} "
            f"| {mean['folded']:.3f} | {mean['seconds']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
