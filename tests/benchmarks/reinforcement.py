"""What reinforcement is worth: the task loss alone against soft actor-critic, at equal time or updates; several seeds.

    python tests/benchmarks/reinforcement.py --dataset_dir Task04_Hippocampus --val_pairs PAIRS.csv --minutes 10 \
      [--anatomy_ckpt bundles/rl_reg/models/model.pt]

Trains ``bundles/rl_reg`` once for each arm and seed (a training that is complete is not run again) and judges the last
policy on the validation pairs: with every fixed number of steps; with the best of K plans of every step, chosen by the
critic or by the similarity, or their mean action; and stopping where critic or similarity promise little. With
``--anatomy_ckpt`` the policies learn from labels, by the structures that these weights see, whose soft Dice takes the
similarity's place. A stop is judged at the threshold with the fewest mean steps among those that reach the Dice of
``--steps`` fixed ones. The thresholds are chosen on the pairs that judge them: a bound on what a stop can give rather
than an estimate. Writes ``reinforcement.csv``, ``reinforcement.md`` and ``reinforcement.png``: predicted against
realised return, and Dice against mean steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager
from datetime import date
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from monai.bundle import ConfigParser  # noqa: E402
from torch import Tensor  # noqa: E402

from monai_rl_reg.convolutions import quick_convolutions  # noqa: E402
from monai_rl_reg.inferer import half_pays  # noqa: E402
from monai_rl_reg.metrics import mean_label_dice  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "bundles" / "rl_reg" / "configs"
ARMS = {"task loss alone": "false", "with reinforcement": "true"}
HORIZON = 8
PLANS = 6


def quick() -> AbstractContextManager[None]:
    """For the networks alone: the fields stay in fp32."""
    return quick_convolutions(torch.device("cpu"), half=half_pays("cpu"))


def configs(options: argparse.Namespace) -> list[str]:
    """Return the bundle's configurations to train by."""
    names = ["train.json"] if options.anatomy_ckpt is None else ["train.json", "with_labels.json"]
    return [str(CONFIGS / name) for name in names]


def train(folder: Path, reinforcement: str, seed: int, options: argparse.Namespace) -> Path:
    """Train one policy in a process of its own, if that has not been done; return its last checkpoint."""
    ckpt = folder / "checkpoint_final.pt"
    if not ckpt.is_file():
        command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(configs(options))]
        settings = dict(setting.split("=", 1) for setting in options.set)
        settings |= {
            "dataset_dir": options.dataset_dir,
            "val_pairs": options.val_pairs,
            "output_dir": str(folder),
            "max_epochs": str(options.epochs),
            "val_interval": "4",
            "reinforcement": reinforcement,
            "seed": str(seed),
            "amp": "@half",
        }
        if options.minutes is not None:
            settings["minutes"] = str(options.minutes)
        if options.anatomy_ckpt is not None:
            settings["anatomy_ckpt"] = options.anatomy_ckpt
        with open(folder.with_suffix(".log"), "w") as log:
            arguments = [x for key, value in settings.items() for x in (f"--{key}", value)]
            subprocess.run([*command, *arguments], stdout=log, stderr=log, check=True)
    return ckpt


