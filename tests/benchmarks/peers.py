"""Our policy and the classical programs that are installed, on the same pairs, in one run, on one thread each.

    pip install picsl-greedy antspyx itk-elastix convexAdam
    python tests/benchmarks/peers.py PAIRS.csv --ckpt bundles/rl_reg/models/model.pt --output OUT

``--voxelmorph`` adds MONAI's network, trained by ``voxelmorph.py``. The method ``refined`` is the bundle's number of
steps and then more and more iterations of refinement, for weights that were trained without labels.

PAIRS.csv has the columns fixed, moving, fixed_label and moving_label. All see what the policy sees: both images on the
fixed image's grid, centres aligned, intensities scaled to [0, 1]. Labels are moved by nearest neighbour. Writes
``peers.csv`` (a row a pair and method), ``peers.md`` (the table) and ``peers.png`` (Dice against seconds). Every method
runs in a process of its own; the figures are CPU seconds of the registration alone and the process's peak memory.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ[variable] = "1"
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from monai.bundle import ConfigParser  # noqa: E402
from monai.metrics import compute_hausdorff_distance  # noqa: E402
from monai.networks.blocks import Warp  # noqa: E402
from monai.networks.utils import one_hot  # noqa: E402
from torch import Tensor  # noqa: E402

from monai_rl_reg.checkpoints import load_policy  # noqa: E402
from monai_rl_reg.data import read_pairs  # noqa: E402
from monai_rl_reg.metrics import folded_percent, log_jacobian_std, mean_label_dice  # noqa: E402
from monai_rl_reg.pair_dataset import PairDataset  # noqa: E402
from monai_rl_reg.policy_bundle import PolicyBundle  # noqa: E402
from monai_rl_reg.refinement import refine  # noqa: E402
from monai_rl_reg.transforms import MovingToFixedGridd  # noqa: E402

Array = np.ndarray
Moved = tuple[Tensor | None, Tensor]
"""Displacement (1, 3, X, Y, Z) in voxels, where the program tells, and the moved label (1, 1, X, Y, Z)."""
BUNDLE = Path(__file__).parents[2] / "bundles" / "rl_reg"
NEEDS = {"greedy": "picsl_greedy", "ants": "ants", "elastix": "itk", "demons": "SimpleITK", "convexadam": "convexAdam"}


def bundle_parts(ckpt: str) -> ConfigParser:
    """Return the inference configuration of the bundle, for a checkpoint."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.json"))
    parser["bundle_root"], parser["ckpt"], parser["device"] = str(BUNDLE), ckpt, "$torch.device('cpu')"
    return parser


def nearest(label: Array, displacement: Array) -> Moved:
    """Move a label by a displacement (3, X, Y, Z) in voxels."""
    field = torch.from_numpy(np.ascontiguousarray(displacement, dtype=np.float32))[None]
    return field, Warp("nearest", "border")(torch.from_numpy(label).float()[None, None], field)


def sitk_image(array: Array) -> Any:
    """Return an array as a SimpleITK image whose axes x, y, z are the array's."""
    import SimpleITK

    return SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))


def sitk_field(image: Any) -> Array:
    """Return a SimpleITK displacement field of such an image, (3, X, Y, Z)."""
    import SimpleITK

    return SimpleITK.GetArrayFromImage(image).transpose(3, 2, 1, 0)


def identity(fixed: Array, moving: Array, label: Array) -> Moved:
    """Leave all as it is."""
    return nearest(label, np.zeros((3, *fixed.shape)))


def greedy(fixed: Array, moving: Array, label: Array) -> Moved:
    """Greedy diffeomorphic registration, NCC."""
    from picsl_greedy import Greedy3D

    program = Greedy3D()
    program.execute(
        "-threads 1 -i fixed moving -o warp -n 100x100x60 -m NCC 2x2x2 -s 3.0vox 0.7vox -V 0",
        fixed=sitk_image(fixed),
        moving=sitk_image(moving),
        warp=None,
    )
    return nearest(label, sitk_field(program["warp"]))


def ants(fixed: Array, moving: Array, label: Array) -> Moved:
    """ANTs SyN with its own affine step, which its field leaves out: no folds are told."""
    import ants as program

    images = [program.from_numpy(np.ascontiguousarray(x, dtype=np.float32)) for x in (fixed, moving, label)]
    found = program.registration(fixed=images[0], moving=images[1], type_of_transform="SyN")
    moved = program.apply_transforms(
        fixed=images[0], moving=images[2], transformlist=found["fwdtransforms"], interpolator="nearestNeighbor"
    )
    return None, torch.from_numpy(np.rint(moved.numpy())).float()[None, None]


def elastix(fixed: Array, moving: Array, label: Array) -> Moved:
    """Elastix, affine and B-spline."""
    import itk

    images = [itk.image_from_array(np.ascontiguousarray(x.T, dtype=np.float32)) for x in (fixed, moving)]
    parameters = itk.ParameterObject.New()
    for name in ("affine", "bspline"):
        parameters.AddParameterMap(parameters.GetDefaultParameterMap(name, 3, 8.0))
    _, found = itk.elastix_registration_method(*images, parameter_object=parameters, number_of_threads=1)
    with tempfile.TemporaryDirectory() as folder:  # transformix leaves a file where it runs
        field = itk.transformix_deformation_field(images[1], found, output_directory=folder)
    return nearest(label, itk.array_from_image(field).transpose(3, 2, 1, 0))


