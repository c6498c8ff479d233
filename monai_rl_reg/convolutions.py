"""Convolutions as fast as the processor does them, where no gradient is asked for.

Where torch meets a batch of one image that is small, it takes its convolutions in single precision for too little work
to hand to oneDNN (``use_mkldnn`` in ATen/native/Convolution.cpp) and lays every window out in memory instead. Nearly
all layers of a registration are such: a pair took three to four times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
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
            # oneDNN's own is not to be called by itself: twice the image costs less than the other way
            return func(args[0].expand(2, *args[0].shape[1:]), *args[1:], **kwargs)[:1]
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
    sizes: list[Any] = [(n,) * (x.ndim - 2) if isinstance(n, int) else n for n in (padding, stride, dilation)]
    convolve: Any = torch.mkldnn_convolution  # torch's own description of it is wrong
    convolved: Tensor = convolve(x, weight, bias, *sizes, groups)
    return convolved
