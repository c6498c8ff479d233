"""Draw drafts of labels: an image, the label that atlases propagated to it, and the true one, for three cases.

The picture in the docs: ``make_label_propagation.py OUT.png --ckpt bundles/rl_reg/models/model_without_labels.pt``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from monai_rl_reg import Registrar
from monai_rl_reg.atlases import Case, CommonSpace, label_names
from monai_rl_reg.data import read_cases
from monai_rl_reg.label_propagation import LabelPropagation
from monai_rl_reg.metrics import mean_label_dice
from monai_rl_reg.nifti import read_image
from monai_rl_reg.phantoms import make_cohort

TEXT = "#8a929c"  # readable on light and dark pages


def main() -> None:
    """Draw the cohort that needs no download, or another folder in the Decathlon's layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--atlases", type=int, default=3)
    parser.add_argument("--ckpt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = read_cases(arguments.dataset or make_cohort(folder, count=9))
        cases = [Case(Path(row["image"]).name, row["image"], row["label"]) for row in rows]
        atlases, targets = cases[: len(cases) // 2], cases[-3:]
        names = label_names(atlases)
        propagation = LabelPropagation(Registrar(ckpt=arguments.ckpt), CommonSpace(Path(folder) / "affines.json"))
        figure = Figure(figsize=(6.6, 6.4))
        axes = figure.subplots(3, 3)
        for row, target in zip(axes, targets, strict=True):
            image = read_image(target.image)
            truth = target.read_label(image, names)
            draft = propagation.draft(target.image, atlases, names, count=arguments.atlases)
            dice = float(mean_label_dice(draft.label.as_tensor()[None].int(), truth.as_tensor()[None].int()))
            titles = ("image", f"draft from {arguments.atlases} atlases, Dice {dice:.2f}", "true label")
            for axis, label, title in zip(row, (None, draft.label, truth), titles, strict=True):
                middle = image.shape[-1] // 2
                axis.imshow(image[0, ..., middle].numpy().T, cmap="gray", origin="lower")
                if label is not None:
                    plane = label[0, ..., middle].numpy().T.astype(float)
                    shown = np.ma.masked_equal(plane, 0)
                    axis.imshow(shown, cmap="Set1", vmin=1, vmax=9, alpha=0.6, origin="lower", interpolation="nearest")
                axis.set_title(title, fontsize=8, color=TEXT)
                axis.axis("off")
        figure.tight_layout()
        figure.savefig(arguments.output, dpi=80, transparent=True)


if __name__ == "__main__":
    main()
