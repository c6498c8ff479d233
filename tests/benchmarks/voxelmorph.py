"""Train MONAI's VoxelMorph on the pairs, with the loss, the augmentation and for the minutes of the policy.

    python tests/benchmarks/voxelmorph.py --dataset_dir Task04_Hippocampus --val_pairs PAIRS.csv --minutes 30
    python tests/benchmarks/peers.py PAIRS.csv --voxelmorph output/voxelmorph/model.pt

VoxelMorph as the class's own example builds it, from arXiv 1809.05231: a velocity field, integrated in seven steps.
``--with_labels`` adds the bundle's ``with_labels.json`` (soft Dice, hinge on folds, augmentation). The loss is the
task's, of the one displacement that the network gives; the network saved is the last one.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.networks.nets import VoxelMorph
from monai.utils import set_determinism
from torch import Tensor
from torch.nn import functional as F

CONFIGS = Path(__file__).parents[2] / "bundles" / "rl_reg" / "configs"
STRIDE = 16


def displacement(network: VoxelMorph, image: Tensor) -> Tensor:
    """Return the displacement (B, 3, *spatial) in voxels for fixed and moving (B, 2, *spatial), of any size."""
    pads = [p for n in image.shape[:1:-1] for p in (0, -n % STRIDE)]
    fixed, moving = F.pad(image, pads, mode="replicate").split(1, dim=1)
    field: Tensor = network(moving, fixed)[1].float()
    for dim, n in enumerate(image.shape[2:], start=2):
        field = field.narrow(dim, 0, n)
    return field


def load(path: str) -> VoxelMorph:
    """Return a network that :func:`main` has saved."""
    network = VoxelMorph()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def main() -> None:
    """Train, and save the last network."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dataset_dir")
    arguments.add_argument("--pairs")
    arguments.add_argument("--val_pairs", required=True)
    arguments.add_argument("--with_labels", action="store_true")
    arguments.add_argument("--minutes", type=float, required=True, help="CPU minutes on one thread")
    arguments.add_argument("--batch_size", type=int, default=4)
    arguments.add_argument("--learning_rate", type=float, default=1e-3)
    arguments.add_argument("--set", nargs="*", default=[], help="settings of the bundle, such as smoothness_weight=1.0")
    arguments.add_argument("--output_dir", default="output/voxelmorph")
    options = arguments.parse_args()

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    set_determinism(0)
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json")] + [str(CONFIGS / "with_labels.json")] * options.with_labels)
    for name in ("dataset_dir", "pairs", "val_pairs", "output_dir", "batch_size"):
        parser[name] = getattr(options, name)
    for setting in options.set:
        name, _, value = setting.partition("=")
        parser[name] = float(value)
    parser["structures"], parser["field_stride"], parser["guided"] = 0, 1, False
    task, loader = parser.get_parsed_content("task"), parser.get_parsed_content("train::dataloader")
    network, output = VoxelMorph(), Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    started, updates = time.process_time(), 0
    while (minutes := (time.process_time() - started) / 60) < options.minutes:
        for batch in loader:
            label = batch.get("label")
            state = task.reset(torch.as_tensor(batch["image"]), None if label is None else torch.as_tensor(label))
            with torch.autocast("cpu", torch.bfloat16):
                action = displacement(network, task.observe(state))
            terms = task.loss(state, action.float(), network)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            updates += 1
            if updates % 50 == 0:
                minutes = (time.process_time() - started) / 60
                shown = ", ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
                print(f"{minutes:.1f} CPU min, {updates} updates: {shown}", flush=True)
                for group in optimizer.param_groups:
                    group["lr"] = options.learning_rate * max(0.02, 1 - minutes / options.minutes)
                if minutes > options.minutes:
                    break
    partial = output / f"model.pt.{os.getpid()}"
    torch.save(network.state_dict(), partial)
    partial.replace(output / "model.pt")


if __name__ == "__main__":
    main()