class Judge:
    """One trained policy and its critics on the validation pairs."""

    def __init__(self, ckpt: Path, options: argparse.Namespace) -> None:
        parser = ConfigParser()
        parser.read_config(configs(options))
        for key, value in (setting.split("=", 1) for setting in options.set):
            parser[key] = json.loads(value)
        parser["dataset_dir"], parser["val_pairs"] = options.dataset_dir, options.val_pairs
        parser["anatomy_ckpt"] = options.anatomy_ckpt
        parser["device"] = "$torch.device('cpu')"
        parser.get_parsed_content("imports", eval_expr=True)
        self.task = parser.get_parsed_content("task").eval()
        self.loss = parser.get_parsed_content("loss").eval()
        self.loss.load_state_dict(torch.load(ckpt, weights_only=True)["loss"])
        self.policy = self.loss.policy.eval()
        self.data = parser.get_parsed_content("validate::dataset")
        self.steps = options.steps

    def dice(self, state: dict[str, Tensor], label: Tensor) -> float:
        """Return the mean Dice of the moved label."""
        moved = self.task.warp_label(label[:, 1:].float(), self.task.output(state)).round()
        return float(mean_label_dice(moved, label[:, :1]))

    def likeness(self, state: dict[str, Tensor]) -> float:
        """Return the local NCC of the moved image, or the soft Dice of the structures seen."""
        if self.task.anatomy is None:
            return float(self.task.similarity(state["moved"], state["fixed"]))
        moved, fixed = (state[f"{role}_anatomy"].flatten(2) for role in ("moved", "fixed"))
        return float((2 * (moved * fixed).sum(2) / (moved + fixed).sum(2)).mean())

    def value(self, features: list[Tensor], plan: Tensor) -> Tensor:
        """Return the smaller critic's value of plans in one state, by the planner's features there."""
        value: Tensor = self.loss.critic([x.expand(len(plan), *x.shape[1:]) for x in features], plan).amin(1)
        return value

    def pair(self, number: int) -> dict[str, Any]:
        """Return what one pair gives: Dice after every step, values, and the Dice of every choice among plans."""
        item = self.data[number]
        image, label = item["image"].as_tensor()[None], item["label"].as_tensor()[None]
        with quick():
            state = start = self.task.reset(image)
        row: dict[str, Any] = {"dice": [self.dice(start, label)], "likeness": [self.likeness(start)], "value": []}
        for _ in range(HORIZON):
            observation = self.task.observe(state)
            with quick():
                plan, action, features = self.policy.decide(observation)
                row["value"].append(float(self.value(features, plan)[0]))
            state = self.task.advance(state, action)
            row["dice"].append(self.dice(state, label))
            row["likeness"].append(self.likeness(state))
        for choice in ("critic", "likeness", "mean", "random"):
            state = start
            for _ in range(self.steps):
                state = self._choose(choice, state)
            row[f"best by {choice}"] = self.dice(state, label)
        row["spread"] = float(np.std([self._sampled(start, label) for _ in range(PLANS)]))
        return row

    def _choose(self, choice: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        observation = self.task.observe(state)
        with quick():
            drawn = [self.policy.sample(observation) for _ in range(1 if choice == "random" else PLANS)]
        plans, actions = torch.cat([x[0] for x in drawn]), [x[2] for x in drawn]
        after: dict[str, Tensor]
        if choice == "critic":
            with quick():
                best = int(self.value(drawn[0][3], plans).argmax())
            after = self.task.advance(state, actions[best])
        elif choice == "likeness":
            after = max((self.task.advance(state, action) for action in actions), key=self.likeness)
        else:
            after = self.task.advance(state, torch.stack(actions).mean(0))
        return after

    def _sampled(self, state: dict[str, Tensor], label: Tensor) -> float:
        for _ in range(self.steps):
            state = self._choose("random", state)
        return self.dice(state, label)


def stopping(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (mean steps, mean Dice) for every threshold of a stop.

    ``value`` stops before the first step whose value is under the threshold, ``likeness`` after the first that gained
    less; ``oracle`` does so before the first step whose gain in Dice, which nobody knows, will be less.
    """
    dice = np.array([row["dice"] for row in rows])
    if key == "value":
        signal = np.array([row["value"] for row in rows])
    elif key == "likeness":
        gain = np.diff([row["likeness"] for row in rows], axis=1)
        signal = np.concatenate([np.full((len(rows), 1), np.inf), gain[:, :-1]], axis=1)
    else:
        signal = np.diff(dice, axis=1)
    curve = []
    for threshold in np.quantile(signal[np.isfinite(signal)], np.linspace(0, 1, 101)):
        stops = signal < threshold
        taken = np.where(stops.any(1), stops.argmax(1), signal.shape[1])
        curve.append((float(taken.mean()), float(dice[np.arange(len(rows)), taken].mean())))
    return curve


def summary(rows: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Return the figures of one training."""
    dice = np.array([row["dice"] for row in rows]).mean(0)
    figures = {f"Dice after {n}": float(dice[n]) for n in (1, steps, HORIZON)}
    for key in ("value", "likeness", "oracle"):
        enough = [taken for taken, reached in stopping(rows, key) if reached >= dice[steps] - 5e-5]
        figures[f"mean steps, stop by {key}"] = min(enough, default=float("nan"))
    for key in ("critic", "likeness", "mean", "random"):
        figures[f"Dice, plans: {key}"] = float(np.mean([row[f"best by {key}"] for row in rows]))
    figures["deviation of Dice among plans"] = float(np.mean([row["spread"] for row in rows]))
    predicted, realised = returns(rows)
    figures["correlation of value and return"] = float(np.corrcoef(predicted, realised)[0, 1])
    return figures


def returns(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that the critic predicted and the gains in Dice, times 10, until the horizon, of all states."""
    predicted = np.array([row["value"] for row in rows])
    dice = np.array([row["dice"] for row in rows])
    return predicted.ravel(), (10 * (dice[:, -1:] - dice[:, :-1])).ravel()


def plot(found: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Draw the critics' calibration, and Dice against mean steps, of all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, rows in enumerate(found["with reinforcement"]):
        left.scatter(*returns(rows), s=4, label=f"seed {number}")
    left.set(xlabel="value, by the critic", ylabel="realised return")
    left.legend()
    for (arm, seeds), colour in zip(found.items(), ("grey", "black"), strict=True):
        dice = np.mean([np.mean([row["dice"] for row in rows], axis=0) for rows in seeds], axis=0)
        right.plot(range(len(dice)), dice, marker="o", color=colour, label=f"{arm}, fixed steps")
    for key, colour in (("value", "tab:red"), ("likeness", "tab:blue"), ("oracle", "tab:green")):
        curve = np.mean([stopping(rows, key) for rows in found["with reinforcement"]], axis=0)
        name = {"value": "stop by critic", "likeness": "stop by likeness", "oracle": "stop by the gain itself"}[key]
        right.plot(curve[:, 0], curve[:, 1], color=colour, label=name)
    low = min(np.mean([row["dice"][1] for row in rows]) for seeds in found.values() for rows in seeds)
    right.set(xlabel="mean steps", ylabel="mean Dice", ylim=(low - 0.01, None), xlim=(0.8, HORIZON))
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, judge, and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--val_pairs", required=True)
    parser.add_argument("--minutes", type=float, help="of each training")
    parser.add_argument(
        "--epochs", type=int, default=1000, help="of each training: equal updates instead of equal time"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="the fixed number that the others are compared with")
    parser.add_argument("--anatomy_ckpt", help="weights that see the labelled structures: learn from labels")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the bundle, such as unroll=3")
    parser.add_argument("--output", default="output/reinforcement")
    options = parser.parse_args()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found: dict[str, list[list[dict[str, Any]]]] = {arm: [] for arm in ARMS}
    table: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm, reinforcement in ARMS.items():
            ckpt = train(output / f"{arm.replace(' ', '_')}_{seed}", reinforcement, seed, options)
            torch.manual_seed(0)
            with torch.inference_mode():
                judge = Judge(ckpt, options)
                rows = [judge.pair(number) for number in range(len(judge.data))]
            found[arm].append(rows)
            table[arm].append(summary(rows, options.steps))
            print(arm, seed, {key: round(value, 4) for key, value in table[arm][-1].items()}, flush=True)
    with open(output / "reinforcement.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", *table["with reinforcement"][0]])
        writer.writerows([arm, seed, *figures.values()] for arm in table for seed, figures in enumerate(table[arm]))
    budget = f"{options.epochs} epochs" if options.minutes is None else f"{options.minutes:g} minutes"
    lines = [f"{date.today()}, {options.seeds} seeds, {budget} each", ""]
    lines += ["| mean (lowest to highest seed) | " + " | ".join(ARMS) + " |", "| --- | --- | --- |"]
    for key in table["with reinforcement"][0]:
        cells = [[figures[key] for figures in table[arm]] for arm in ARMS]
        lines.append(
            f"| {key} | " + " | ".join(f"{np.mean(c):.4f} ({min(c):.4f} to {max(c):.4f})" for c in cells) + " |"
        )
    (output / "reinforcement.md").write_text("\n".join(lines) + "\n")
    plot(found, output / "reinforcement.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
