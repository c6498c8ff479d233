"""Read volumes with every check that bad input deserves, and write NIfTI files atomically."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from isal.igzip import IGzipFile
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import LoadImage
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys
from nibabel.spatialimages import SpatialImage
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.files import replacing
from monai_rl_reg.geometry import ras_to_lps
from monai_rl_reg.itk_bridge import affine_by_itk, from_itk, read_series

VECTOR_INTENT = 1007
MILLIMETRES = {1: 1000.0, 3: 0.001}
"""Of a NIfTI's unit of length, by its code: metres and micrometres; whatever else is taken for millimetres."""
LARGEST_LABEL = 2**24 - 1
"""Up to it whole numbers are exact in fp32."""
COMPLEX = (32, 1792, 2048)
"""Codes of a NIfTI's complex types."""
NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
SAME_PLACE = 0.1
"""Voxels between two readings of a header that are one."""
APART = "apart"
"""Key of an image's metadata: how far from its place in ITK it lies, in millimetres, if it does."""


def name_of(source: Any) -> str:
    """Return what messages call an image: its path, or what kind of object it was given as."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, MetaTensor) and source.meta.get(ImageMetaKey.FILENAME_OR_OBJ):
        return str(source.meta[ImageMetaKey.FILENAME_OR_OBJ])
    return f"given as {type(source).__name__}"


def read_volume(source: Any, *, spatial_dims: int | None = 3, what: str = "image") -> MetaTensor:
    """Read one single-channel image, (1, *spatial) in fp32.

    Args:
        source: a file in any format that MONAI reads, the folder of a DICOM series, or an image of nibabel, SimpleITK,
            ITK or MONAI (a MetaTensor with or without its channel).
        spatial_dims: 2 or 3; None takes either.
        what: how messages call it.

    Raises:
        InputError: if the file is missing, unreadable, has another number of dimensions or channels, a singular
            affine, or voxels that are not finite; or the source is nothing that has an affine.
    """
    name = name_of(source)
    volume, affine = _load(source, name, what)
    while volume.ndim > (spatial_dims or 2) and volume.shape[-1] == 1:
        volume = volume[..., 0]
    wanted = (2, 3) if spatial_dims is None else (spatial_dims,)
    if volume.ndim not in wanted or volume.numel() == 0:
        expected = " or ".join(map(str, wanted))
        raise InputError(f"{what} {name}: expected {expected} dimensions, found shape {tuple(volume.shape)}")
    d = volume.ndim
    if not torch.isfinite(affine).all() or any(_singular(affine[:n, :n]) for n in (3, d)):
        raise InputError(f"{what} {name}: expected an invertible affine, found {affine[:d, :d].tolist()}")
    bad = int((~torch.isfinite(volume)).sum())
    if bad:
        raise InputError(f"{what} {name}: expected finite voxels, found {bad:,} of {volume.numel():,} NaN or infinite")
    meta: dict[Any, Any] = {ImageMetaKey.FILENAME_OR_OBJ: name}
    if isinstance(source, str | os.PathLike) and (apart := _apart(Path(source), affine, volume.shape)) is not None:
        meta[APART] = apart
    return MetaTensor(volume[None], affine=affine, meta=meta)


def place_warnings(*images: MetaTensor) -> list[str]:
    """Return in plain words for which images two programs read two places out of one file."""
    return [
        f"the header of {name_of(image)} says in two ways where it lies: nibabel and MONAI, by which this result goes, "
        f"and ITK (SimpleITK, ANTs, 3D Slicer) read places up to {image.meta[APART]:.3g} mm apart"
        for image in images
        if APART in image.meta
    ]


def _apart(path: Path, affine: Tensor, shape: Sequence[int]) -> float | None:
    """Return how far ITK's reading of a NIfTI's place is from this one, in mm; None where they agree, or cannot."""
    theirs = affine_by_itk(path) if path.is_file() and path.name.endswith(NIFTI) else None
    if theirs is None:
        return None
    ends = [torch.tensor([0.0, n - 1.0], dtype=torch.float64) for n in (*shape, 1, 1)[:3]]
    corners = torch.cat([torch.cartesian_prod(*ends), torch.ones(8, 1, dtype=torch.float64)], dim=1)
    apart = float(((theirs - affine) @ corners.T)[: len(shape)].norm(dim=0).max())  # a picture has no height in ITK
    return apart if apart > SAME_PLACE * float(affine[:3, : len(shape)].norm(dim=0).min()) else None


def _singular(matrix: Tensor) -> bool:
    lengths = matrix.norm(dim=0)
    return bool((lengths == 0).any()) or abs(float(torch.linalg.det(matrix / lengths))) < 1e-6


def _load(source: Any, name: str, what: str) -> tuple[Tensor, Tensor]:
    """Return the voxels in fp32, without a channel dimension, and the RAS affine (4, 4)."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir() or (path.parent.is_dir() and path.suffix[1:].isdigit() and not path.exists()):
            source = read_series(path, what)  # a folder, or one of its series by number
        elif path.exists():
            volume = _load_file(path, what)
            return volume.as_tensor(), _millimetres(
                volume.affine, volume.meta.get("xyzt_units", 0)
            )  # ITK's formats give 2D a 3 x 3 affine
        else:
            raise InputError(f"{what} {path}: expected a file, found none")
    if isinstance(source, MetaTensor):
        affine = _millimetres(source.affine, source.meta.get("xyzt_units", 0))
        if source.meta.get(MetaKeys.SPACE) == SpaceKeys.LPS:
            affine = torch.diag(ras_to_lps(torch.ones(4, dtype=torch.float64))) @ affine
        whole = source.as_tensor().detach().cpu().float()
        return whole[0] if whole.ndim > 2 and whole.shape[0] == 1 else whole, affine
    if isinstance(source, SpatialImage):
        if source.affine is None:
            raise InputError(f"{what} {name}: expected an image with an affine, found none")
        units = source.header.get("xyzt_units", 0) if isinstance(source, nib.Nifti1Pair) else 0
        values = np.array(source.dataobj, dtype=np.float32)
        return torch.from_numpy(values), _millimetres(torch.from_numpy(source.affine), units)
    if hasattr(source, "GetDirection") and hasattr(source, "GetSpacing"):
        array, affine = from_itk(source)
        return torch.from_numpy(np.array(array, dtype=np.float32)), affine
    raise InputError(
        f"{what} {name}: expected a path or an image of nibabel, SimpleITK, ITK or MONAI, found one without an affine"
    )


