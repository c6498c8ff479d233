"""The command line: ``python -m monai_rl_reg register FIXED MOVING --output OUT``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_rl_reg import __version__
from monai_rl_reg.errors import InputError, find_input_error
from monai_rl_reg.memory import quick_imports

DESCRIPTION = """\
Register a MOVING image to a FIXED one: find where each point of the fixed image lies in the moving one.

An image is a file (NIfTI, NRRD, MetaImage, ...) or the folder of a DICOM series. The two may have different sizes,
voxel sizes, orientations and positions. Images that lie apart are brought together by an affine first.
"""

EPILOG = """\
OUT gets:
  moved.nii.gz                 the moving image on the fixed image's grid, resampled once
  moved_label.nii.gz           the moving label likewise, nearest neighbour (with --moving-label)
  displacement.nii.gz          the field from fixed to moving space, LPS mm, as ITK, ANTs and 3D Slicer read it
  inverse_displacement.nii.gz  the field back, on the moving image's grid
  transform.h5                 the field from fixed to moving space as an ITK transform (3D Slicer, SimpleITK, ANTs)
  landmarks.csv                each landmark's place in the other image (with --landmarks)
  uncertainty.nii.gz           standard deviation of the displacement in mm (with --uncertainty)
  quality.json                 similarity and Dice before and after, folds, error of the inverse, warnings, versions
  report.html                  pictures and figures on one page (with --report)
They appear together: a run that is killed leaves the earlier files as they were.

examples:
  python -m monai_rl_reg register fixed.nii.gz moving.nii.gz --output out --report
  python -m monai_rl_reg register fixed.nii.gz dicom_folder --moving-label seg.nii.gz --refine 30 --output out
  python -m monai_rl_reg register --pairs pairs.csv --output out --resume
  torchrun --nproc-per-node 4 -m monai_rl_reg register --pairs pairs.csv --output out

The exit status is 0 if all went well, 1 if an input cannot be used (one sentence says why) or a pair of --pairs
failed, 2 if the command itself is wrong. Warnings about the result go to the standard error output.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m monai_rl_reg", description="Deformable registration for MONAI.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "register",
        help="register two images, or many pairs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("fixed", nargs="?", metavar="FIXED", help="image to register to")
    add("moving", nargs="?", metavar="MOVING", help="image to move")
    add("--output", required=True, metavar="OUT", help="folder for the results")

    data = command.add_argument_group("data")
    add = data.add_argument
    add("--pairs", metavar="CSV", help="many pairs instead of one: columns fixed,moving and, if wanted, "
        "fixed_label,moving_label,landmarks,name; a folder a pair in OUT, and summary.csv")  # fmt: skip
    add("--resume", action="store_true", help="with --pairs: skip pairs whose folder is complete")
    add("--moving-label", metavar="L", help="label map of the moving image, to be moved")
    add("--fixed-label", metavar="L", help="label map of the fixed image, to measure Dice with")
    add("--landmarks", metavar="CSV", help="points to carry to the other image: columns x,y,z in mm and, if wanted, "
        "name, image (fixed or moving; default fixed), space (LPS or RAS; default LPS)")  # fmt: skip

    how = command.add_argument_group("how")
    amount = how.add_mutually_exclusive_group()
    amount.add_argument("--steps", type=steps, metavar="N", help="number of steps (default: the bundle's)")
    amount.add_argument("--stop", choices=["auto"], help="auto: stop when a step gains too little, or will")
    add = how.add_argument
    add("--refine", type=float, default=0.0, metavar="SECONDS", help="then improve this pair by gradient descent on "
        "the training loss, for so long at most")  # fmt: skip
    add("--uncertainty", type=int, default=0, metavar="K", help="repeat K times with sampled plans, and write how far "
        "the displacement varies")  # fmt: skip
    add("--initial", default="auto", metavar="TRANSFORM", help="ITK transform from fixed to moving space to begin "
        "with (.h5, .tfm, .txt, .mat, or a field as .nii.gz); auto (default): find an affine where the images are not "
        "aligned; none: take them as they lie")  # fmt: skip

    add("--by-label", action="store_true", help="go by the structures of the moving label, where they are those that "
        "the weights see, instead of what they see of them in the moving image")  # fmt: skip

    model = command.add_argument_group("model")
    add = model.add_argument
    add("--bundle", metavar="DIR", help="registration bundle (default: the package's rl_reg)")
    add("--ckpt", metavar="FILE", help="weights (default: the bundle's)")
    add("--device", metavar="NAME", help="cpu, cuda:0, ... (default: CUDA if there is one)")

    results = command.add_argument_group("results")
    add = results.add_argument
    add("--report", action="store_true", help="write report.html too")
    add("--tfm", action="store_true", help="write the transform as text too, transform.tfm (large)")
    add("-v", "--verbose", action="store_true", help="log what is done")
    add("-q", "--quiet", action="store_true", help="show no progress")
    command = commands.add_parser(
        "calibrate",
        help="teach the judge of a checkpoint what Dice to expect",
        description="Register pairs with known labels, and keep in the checkpoint how well the structures that "
        "networks see agreed, and how well the true ones did: quality.json then has expected_dice, without labels.",
    )
    add = command.add_argument
    add("--ckpt", required=True, metavar="FILE", help="weights, which get the judge beside them")
    add("--pairs", required=True, metavar="CSV", help="columns fixed,moving,fixed_label,moving_label; images that no "
        "training saw")  # fmt: skip
    add("--witness", metavar="FILE", help="weights of a training with labels, whose networks bear witness (default: "
        "those of the policy itself)")  # fmt: skip
    add("--bundle", metavar="DIR", help="registration bundle (default: the package's rl_reg)")
    add("--device", metavar="NAME", help="cpu, cuda:0, ... (default: CUDA if there is one)")
    add("-q", "--quiet", action="store_true", help="show no progress")
    commands.add_parser("label-app", help="print the folder of the MONAI Label app, for monailabel start_server --app")
    commands.add_parser("bundles", help="print the folder of the bundles, for monai.bundle run --config_file")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    top = parser()
    args = top.parse_args(arguments)
    if args.command == "label-app":
        print(Path(__file__).with_name("label_app"))
        return 0
    if args.command == "bundles":
        with quick_imports():
            from monai_rl_reg.policy_bundle import BUNDLES
        print(BUNDLES)
        return 0
    if args.command == "register":
        _check(top, args)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    verbose = getattr(args, "verbose", False)
    logging.getLogger("monai_rl_reg").setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        if args.command == "calibrate":
            return _calibrate(args)
        args.options = _options(top, args)
        return _register_pairs(args) if args.pairs else _register(args)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        found = find_input_error(error)
        if found is None:
            raise
        print(f"error: {found}", file=sys.stderr)
        return 1


