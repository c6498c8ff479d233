"""Convolutions as fast as the processor does them, where no gradient is asked for.

Where torch meets a batch of one image that is small, it takes its convolutions in single precision for too little work
to hand to oneDNN (``use_mkldnn`` in ATen/native/Convolution.cpp) and lays every window out in memory instead. Nearly
all layers of a registration are such: a pair took three to four times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@contextmanager
def quick_convolutions(device: torch.device, *, half: bool) -> Iterator[None]:
    """Compute a network's forward pass in the way that is fastest where it runs.

    Args:
        device: where the network computes.
        half: in bfloat16, see :func:`~monai_rl_reg.inferer.half_pays`; else in the precision that is set already, which
            on a CPU, where it is single, is left to oneDNN.
    """
    mixed = half or torch.is_autocast_enabled(device.type)
    single = not mixed and device.type == "cpu" and torch.backends.mkldnn.is_available()
    with (
        torch.autocast(device.type, torch.bfloat16) if half else nullcontext(),
        SingleImageMode() if single else nullcontext(),
    ):
        yield


class SingleImageMode(TorchFunctionMode):
    """Leave the convolutions of a single image in single precision to oneDNN, as torch does those of two."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call ``func``, or what does the same."""
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS and _is_single_image(*args[:2]):
            return _convolve(*args, **kwargs)
        if func in _TRANSPOSED and _is_single_image(*args[:2]):
            return _doubled(func, *args, **kwargs)
        return func(*args, **kwargs)


_CONVOLUTIONS = (F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose2d, F.conv_transpose3d)


def _is_single_image(*operands: Any) -> bool:
    if len(operands) < 2 or operands[0].ndim != operands[1].ndim:
        return False
    x, weight = operands
    return x.shape[0] == 1 and x.dtype == weight.dtype == torch.float32


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str):
        return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias, stride, padding, dilation, groups)
    if set(weight.shape[2:]) == {1} and (_one(stride), _one(padding), groups) == (1, 0, 1):  # a product of matrices
        made = weight.flatten(1) @ x.flatten(2)
        return (made if bias is None else made + bias[:, None]).unflatten(2, x.shape[2:])
    sizes: list[Any] = [(n,) * (x.ndim - 2) if isinstance(n, int) else n for n in (padding, stride, dilation)]
    convolve: Any = torch.mkldnn_convolution  # torch's own description of it is wrong
    convolved: Tensor = convolve(x, weight, bias, *sizes, groups)
    return convolved


def _doubled(
    transposed: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """Convolve transposed, from x (1, A, *spatial) to twice its size, by a usual convolution.

    In each direction the even voxels of the result meet other taps of the kernel than the odd ones. So each of the 2^d
    kinds of voxels is a channel of its own, with half of the kernel in every direction, and they are put in their
    places: two to three times as fast as what torch does with a batch of two, the least for which it asks oneDNN.
    """
    pad = _one(padding)
    usual = pad in (0, 1) and (_one(stride), _one(output_padding), groups, _one(dilation)) == (2, 0, 1, 1)
    if not usual or set(weight.shape[2:]) != {2 + 2 * pad}:
        more = stride, padding, output_padding, groups, dilation
        return transposed(x.expand(2, *x.shape[1:]), weight, bias, *more)[:1]
    kinds = list(product((0, 1), repeat=x.ndim - 2))
    kernels = torch.cat([_every_second(weight.transpose(0, 1), [(odd + pad) % 2 for odd in kind]) for kind in kinds])
    if pad > 0:
        kernels = kernels.flip(list(range(2, x.ndim)))
    biases = None if bias is None else bias.repeat(len(kinds))
    parts = _convolve(x, kernels, biases, padding=pad).chunk(len(kinds), dim=1)
    size = 1, weight.shape[1], *(2 * n for n in x.shape[2:])
    made = torch.empty(size, dtype=x.dtype, device=x.device)
    for kind, part in zip(kinds, parts, strict=True):
        for dim, odd in enumerate(kind, start=2):
            part = part.narrow(dim, odd * pad, x.shape[dim])
        _every_second(made, kind).copy_(part)
    return made


def _one(size: Any) -> Any:
    """Return the size of all directions, None where they differ."""
    sizes = {size} if isinstance(size, int) else set(size)
    return sizes.pop() if len(sizes) == 1 else None


def _every_second(x: Tensor, starts: Iterable[int]) -> Tensor:
    """Return a view of (A, B, *spatial) with every second voxel in each direction, from the first or the second on."""
    places: Any = (..., *(slice(start, None, 2) for start in starts))
    view: Tensor = x[places]
    return view