def _millimetres(affine: Tensor, units: Any) -> Tensor:
    """Return an affine as (4, 4) in millimetres, given a NIfTI's ``xyzt_units``."""
    whole = to_affine_nd(3, affine).double()
    whole[:3] *= MILLIMETRES.get(int(units) & 7, 1.0)
    return whole


def _load_file(path: Path, what: str) -> MetaTensor:
    try:
        volume: MetaTensor = LoadImage(image_only=True, ensure_channel_first=False, dtype=np.float32)(path)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(
            f"{what} {path}: expected an image file that can be read, found {path.stat().st_size:,} bytes that cannot "
            f"({type(error.__cause__ or error).__name__}: {reason})"
        ) from error
    if volume.ndim == 3 and volume.meta.get(MetaKeys.ORIGINAL_CHANNEL_DIM) == -1 and volume.shape[-1] > 1:
        raise InputError(f"{what} {path}: expected one channel, found {volume.shape[-1]}: a colour picture")
    if int(volume.meta.get("datatype", 0)) in COMPLEX:
        raise InputError(f"{what} {path}: expected real numbers, found complex ones (take the magnitude)")
    return volume


def read_image(path: Any, *, spatial_dims: int | None = 3, what: str = "image") -> MetaTensor:
    """Read an intensity image, (1, *spatial); besides :func:`read_volume`'s errors, a constant image is one."""
    image = read_volume(path, spatial_dims=spatial_dims, what=what)
    if image.min() == image.max():
        raise InputError(
            f"{what} {name_of(path)}: expected an image with contrast, "
            f"found the value {float(image.min()):g} everywhere"
        )
    return image


