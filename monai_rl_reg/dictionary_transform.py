"""Registration as a step of a MONAI pipeline, between loading and whatever comes after."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ImageMetaKey, ensure_tuple

from monai_rl_reg.registration import Registrar
from monai_rl_reg.request import Options, Pair


class Registerd(MapTransform):
    """Dictionary transform that registers the images under some keys to a fixed one, and moves their labels alike.

    Each moved image takes the place of the one that was given, on the fixed image's grid and with its affine, so that
    what follows (``ConcatItemsd``, ``SaveImaged``) finds them all alike. Beside it stand ``KEY_displacement``,
    ``(d, *fixed)`` in RAS millimetres, and ``KEY_quality``, the numbers of ``quality.json``, which collate. Warnings go
    to the log.

    In the workers of a ``DataLoader`` each process loads the weights once, and a device must be one that it may use.

    Args:
        keys: of the moving images.
        fixed: key of the fixed image.
        labels: for each of the keys that of a label map on its image's grid, or None; None for no labels at all.
        fixed_label: key of a label map on the fixed image's grid, to measure Dice with.
        options: how; by default as :func:`~monai_rl_reg.registration.register` does. There is neither an inverse nor
            an uncertainty.
        bundle: folder of the bundle; by default the package's ``rl_reg``.
        ckpt: weights; by default the bundle's own.
        device: where to compute, for example ``cpu`` or ``cuda:0``; by default the bundle's choice.
        allow_missing_keys: leave out moving images that are not there.

    Raises:
        ValueError: if there are other numbers of keys and labels.
    """

    def __init__(
        self,
        keys: KeysCollection,
        fixed: Hashable,
        *,
        labels: KeysCollection | None = None,
        fixed_label: Hashable | None = None,
        options: Options | None = None,
        bundle: str | Path | None = None,
        ckpt: str | Path | None = None,
        device: str | torch.device | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.fixed = fixed
        self.labels: tuple[Any, ...] = (None,) * len(self.keys) if labels is None else ensure_tuple(labels)
        if len(self.labels) != len(self.keys):
            raise ValueError(f"expected a label, or None, for each of {self.keys}, got {self.labels}")
        self.fixed_label = fixed_label
        self.options = replace(options or Options(), inverse=False, uncertainty=0)
        self.registrar = Registrar(bundle=bundle, ckpt=ckpt, device=device)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dictionary with the images and labels moved.

        Images and labels are as MONAI's ``LoadImaged`` leaves them, ``(1, *spatial)`` or ``(*spatial)``; what comes out
        is ``(1, *fixed)``.

        Raises:
            InputError: if an image, a label or the weights cannot be used.
            KeyError: if a key is not there.
        """
        moved = dict(data)
        for key, label in self.key_iterator(data, self.labels):
            pair = Pair.read(
                data[self.fixed],
                data[key],
                fixed_label=None if self.fixed_label is None else data[self.fixed_label],
                moving_label=None if label is None else data[label],
            )
            result = self.registrar.register(pair, self.options)
            grid = data[self.fixed]
            moved[key] = _on_grid(grid, result.moved, data[key])
            if label is not None and result.moved_label is not None:
                moved[label] = _on_grid(grid, result.moved_label, data[label])
            moved[f"{key}_displacement"] = _on_grid(grid, result.displacement, data[key])
            moved[f"{key}_quality"] = {n: x for n, x in result.quality.items() if isinstance(x, int | float)}
        return moved


def _on_grid(fixed: Any, volume: MetaTensor, given: Any) -> MetaTensor:
    """Return a volume as MONAI has the fixed image: with what was done to its grid, so that this can be undone."""
    if isinstance(fixed, MetaTensor):
        volume = MetaTensor(volume.as_tensor().to(fixed.device)).copy_meta_from(fixed)
        volume.meta.pop(ImageMetaKey.FILENAME_OR_OBJ, None)
    name = given.meta.get(ImageMetaKey.FILENAME_OR_OBJ) if isinstance(given, MetaTensor) else given
    if isinstance(name, str | Path):
        volume.meta[ImageMetaKey.FILENAME_OR_OBJ] = str(name)
    return volume
