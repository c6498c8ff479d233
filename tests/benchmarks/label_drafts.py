"""Measure drafts of labels: python label_drafts.py Task04_Hippocampus OUT drafts|train|curve [MINUTES] [START]

The studies are 40 cases: the 20 of ``validation_pairs.csv``, whose labels the shipped weights have not seen, and 20 of
the others, every ninth, which are the labelled ones. ``drafts`` measures Dice with 1, 3 and 5 atlases and the shipped
weights, ``train`` trains on these studies and measures again, ``curve`` labels one of 14 unseen cases after another.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import time
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from monai_rl_reg import Registrar
from monai_rl_reg.atlases import Case, CommonSpace
from monai_rl_reg.fusion import disagreement
from monai_rl_reg.label_propagation import LabelPropagation, Vote, fuse_votes
from monai_rl_reg.label_training import Weights, train
from monai_rl_reg.metrics import mean_label_dice
from monai_rl_reg.nifti import read_image

NAMES = {"anterior": 1, "posterior": 2}
COUNTS = (1, 3, 5)
ATLASES = 3
LABELLED = 8
SEEDS = 3
POOL = 14


def studies(folder: Path) -> tuple[list[Case], list[Case]]:
    """Return the cases that training has seen and those that it has not."""
    with open(folder / "validation_pairs.csv", newline="", encoding="utf-8") as file:
        unseen = sorted({Path(row[role]).name for row in csv.DictReader(file) for role in ("fixed", "moving")})
    seen = sorted({path.name for path in (folder / "imagesTr").glob("*.nii.gz")} - set(unseen))[::9]

    def cases(names: list[str]) -> list[Case]:
        return [Case(n.split(".")[0], str(folder / "imagesTr" / n), str(folder / "labelsTr" / n)) for n in names]

    return cases(seen), cases(unseen)


def dice(target: Case, votes: list[Vote]) -> float:
    """Mean Dice of a draft over both labels."""
    truth = target.read_label(read_image(target.image), NAMES).as_tensor()[None].int()
    return float(mean_label_dice(fuse_votes(votes).as_tensor()[None].int(), truth))


def drafts(propagation: LabelPropagation, atlases: list[Case], targets: list[Case]) -> dict[str, float]:
    """Return mean and smallest Dice for every number of atlases."""
    found: dict[int, list[float]] = {count: [] for count in COUNTS}
    for target in targets:
        chosen = propagation.choose(target.image, atlases, max(COUNTS), NAMES)
        votes = [propagation.vote(target.image, case, NAMES)[0] for case, _ in chosen]
        for count in COUNTS:
            found[count].append(dice(target, votes[:count]))
    figures = {f"dice_{count}": round(float(np.mean(values)), 4) for count, values in found.items()}
    return figures | {f"least_{count}": round(min(values), 4) for count, values in found.items()}


def seconds(propagation: LabelPropagation, atlases: list[Case], targets: list[Case]) -> dict[str, float]:
    """Return wall and CPU seconds a draft, the affine transform of the image known."""
    figures = {}
    for count in COUNTS:
        wall, cpu = time.monotonic(), time.process_time()
        for target in targets:
            propagation.draft(target.image, atlases, NAMES, count=count)
        figures[f"wall_{count}"] = round((time.monotonic() - wall) / len(targets), 2)
        figures[f"cpu_{count}"] = round((time.process_time() - cpu) / len(targets), 2)
    return figures


def curve(propagation: LabelPropagation, cases: list[Case], output: Path) -> None:
    """Label one case after another, by the strategy and at random, and plot the Dice of all other cases' drafts."""
    by_name = {case.name: case for case in cases}

    @cache
    def vote(target: str, atlas: str) -> Vote:
        return propagation.vote(by_name[target].image, by_name[atlas], NAMES)[0]

    def votes(target: str, labelled: list[str]) -> list[Vote]:
        known = [by_name[name] for name in labelled]
        return [vote(target, case.name) for case, _ in propagation.choose(by_name[target].image, known, ATLASES, NAMES)]

    def doubt(target: str, labelled: list[str]) -> float:
        if len(labelled) < 2:  # the app takes the uncertainty then
            return propagation.doubt(by_name[target].image, [by_name[name] for name in labelled], NAMES)
        return disagreement([vote.moved_label for vote in votes(target, labelled)])

    curves: dict[str, list[list[float]]] = {"registration_disagreement": [], "random": []}
    for seed in range(SEEDS):
        for strategy, found in curves.items():
            draw = random.Random(seed)
            labelled, row = [draw.choice(sorted(by_name))], []
            while len(labelled) <= LABELLED:
                rest = [name for name in sorted(by_name) if name not in labelled]
                row.append(float(np.mean([dice(by_name[name], votes(name, labelled)) for name in rest])))
                if strategy == "random":
                    labelled.append(draw.choice(rest))
                else:
                    labelled.append(max(rest, key=lambda name: doubt(name, labelled)))
            found.append(row)
    figure, axis = plt.subplots(figsize=(5, 3.2), constrained_layout=True)
    for strategy, rows in curves.items():
        mean, spread = np.mean(rows, 0), np.std(rows, 0)
        print(strategy, " ".join(f"{i}:{a:.4f}+-{b:.4f}" for i, (a, b) in enumerate(zip(mean, spread, strict=True), 1)))
        at = np.arange(1, len(mean) + 1)
        axis.plot(at, mean, marker="o", markersize=3, label=strategy)
        axis.fill_between(at, mean - spread, mean + spread, alpha=0.2)
    axis.set(xlabel="labelled cases", ylabel="mean Dice of the other drafts")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(output / "label_curve.png", dpi=110)


def main(folder: str, output: str, what: str, minutes: str = "2", start: str = "shipped") -> None:
    """Measure, and print the figures."""
    out = Path(output)
    out.mkdir(parents=True, exist_ok=True)
    seen, unseen = studies(Path(folder))
    space, weights = CommonSpace(out / "affines.json"), Weights(out / "weights")
    propagation = LabelPropagation(Registrar(), space)
    if what == "drafts":
        print("unseen", json.dumps(drafts(propagation, seen, unseen)))
        print("seen", json.dumps(drafts(propagation, seen, seen)))
        print("seconds", json.dumps(seconds(propagation, seen, unseen[:5])))
    elif what == "train":
        unlabelled = [Case(case.name, case.image) for case in unseen]
        stats = train([*seen, *unlabelled], NAMES, weights, minutes=float(minutes), start=start)
        print("training", json.dumps({key: stats[key] for key in ("start", "epoch", "metrics_before", "best_metric")}))
        trained = LabelPropagation(Registrar(ckpt=weights.path()), space)
        print("unseen, trained", json.dumps(drafts(trained, seen, unseen)))
    else:
        curve(propagation, unseen[:POOL], out)


if __name__ == "__main__":
    main(*sys.argv[1:])