def demons(fixed: Array, moving: Array, label: Array) -> Moved:
    """SimpleITK's diffeomorphic demons in three resolutions."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    program = SimpleITK.DiffeomorphicDemonsRegistrationFilter()
    program.SetSmoothDisplacementField(True)
    program.SetStandardDeviations(1.5)
    images, field = [sitk_image(fixed), sitk_image(moving)], None
    for shrink, iterations in ((4, 100), (2, 100), (1, 60)):
        small = [
            SimpleITK.Shrink(SimpleITK.SmoothingRecursiveGaussian(x, 0.7 * shrink), [shrink] * 3) if shrink > 1 else x
            for x in images
        ]
        program.SetNumberOfIterations(iterations)
        start: list[Any] = [] if field is None else [SimpleITK.Resample(field, small[0])]
        field = program.Execute(*small, *start)
    return nearest(label, sitk_field(field))


def convexadam(fixed: Array, moving: Array, label: Array) -> Moved:
    """ConvexAdam on MIND features."""
    from convexAdam.convex_adam_MIND import convex_adam_pt

    field = convex_adam_pt(
        img_fixed=torch.from_numpy(fixed.copy()),
        img_moving=torch.from_numpy(moving.copy()),
        lambda_weight=1.25,
        grid_sp=4,
        disp_hw=3,
        selected_niter=80,
        grid_sp_adam=2,
        selected_smooth=0,
        dtype=torch.float32,
        verbose=False,
        device=torch.device("cpu"),
    )
    return nearest(label, np.moveaxis(np.asarray(field), -1, 0))


PROGRAMS: dict[str, Callable[[Array, Array, Array], Moved]] = {
    "identity": identity,
    "greedy": greedy,
    "ants": ants,
    "elastix": elastix,
    "demons": demons,
    "convexadam": convexadam,
}


def voxelmorph(ckpt: str) -> Callable[[Array, Array, Array], Moved]:
    """MONAI's VoxelMorph, with the weights that ``voxelmorph.py`` has saved; in bfloat16, as the policy."""
    from voxelmorph import displacement, load

    network = load(ckpt)

    def register(fixed: Array, moving: Array, label: Array) -> Moved:
        image = torch.from_numpy(np.stack([fixed, moving]))[None]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            field = displacement(network, image)
        return nearest(label, field[0].numpy())

    return register


def policy_steps(parts: ConfigParser, image: Tensor, label: Tensor, steps: int) -> Iterator[tuple[int, float, Moved]]:
    """Yield each number of steps, CPU seconds that they take with the relaxation that follows, and the result."""
    network, inferer = parts.get_parsed_content("network"), parts.get_parsed_content("inferer")
    inferer.steps, seconds, started = steps + 1, 0.0, time.process_time()  # the last one would come settled
    with torch.inference_mode():
        for number, state in enumerate(islice(inferer.trajectory(image, network), steps + 1)):
            if number == 0:
                continue  # the start
            seconds += time.process_time() - started
            started = time.process_time()
            field = inferer.task.output(inferer.task.settle(state, number))
            taken = seconds + time.process_time() - started
            yield number, taken, (field, Warp("nearest", "border")(label[:, 1:].float(), field))
            started = time.process_time()


ITERATIONS = (5, 10, 20, 40, 80)
"""Of refinement, in all."""


def refinements(bundle: PolicyBundle, image: Tensor, label: Tensor) -> Iterator[tuple[int, float, Moved]]:
    """Yield iterations and CPU seconds so far and the result, after the policy's steps.

    Each goes on from the one before, with the rate of the first iteration.
    """
    task, done, started = bundle.refinement_task, 0, time.process_time()
    *_, state = bundle.trajectory(image, bundle.steps)
    seconds = time.process_time() - started
    for iterations in ITERATIONS:
        started = time.process_time()
        state = refine(task, state, bundle.network, iterations=iterations - done).state
        field = task.output(state)
        seconds, done = seconds + time.process_time() - started, iterations
        yield iterations, seconds, (field, Warp("nearest", "border")(label[:, 1:].float(), field))


