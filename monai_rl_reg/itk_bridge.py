"""Images, DICOM series and transforms by way of SimpleITK; LPS on its side, RAS on ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_rl_reg.errors import InputError
from monai_rl_reg.geometry import DenseTransform, WorldTransform, ras_to_lps, reduced

FIELD_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
"""Files that hold a displacement field as an image of vectors, as ANTs writes them, and not as an ITK transform."""

UNEVEN = 0.1
"""Share of the distance of a series' slices by which it may vary."""


def flip(d: int) -> Tensor:
    """Return the (d+1, d+1) matrix from RAS to LPS, which is its own inverse."""
    return torch.diag(torch.cat([ras_to_lps(torch.ones(d, dtype=torch.float64)), torch.ones(1, dtype=torch.float64)]))


def from_itk(image: Any) -> tuple[np.ndarray, Tensor]:
    """Return the voxels (*spatial, channels) in array order and the RAS affine (4, 4) of a SimpleITK or ITK image."""
    array = sitk.GetArrayFromImage(image) if isinstance(image, sitk.Image) else np.array(image)
    d = len(image.GetSpacing()) if isinstance(image, sitk.Image) else int(image.GetImageDimension())
    array = array.transpose(*range(d - 1, -1, -1), *range(d, array.ndim))
    return array, _affine_of(image, d)


def _affine_of(image: Any, d: int) -> Tensor:
    """Return the RAS affine (4, 4) of what has spacing, origin and direction in ITK; of more dimensions the first 3."""
    n = min(d, 3)
    spacing, origin = (torch.tensor(list(v)[:n], dtype=torch.float64) for v in (image.GetSpacing(), image.GetOrigin()))
    direction = torch.as_tensor(np.asarray(image.GetDirection(), dtype=np.float64).reshape(d, d))[:n, :n]
    lps = torch.eye(n + 1, dtype=torch.float64)
    lps[:n, :n], lps[:n, n] = direction * spacing, origin
    ras = flip(n) @ lps
    affine = torch.eye(4, dtype=torch.float64)
    affine[:n, :n], affine[:n, 3] = ras[:n, :n], ras[:n, n]
    return affine


