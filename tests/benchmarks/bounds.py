"""What bounds a registration that was trained with labels: python bounds.py PAIRS.csv --ckpt MODEL

For every ``--every``-th pair a field of half resolution is optimised by itself, by soft Dice at the images' resolution,
a little smoothness and the hinge on folds, so that no network's reach is in question: from the true moving regions
to the true fixed ones (what the field can do), from the true moving to the seen fixed ones (what seeing the fixed image
costs), and from the seen to the seen ones, as at test time. Dice is always that of the true labels.
"""

from __future__ import annotations

import argparse
import warnings
from datetime import date
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from monai.bundle import ConfigParser  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from monai_rl_reg.checkpoints import load_policy  # noqa: E402
from monai_rl_reg.data import read_pairs  # noqa: E402
from monai_rl_reg.geometry import jacobian_determinant  # noqa: E402
from monai_rl_reg.metrics import mean_label_dice  # noqa: E402
from monai_rl_reg.pair_dataset import PairDataset  # noqa: E402
from monai_rl_reg.tasks.registration import RegistrationTask  # noqa: E402
from monai_rl_reg.transforms import MovingToFixedGridd  # noqa: E402

BUNDLE = Path(__file__).parents[2] / "bundles" / "rl_reg"
ITERATIONS = 40


def optimise(task: RegistrationTask, image: Tensor, moving: Tensor, fixed: Tensor) -> Tensor:
    """Return the displacement, in voxels of the images, that brings moving regions onto fixed ones (B, K, *spatial)."""
    state = task.reset(image)
    field = torch.zeros_like(state["displacement"], requires_grad=True)
    optimiser = torch.optim.Adam([field], lr=0.1)
    for _ in range(ITERATIONS):
        moved = task.warp(moving, task.output(state | {"displacement": field}))
        loss = task.dice(moved, fixed) + task.smoothness_weight * task.smoothness(field)
        loss = loss + task.fold_weight * F.relu(0.1 - jacobian_determinant(field)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return task.output(state | {"displacement": field.detach()})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--ckpt", default=str(BUNDLE / "models" / "model.pt"))
    parser.add_argument("--every", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = ConfigParser()
    parts.read_config(str(BUNDLE / "configs" / "inference.json"))
    parts["ckpt"], parts["device"] = options.ckpt, "$torch.device('cpu')"
    anatomy = parts.get_parsed_content("anatomy")
    load_policy(parts.get_parsed_content("network"), options.ckpt, anatomy=anatomy)
    anatomy.eval()
    task = RegistrationTask(3, field_stride=2, smoothness_weight=0.03, fold_weight=10.0)
    pairs = read_pairs(options.pairs)[:: options.every]
    data = PairDataset(pairs, parts.get_parsed_content("case_transform"), MovingToFixedGridd("centre"), progress=False)
    found: dict[str, list[float]] = {}
    for number in range(len(data)):
        item = data[number]
        image, label = item["image"].as_tensor()[None], item["label"].as_tensor()[None]
        values = range(1, data.num_classes)
        true = [torch.cat([(label[:, i : i + 1] == v).float() for v in values], dim=1) for i in (0, 1)]
        with torch.no_grad():
            seen = [anatomy(image[:, i : i + 1]) for i in (0, 1)]
        for i in (0, 1):
            dice = mean_label_dice(seen[i].argmax(1, keepdim=True).float(), label[:, i : i + 1])
            found.setdefault("the structures seen, in one image", []).append(float(dice))
        seen = [x[:, 1:] for x in seen]
        for name, moving, fixed in (
            ("true moving to true fixed", true[1], true[0]),
            ("true moving to seen fixed", true[1], seen[0]),
            ("seen moving to seen fixed", seen[1], seen[0]),
        ):
            moved = task.warp_label(label[:, 1:].float(), optimise(task, image, moving, fixed)).round()
            found.setdefault(name, []).append(float(mean_label_dice(moved, label[:, :1])))
    print(f"{date.today()}, {len(data)} pairs\n\n| field optimised for each pair | Dice |\n| --- | --- |")
    for name, values_found in found.items():
        print(f"| {name} | {sum(values_found) / len(values_found):.4f} |")


if __name__ == "__main__":
    main()