def run_method(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row a pair; for the policy a row a pair and step."""
    torch.set_num_threads(1)
    parts = bundle_parts(arguments.ckpt)
    data = PairDataset(
        read_pairs(arguments.pairs)[: arguments.first],
        parts.get_parsed_content("case_transform"),
        MovingToFixedGridd("centre"),
        progress=False,
    )
    if name == "policy":
        anatomy = parts.get_parsed_content("anatomy")
        load_policy(parts.get_parsed_content("network"), arguments.ckpt, anatomy=anatomy).eval()
        parts.get_parsed_content("task").eval()
    elif name == "refined":
        bundle = PolicyBundle(ckpt=arguments.ckpt, device="cpu")
    elif name == "voxelmorph":
        program = voxelmorph(arguments.voxelmorph)
    else:
        program = PROGRAMS[name]
    for number in range(len(data)):
        item = data[number]
        image, label = item["image"].as_tensor()[None], item["label"].as_tensor()[None]
        fixed, moving, moving_label = image[0, 0].numpy(), image[0, 1].numpy(), label[0, 1].numpy()
        if name in ("policy", "refined"):
            steps = policy_steps(parts, image, label, arguments.steps)
            for step, seconds, moved in steps if name == "policy" else refinements(bundle, image, label):
                yield {"method": name, "pair": number, "step": step, "cpu_seconds": seconds} | figures(moved, label)
            continue
        started = time.process_time()
        moved = program(fixed, moving, moving_label)
        seconds = time.process_time() - started
        yield {"method": name, "pair": number, "step": "", "cpu_seconds": seconds} | figures(moved, label)


def figures(moved: Moved, label: Tensor) -> dict[str, float]:
    """Return Dice, HD95 in voxels, folded percent and SDlogJ of one result."""
    field, moved_label = moved
    fixed_label, classes = label[:, :1], int(label.max()) + 1
    distance = compute_hausdorff_distance(
        one_hot(moved_label.round().clamp(max=classes - 1), classes), one_hot(fixed_label, classes), percentile=95
    )
    return {
        "dice": float(mean_label_dice(moved_label.round(), fixed_label)),
        "hd95": float(distance[distance.isfinite()].mean()),
        "folded": float(folded_percent(field)) if field is not None else float("nan"),
        "sdlogj": float(log_jacobian_std(field)) if field is not None else float("nan"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the summary as a table in markdown."""
    lines = [
        "| method | Dice | deviation | 10th percentile | HD95, voxels | folded, % | SDlogJ | CPU s | peak, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (method, step), group in groups(rows).items():
        column = {key: np.array([float(row[key]) for row in group]) for key in ("dice", "hd95", "folded", "sdlogj")}
        seconds = np.mean([float(row["cpu_seconds"]) for row in group])
        what = "step" if method == "policy" else "iteration"
        name = f"{method}, {step} {what}{'s' if step > 1 else ''}" if step else method
        lines.append(
            f"| {name} | {column['dice'].mean():.4f} | {column['dice'].std():.3f} | "
            f"{np.percentile(column['dice'], 10):.3f} | {np.nanmean(column['hd95']):.2f} | "
            f"{column['folded'].mean():.4f} | {column['sdlogj'].mean():.3f} | {seconds:.3f} | "
            f"{float(group[0]['peak']):.0f} |"
        )
    return "\n".join(lines)


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Return the rows by method and step (0 for the programs)."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], int(row["step"] or 0)), []).append(row)
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw Dice against seconds, the policy as a curve over its steps, and one over iterations of refinement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    curves: dict[str, list[tuple[float, float]]] = {}
    for (method, step), group in groups(rows).items():
        seconds, dice = (float(np.mean([float(row[key]) for row in group])) for key in ("cpu_seconds", "dice"))
        if step:
            curves.setdefault(method, []).append((seconds, dice))
        elif method != "identity":
            axes.scatter(seconds, dice)
            axes.annotate(method, (seconds, dice), xytext=(5, 4), textcoords="offset points")
    labels = {"policy": "policy, 1 step and more", "refined": "refined, 5 iterations and more"}
    for (method, curve), colour in zip(curves.items(), ("black", "grey"), strict=False):
        axes.plot(*zip(*curve, strict=True), marker="o", color=colour, label=labels[method])
    if curves:
        axes.legend(loc="best")
    axes.set(xscale="log", xlabel="CPU seconds a pair, one thread", ylabel="mean Dice")
    axes.grid(alpha=0.3)
    axes.margins(x=0.2, y=0.15)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run every method in its own process, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--ckpt", default=str(BUNDLE / "models" / "model.pt"))
    parser.add_argument("--output", default="peers")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--first", type=int, help="only so many pairs")
    parser.add_argument("--voxelmorph", help="weights of MONAI's VoxelMorph")
    parser.add_argument("--methods", nargs="*", help="those to run; by default all that are installed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        rows = list(run_method(arguments.child, arguments))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("ROWS" + json.dumps([row | {"peak": peak} for row in rows]))
        return
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    methods = ["policy", *(["voxelmorph"] if arguments.voxelmorph else []), *PROGRAMS]
    for method in arguments.methods or methods:
        if importlib.util.find_spec(NEEDS.get(method, "torch")) is None:
            print(f"{method}: not installed", file=sys.stderr)
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--child", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
        rows += json.loads(done.stdout.rpartition("ROWS")[2])
        print(table([row for row in rows if row["method"] == method]).splitlines()[-1], flush=True)
    with open(output / "peers.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = f"{date.today()}, {len({row['pair'] for row in rows})} pairs\n\n{table(rows)}\n"
    (output / "peers.md").write_text(text)
    plot(rows, output / "peers.png")
    print(text)


if __name__ == "__main__":
    main()