def read_label(path: Any, image: MetaTensor, image_path: Any, *, spatial_dims: int | None = 3) -> MetaTensor:
    """Read the label map of an image, (1, *spatial); both may be what :func:`read_volume` takes.

    Raises:
        InputError: besides :func:`read_volume`'s errors, if the label is not on the image's grid, is empty, or has
            values that are negative or not whole numbers.
    """
    label = read_volume(path, spatial_dims=spatial_dims, what="label")
    name, image_name = name_of(path), name_of(image_path)
    for factor in MILLIMETRES.values():  # a label map that does not name its unit has its image's
        scaled = torch.diag(torch.tensor([factor] * 3 + [1.0], dtype=torch.float64)) @ label.affine
        if torch.allclose(scaled, image.affine, atol=1e-4 * float(image.affine.abs().max()), rtol=0):
            label.affine = scaled
    if label.shape != image.shape or not torch.allclose(label.affine, image.affine, atol=1e-2, rtol=0):
        same = label.shape == image.shape
        found = "another affine" if same else f"shape {tuple(label.shape[1:])} instead of {tuple(image.shape[1:])}"
        raise InputError(f"label {name}: expected the grid of its image {image_name}, found {found}")
    if not torch.equal(label, label.round()) or label.min() < 0:
        raise InputError(f"label {name}: expected whole numbers from 0 up, found {label_range(label)}")
    if label.max() > LARGEST_LABEL:
        raise InputError(f"label {name}: expected values up to {LARGEST_LABEL:,}, found one of {int(label.max()):,}")
    if not label.any():
        raise InputError(f"label {name}: expected at least one labelled voxel, found only background")
    return label


def label_range(label: Tensor) -> str:
    """Describe a label map's values for a message."""
    return f"values from {float(label.min()):g} to {float(label.max()):g}, some of them fractions or negative"


def write_image(path: str | Path, image: Tensor, affine: Tensor) -> None:
    """Write an image or label map (1, *spatial) with its RAS affine (4, 4); integer tensors keep their type."""
    data = image[0].cpu().numpy()
    _write(path, data, affine)


def write_displacement(path: str | Path, displacement: Tensor, affine: Tensor) -> None:
    """Write a displacement field (d, *spatial) in RAS millimetres as ITK, ANTs and 3D Slicer read it.

    A vector NIfTI (intent 1007, shape (X, Y, Z, 1, d), Z = 1 in 2D) in LPS millimetres on the fixed image's grid.
    """
    vectors = ras_to_lps(displacement).movedim(0, -1).float().cpu().numpy()
    while vectors.ndim < 5:
        vectors = vectors[..., None, :]
    _write(path, vectors, affine, intent=VECTOR_INTENT)


def _write(path: str | Path, data: np.ndarray, affine: Tensor, intent: int | None = None) -> None:
    matrix = affine.double().cpu().numpy()
    file = nib.Nifti1Image(data, matrix)
    file.set_sform(matrix, code=1)
    file.set_qform(matrix, code=1)
    if not np.allclose(file.get_qform(), matrix, atol=1e-4):  # a sheared affine: only the sform can express it
        file.set_qform(None, code=0)
    file.header.set_xyzt_units("mm")
    if intent is not None:
        file.header["intent_code"] = intent
    with replacing(path) as temporary:
        if temporary.suffix == ".gz":  # a tenth of the time that zlib takes over a field
            with open(temporary, "wb") as raw, IGzipFile("", "wb", 1, raw, mtime=0) as packed:
                file.to_stream(packed)
        else:
            nib.save(file, temporary)