def steps(text: str) -> int | str:
    """Read a number of steps, or ``auto``."""
    return text if text == "auto" else int(text)  # auto: as from Python


def _check(top: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    one = args.fixed is not None or args.moving is not None
    if one == bool(args.pairs) or (one and args.moving is None):
        top.error("expected FIXED and MOVING, or --pairs")
    if args.pairs and (args.moving_label or args.fixed_label or args.landmarks):
        top.error("with --pairs, labels and landmarks are columns of the CSV file")
    if args.fixed_label and not args.moving_label:
        top.error("--fixed-label goes with --moving-label: Dice is measured between the two")
    if args.resume and not args.pairs:
        top.error("--resume goes with --pairs")


def _options(top: argparse.ArgumentParser, args: argparse.Namespace) -> Any:
    with quick_imports():  # torch and MONAI take seconds: not for --help
        from monai_rl_reg.request import Options

    try:
        return Options(args.stop or args.steps, args.refine, args.uncertainty, args.initial, by_label=args.by_label)
    except InputError as error:
        return top.error(str(error))


def _calibrate(args: argparse.Namespace) -> int:
    with quick_imports():  # torch and MONAI take seconds: not for --help
        from monai_rl_reg.judge import calibrate

    judge = calibrate(
        args.pairs, args.ckpt, witness=args.witness, bundle=args.bundle, device=args.device, progress=not args.quiet
    )
    print(f"{args.ckpt} expects Dice from {len(judge.seen)} steps of registrations")
    return 0


def _register(args: argparse.Namespace) -> int:
    with quick_imports():  # torch and MONAI take seconds: not for --help
        from monai_rl_reg.files import expect_folder
        from monai_rl_reg.registration import Registrar, keep_inputs
        from monai_rl_reg.request import Pair
        from monai_rl_reg.similarity import title

    expect_folder(args.output)  # before the work
    keep_inputs(args.output, args.fixed, args.moving, args.fixed_label, args.moving_label, args.landmarks, args.initial)
    pair = Pair.read(
        args.fixed,
        args.moving,
        fixed_label=args.fixed_label,
        moving_label=args.moving_label,
        landmarks=args.landmarks,
    )
    registrar = Registrar(bundle=args.bundle, ckpt=args.ckpt, device=args.device)
    result = registrar.register(pair, args.options, progress=not args.quiet)
    result.save(args.output, tfm=args.tfm, report=args.report)
    quality = result.quality
    name = quality["similarity"]
    figures = [f"{title(name)} {quality[f'{name}_before']:.3f} -> {quality[f'{name}_after']:.3f}"]
    if "dice_after" in quality:
        figures.append(f"Dice {quality['dice_before']:.3f} -> {quality['dice_after']:.3f}")
    elif "expected_dice" in quality:
        low, high = quality["expected_dice_range"]
        figures.append(f"expected Dice {quality['expected_dice']:.3f} ({low:.3f} to {high:.3f})")
    if "tre_after_mm" in quality:
        figures.append(f"landmarks {quality['tre_before_mm']:.2f} -> {quality['tre_after_mm']:.2f} mm apart")
    figures.append(f"folded {quality['folded_percent']:.2g} %")
    figures.append(f"{quality['steps']} steps, {quality['seconds']:.1f} s")
    print(", ".join(figures))
    print(f"Wrote the registration to {Path(args.output).resolve()}")
    return 0


def _own_device() -> str | None:
    """The GPU of this process of several, which torchrun numbers on each machine; None leaves it to the bundle."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ['LOCAL_RANK']) % count}" if "LOCAL_RANK" in os.environ and count > 0 else None


def _register_pairs(args: argparse.Namespace) -> int:
    with quick_imports():
        from monai_rl_reg.batch import register_pairs
        from monai_rl_reg.registration import Registrar

    registrar = Registrar(bundle=args.bundle, ckpt=args.ckpt, device=args.device or _own_device())
    rows = register_pairs(
        args.pairs,
        args.output,
        registrar,
        args.options,
        resume=args.resume,
        progress=not args.quiet,
        tfm=args.tfm,
        report=args.report,
    )
    failed = sum(row["status"] == "failed" for row in rows)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        print(f"{len(rows) - failed} of {len(rows)} pairs registered; wrote {Path(args.output).resolve()}/summary.csv")
    return 1 if failed else 0
