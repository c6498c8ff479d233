"""How well is the true Dice told without labels?

    python tests/benchmarks/judge.py pairs.csv --ckpt model.pt [--witness with_labels.pt] --output judge

The images and labels of the pairs are paired anew, within each half of the images: one half teaches the judge, the
other one tests it. Of the other half's registrations, after every step: the rank correlation of the true Dice with the
expected Dice, with the seen Dice that it comes from and with the similarity; the area under the ROC curve for finding
those under a Dice of 0.65; and the share of true Dice within the expected range of 90 %.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata, spearmanr

from monai_rl_reg.data import read_pairs
from monai_rl_reg.judge import calibrate, load_judge
from monai_rl_reg.registration import Registrar
from monai_rl_reg.request import Options, Pair

POOR = 0.65


def halves(rows: list[dict[str, str]], count: int) -> list[list[dict[str, str]]]:
    """Return ``count`` pairs among the first half of the images, and as many among the second."""
    label = {row[role]: row[f"{role}_label"] for row in rows for role in ("fixed", "moving")}
    names = sorted(label)
    random = np.random.default_rng(0)
    parts = []
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        pairs = random.permutation(list(permutations(part, 2)))[:count]
        parts.append(
            [{"fixed": f, "moving": m, "fixed_label": label[f], "moving_label": label[m]} for f, m in pairs.tolist()]
        )
    return parts


def area_under_curve(score: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve: how often a positive one has the higher score."""
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--witness")
    parser.add_argument("--count", type=int, default=90, help="most pairs of each half")
    parser.add_argument("--output", default="judge")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teach, test = halves(read_pairs(args.pairs), args.count)
    print(f"{len(teach)} pairs teach, {len(test)} test")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        ckpt = str(shutil.copy(args.ckpt, Path(folder) / "model.pt"))
        calibrate(teach, ckpt, witness=args.witness, progress=True)
        judge = load_judge(ckpt, 3)
        assert judge is not None
        registrar = Registrar(ckpt=ckpt)
        rows = []
        for row in test:
            pair = Pair.read(**{key: row[key] for key in ("fixed", "moving", "fixed_label", "moving_label")})
            result = registrar.register(pair, Options(inverse=False))
            for step, figures in enumerate(result.curve):
                expected = judge.expect(figures["seen_dice"])
                rows.append(figures | {"step": step, "pair": f"{row['fixed']} {row['moving']}"})
                rows[-1] |= {"expected": expected.dice, "low": expected.low, "high": expected.high}
    table = pd.DataFrame(rows)
    table.to_csv(output / "judge.csv", index=False)
    similarity = result.quality["similarity"]
    lines = [
        "| registrations | n | under 0.65 | measure | rank correlation | area under the curve |",
        "|" + " --- |" * 6,
    ]
    for name, part in (("after every step", table), ("after the last", table[table.step == table.step.max()])):
        poor = (part.dice < POOR).to_numpy()
        for measure in ("expected", "seen_dice", similarity):
            rank = spearmanr(part.dice, part[measure])[0]
            area = area_under_curve(-part[measure].to_numpy(), poor)
            lines.append(f"| {name} | {len(part)} | {poor.sum()} | {measure} | {rank:.3f} | {area:.3f} |")
        inside = ((part.low <= part.dice) & (part.dice <= part.high)).mean()
        error = (part.expected - part.dice).abs().mean()
        lines.append(f"| {name} | {len(part)} | | within the range: {inside:.3f} | mean error {error:.3f} | |")
    (output / "judge.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
