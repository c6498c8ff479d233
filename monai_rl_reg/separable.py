"""Filters that work along each direction by itself, as products with small matrices: what a processor does fastest.

Windows, interpolation and Gaussians pass over a volume many times when each neighbour is added by itself; here they
pass over it once a direction. The products are in the precision of the volume, whatever autocast says: NCC takes
variances from differences of such sums, and displacement fields are interpolated by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from monai.networks.layers import gaussian_1d
from torch import Tensor
from torch.nn import functional as F


def box_sum(x: Tensor, size: int, every: int = 1) -> Tensor:
    """Return the sums over windows of ``size`` voxels a side, odd, of (B, C, *spatial), with zeros around.

    The windows lie around every voxel or, in each direction, around every second, third, ... from the first on.
    """
    return _filtered(x, [_window(x, n, size, every) for n in x.shape[2:]])


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Return (B, C, *spatial) linearly interpolated to ``factor`` times its size, as torch's ``interpolate`` does."""
    return _filtered(x, [_interpolation(x, n, factor) for n in x.shape[2:]])


def smooth(x: Tensor, sigma: float) -> Tensor:
    """Return (B, C, *spatial) smoothed by a Gaussian, ``sigma`` in voxels; what lies at the edge goes on beyond it."""
    return _filtered(x, [_gaussian(x, n, sigma) for n in x.shape[2:]])


def slopes(x: Tensor) -> list[Tensor]:
    """Return central differences of (B, C, *spatial) in each direction, one-sided at the edges, as torch.gradient."""
    return [_along(x, dim, _differences(x, n)) for dim, n in enumerate(x.shape[2:], start=2)]


@torch.no_grad()
def gradient(image: Tensor) -> Tensor:
    """Return the :func:`slopes` of (B, 1, *spatial) as (B, d, *spatial), to which no gradient flows back.

    Written in place, in a fifth of the time of a large volume's products.
    """
    found = image.new_zeros(len(image), image.ndim - 2, *image.shape[2:])
    for dim, n in enumerate(image.shape[2:], start=2):
        slope = found[:, dim - 2 : dim - 1]
        if n > 2:
            torch.sub(image.narrow(dim, 2, n - 2), image.narrow(dim, 0, n - 2), out=slope.narrow(dim, 1, n - 2)).div_(2)
        if n > 1:
            for at in (0, n - 1):
                first = min(at, n - 2)
                torch.sub(image.narrow(dim, first + 1, 1), image.narrow(dim, first, 1), out=slope.narrow(dim, at, 1))
    return found


def _filtered(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    for dim, matrix in reversed(list(enumerate(matrices, start=2))):
        x = _along(x, dim, matrix)
    return x


def _along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """Multiply one direction by a matrix, (before, after)."""
    with torch.autocast(x.device.type, enabled=False):
        multiply = _Product.apply if x.device.type == "cuda" else torch.matmul
        if dim == x.ndim - 1:
            return multiply(x, matrix)
        size = *x.shape[:dim], matrix.shape[1], *x.shape[dim + 1 :]
        return multiply(matrix.T, x.flatten(dim + 1)).reshape(size)


class _Product(torch.autograd.Function):
    """A matrix product that stays fp32 where CUDA is allowed TF32, as NVIDIA's containers allow it.

    Sums over windows are subtracted from each other: with TF32's ten bits little is left of a faint texture's NCC. One
    of the two factors is a constant matrix.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        with _full_precision():
            return a @ b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False), _full_precision():
            return (
                gradient @ b.mT if ctx.needs_input_grad[0] else None,
                a.mT @ gradient if ctx.needs_input_grad[1] else None,
            )


@contextmanager
def _full_precision() -> Iterator[None]:
    backend: Any = torch.backends.cuda.matmul
    name, full = ("fp32_precision", "ieee") if hasattr(backend, "fp32_precision") else ("allow_tf32", False)
    before = getattr(backend, name)
    setattr(backend, name, full)
    try:
        yield
    finally:
        setattr(backend, name, before)


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make each matrix once, where and as precise as a volume is, and so that training may use what inference made."""

    @lru_cache(maxsize=128)
    def kept(device: torch.device, dtype: torch.dtype, *arguments: float) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments).to(device, dtype)

    return lambda x, *arguments: kept(x.device, x.dtype, *arguments)


@_kept
def _window(n: int, size: int, every: int) -> Tensor:
    return ((torch.arange(n)[:, None] - torch.arange(0, n, every)).abs() <= size // 2).float()


@_kept
def _interpolation(n: int, factor: int) -> Tensor:
    return F.interpolate(torch.eye(n)[None], scale_factor=factor, mode="linear", align_corners=False)[0]


@_kept
def _differences(n: int) -> Tensor:
    return torch.gradient(torch.eye(n), dim=1)[0] if n > 1 else torch.zeros(1, 1)


@_kept
def _gaussian(n: int, sigma: float) -> Tensor:
    weights = gaussian_1d(torch.tensor(sigma))
    far = len(weights) // 2
    sources = (torch.arange(n) + torch.arange(-far, far + 1)[:, None]).clamp(0, n - 1)
    matrix = torch.zeros(n, n)
    for source, weight in zip(sources, weights, strict=True):
        matrix[source, torch.arange(n)] += weight
    return matrix