def affine_by_itk(path: str | Path) -> Tensor | None:
    """Return the RAS affine (4, 4) that ITK finds in the header of an image file; None where it can not."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    told = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(told)
    return _affine_of(reader, reader.GetDimension())


def to_itk(values: Tensor, affine: Tensor, *, vectors: bool = False) -> sitk.Image:
    """Return a SimpleITK image of an image (1, *spatial) or, with ``vectors``, of RAS vectors (d, *spatial) as LPS.

    Args:
        values: the voxels; images become 32-bit floats, vectors 64-bit.
        affine: (4, 4), RAS.
        vectors: whether they are vectors.
    """
    d = values.ndim - 1
    array = ras_to_lps(values).movedim(0, -1).double() if vectors else values[0].float()
    array = array.permute(*range(d - 1, -1, -1), *range(d, array.ndim))
    image = sitk.GetImageFromArray(array.contiguous().cpu().numpy(), isVector=vectors)
    lps = flip(d) @ reduced(affine.double().cpu(), d)
    spacing = lps[:d, :d].norm(dim=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:d, :d] / spacing).flatten().tolist())
    image.SetOrigin(lps[:d, d].tolist())
    return image


def matrix_of(transform: sitk.Transform) -> Tensor:
    """Return the RAS matrix (4, 4) of a linear SimpleITK transform."""
    d = transform.GetDimension()
    origin = torch.tensor(transform.TransformPoint([0.0] * d), dtype=torch.float64)
    lps = torch.eye(d + 1, dtype=torch.float64)
    for i in range(d):
        unit = [float(i == j) for j in range(d)]
        lps[:d, i] = torch.tensor(transform.TransformPoint(unit), dtype=torch.float64) - origin
    lps[:d, d] = origin
    ras = flip(d) @ lps @ flip(d)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:d, :d], matrix[:d, 3] = ras[:d, :d], ras[:d, d]
    return matrix


def read_transform(path: str | Path, fixed: MetaTensor) -> WorldTransform:
    """Read a transform from fixed to moving space: an ITK transform file, or a displacement field as an image.

    Args:
        path: ``.h5``, ``.tfm``, ``.txt``, ``.mat`` (ANTs) or ``.xfm``; or an image of vectors.
        fixed: (1, *spatial); a transform that is not linear is sampled on its grid. Beyond, it goes on as at the edge,
            where a displacement field of ITK ends, and leaves points where they are.

    Raises:
        InputError: if the file is missing, cannot be read, has another number of dimensions, or cannot be inverted.
    """
    d = fixed.ndim - 1
    if not Path(path).is_file():
        raise InputError(f"initial transform {path}: expected a file, found none")
    try:
        if str(path).lower().endswith(FIELD_SUFFIXES):
            field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
            transform: sitk.Transform = sitk.DisplacementFieldTransform(field)
        else:
            transform = sitk.ReadTransform(str(path))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"initial transform {path}: expected an ITK transform (.h5, .tfm, .txt, .mat, .xfm) or a displacement "
            "field (.nii.gz, .nrrd, .mha) that can be read, found a file that cannot"
        ) from error
    if transform.GetDimension() != d:
        raise InputError(f"initial transform {path}: expected one of {d} dimensions, found {transform.GetDimension()}")
    if transform.IsLinear():
        matrix = matrix_of(transform)
        if not torch.isfinite(matrix).all() or abs(float(torch.linalg.det(matrix))) < 1e-9:
            raise InputError(f"initial transform {path}: expected one that can be inverted, found {matrix.tolist()}")
        return matrix
    affine = fixed.affine.double()
    grid = to_itk(fixed.as_tensor(), affine)
    field = sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat32, grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection()
    )
    vectors = torch.from_numpy(from_itk(field)[0].copy()).movedim(-1, 0)
    if not torch.isfinite(vectors).all():
        raise InputError(f"initial transform {path}: expected finite displacements, found some NaN or infinite")
    return DenseTransform(ras_to_lps(vectors), affine)


def write_transform(path: str | Path, displacement: Tensor, affine: Tensor) -> None:
    """Write a displacement field as an ITK transform in LPS, ``.h5`` or ``.tfm`` by the path.

    Args:
        path: of the file.
        displacement: (d, *spatial) in RAS millimetres.
        affine: (4, 4), of its grid.

    Raises:
        OSError: if there is no room.
    """
    transform = sitk.DisplacementFieldTransform(to_itk(displacement, affine, vectors=True))
    try:
        sitk.WriteTransform(transform, str(path))
    except RuntimeError as error:
        raise OSError(f"ITK could not write {Path(path).name}") from error


def read_series(folder: str | Path, what: str) -> sitk.Image:
    """Read the DICOM series in a folder; ``folder/SERIES`` names one of several by its instance UID.

    Raises:
        InputError: if there is none, there are several (they are listed), or it cannot be read.
    """
    folder, wanted = Path(folder), ""
    if not folder.is_dir():
        folder, wanted = folder.parent, folder.name
    reader = sitk.ImageSeriesReader()
    found = {uid: reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in reader.GetGDCMSeriesIDs(str(folder))}
    if wanted:
        found = {uid: files for uid, files in found.items() if uid == wanted}
    if not found:
        raise InputError(f"{what} {folder / wanted}: expected a file or a folder with a DICOM series, found none")
    if len(found) > 1:
        listed = "; ".join(f"{uid} ({_describe(files)})" for uid, files in sorted(found.items()))
        raise InputError(
            f"{what} {folder}: expected one DICOM series, found {len(found)}: {listed}; name one as {folder}/SERIES"
        )
    reader.SetFileNames(next(iter(found.values())))
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(
            f"{what} {folder}: expected a DICOM series that can be read, found {str(error).strip().splitlines()[-1]}"
        ) from error
    gaps = _gaps(reader, len(reader.GetFileNames()))
    if len(gaps) > 1 and gaps.max() - gaps.min() > UNEVEN * float(np.median(gaps)):
        raise InputError(
            f"{what} {folder}: expected slices at equal distances, found from {gaps.min():.4g} to {gaps.max():.4g} mm "
            "(is one missing?)"
        )
    return image


def _gaps(reader: sitk.ImageSeriesReader, count: int) -> np.ndarray:
    """Return the distances in mm from slice to slice of the series that was read; none where it does not say."""
    position, orientation = "0020|0032", "0020|0037"
    if not all(reader.HasMetaDataKey(i, key) for i in range(count) for key in (position, orientation)):
        return np.zeros(0)
    row, column = np.array(reader.GetMetaData(0, orientation).split("\\"), dtype=float).reshape(2, 3)
    places = [np.array(reader.GetMetaData(i, position).split("\\"), dtype=float) for i in range(count)]
    return np.abs(np.diff(np.stack(places) @ np.cross(row, column)))


def _describe(files: tuple[str, ...]) -> str:
    reader = sitk.ImageFileReader()
    reader.SetFileName(files[0])
    reader.LoadPrivateTagsOn()
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return f"{len(files)} files"
    description = reader.GetMetaData("0008|103e").strip() if reader.HasMetaDataKey("0008|103e") else ""
    return f"{description}, {len(files)} files" if description else f"{len(files)} files"
