"""Files as they came from the scanner: our command line against ANTs SyN, each with its own affine step.

    pip install antspyx
    python tests/benchmarks/native.py pairs.csv --ckpt model.pt --output native [--register "--steps 8 --refine 5"]

pairs.csv has the columns fixed, moving, fixed_label and moving_label; every image lies on a grid of its own. Ours is
``python -m monai_rl_reg register --pairs``, with nothing but the weights named; its CPU seconds are those of the whole
process, start and files included, over the number of pairs. Of ANTs only the registration and the warp count. One
thread each. Dice is the mean over all labels of the fixed image, on its own grid. Writes native.csv and native.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ[variable] = "1"

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from monai_rl_reg.data import read_pairs  # noqa: E402
from monai_rl_reg.metrics import mean_label_dice  # noqa: E402


def dice(moved: str | Path, fixed: str | Path) -> float:
    """Return the mean Dice over the labels of the fixed map."""
    files: list[Any] = [nib.load(str(path)) for path in (moved, fixed)]
    maps = [np.rint(np.asarray(file.dataobj)).astype(np.int64) for file in files]
    return float(mean_label_dice(*(torch.from_numpy(x)[None, None] for x in maps)))


def ours(pairs: list[dict[str, str]], output: Path, ckpt: str, options: list[str]) -> list[dict[str, float]]:
    """Register all pairs by the command line."""
    table = pd.DataFrame([{key: str(Path(value).resolve()) for key, value in row.items()} for row in pairs])
    table.insert(0, "name", [f"{i:03d}" for i in range(len(pairs))])
    table.to_csv(output / "pairs.csv", index=False)
    command = [sys.executable, "-m", "monai_rl_reg", "register", "--pairs", str(output / "pairs.csv")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--output", str(output / "ours"), "--ckpt", ckpt, *options], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(pairs)
    return [
        {"dice": dice(output / "ours" / f"{i:03d}" / "moved_label.nii.gz", row["fixed_label"]), "seconds": seconds}
        for i, row in enumerate(pairs)
    ]


def ants(pairs: list[dict[str, str]], output: Path) -> list[dict[str, float]]:
    """Register all pairs by ANTs: affine, then SyN."""
    import ants as program

    rows = []
    for i, pair in enumerate(tqdm(pairs, desc="ants", unit="pair")):
        images = {key: program.image_read(value) for key, value in pair.items()}
        started = time.process_time()
        found = program.registration(fixed=images["fixed"], moving=images["moving"], type_of_transform="SyN")
        moved = program.apply_transforms(
            fixed=images["fixed"],
            moving=images["moving_label"],
            transformlist=found["fwdtransforms"],
            interpolator="nearestNeighbor",
        )
        seconds = time.process_time() - started
        path = output / f"ants_{i:03d}.nii.gz"
        program.image_write(moved, str(path))
        rows.append({"dice": dice(path, pair["fixed_label"]), "seconds": seconds})
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--output", default="native")
    parser.add_argument("--register", default="", help="options for our command, one string")
    args = parser.parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    keys = ("fixed", "moving", "fixed_label", "moving_label")
    pairs = [{key: row[key] for key in keys} for row in read_pairs(args.pairs)]
    results = {
        "ours": ours(pairs, output, args.ckpt, args.register.split()),
        "ants": ants(pairs, output),
    }
    table = pd.DataFrame(
        [{"method": name, "pair": i} | row for name, rows in results.items() for i, row in enumerate(rows)]
    )
    table.to_csv(output / "native.csv", index=False)
    lines = [
        f"{len(pairs)} pairs, {date.today()}",
        "",
        "| method | Dice | deviation | CPU s |",
        "| --- | --- | --- | --- |",
    ]
    for name, part in table.groupby("method", sort=False):
        lines.append(f"| {name} | {part.dice.mean():.4f} | {part.dice.std():.4f} | {part.seconds.mean():.2f} |")
    (output / "native.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
