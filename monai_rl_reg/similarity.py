"""How alike two images are: what registration maximises, and is judged by where there are no labels.

A configuration names one of these classes; the task, the refinement, the first alignment, the rule to stop and the
quality figures all follow it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import combinations

import torch
from monai.losses import GlobalMutualInformationLoss
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.metrics import local_ncc
from monai_rl_reg.separable import gradient


class Similarity(nn.Module, ABC):
    """A differentiable similarity of two images, more is better.

    Attributes:
        name: in figures and logs.
        gain: what a step must gain for another one to follow, when steps stop by themselves.
        one_modality: whether it takes both images to be of one modality. If so, the first alignment goes by the
            correlation of intensities, else by their mutual information.
    """

    name: str
    gain: float
    one_modality: bool

    @abstractmethod
    def forward(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """Return the similarity (B,) of images (B, 1, *spatial) scaled to [0, 1]."""

    def estimate(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """Return nearly the same, where that is quicker: what the :meth:`pull` is the gradient of."""
        return self(moved, fixed)

    def pull(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """Return where each voxel of ``moved`` should look for the similarity to grow, (B, d, *spatial).

        The gradient of :meth:`estimate` with respect to a displacement of each voxel, times the number of voxels, so
        that it does not depend on the images' size; no gradient flows back through it. Images are (B, 1, *spatial).
        """
        return self.value_and_pull(moved, fixed)[1]

    def value_and_pull(self, moved: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`estimate`, (B,), and its :meth:`pull`, in the time of the latter alone."""
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(moved.device.type, enabled=False):
            image = moved.detach().float().clone().requires_grad_()
            value = self.estimate(image, fixed.clone() if fixed.is_inference() else fixed)
            (gain,) = torch.autograd.grad(value.sum(), image)
        return value.detach(), gain[0].numel() * gain * gradient(moved.detach().float())


class LocalNCC(Similarity):
    """Mean squared local normalised cross-correlation in [0, 1], for images of one modality.

    Args:
        spatial_dims: 2 or 3.
        window: its size in voxels, odd.
        scales: levels of a pyramid to take the mean over; every level halves the images.
    """

    name = "ncc"
    gain = 5e-3
    one_modality = True

    def __init__(self, spatial_dims: int = 3, *, window: int = 9, scales: int = 1) -> None:
        super().__init__()
        self.window = window
        self.scales = scales
        self.pool = F.avg_pool3d if spatial_dims == 3 else F.avg_pool2d

    def forward(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """Return the mean over the scales, (B,)."""
        return self._mean(moved, fixed, every=1)

    def estimate(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """Return the mean over the windows around every second voxel in each direction, in two fifths of the time.

        Overlapping as they are, they tell nearly as much as all of them.
        """
        return self._mean(moved, fixed, every=2)

    def _mean(self, moved: Tensor, fixed: Tensor, every: int) -> Tensor:
        total = local_ncc(moved, fixed, self.window, every)
        for _ in range(self.scales - 1):
            moved, fixed = self.pool(moved, 2), self.pool(fixed, 2)
            total = total + local_ncc(moved, fixed, self.window, every)
        return total / self.scales


class MutualInformation(Similarity):
    """MONAI's global mutual information of the intensities in nats, for images of two modalities.

    Args:
        spatial_dims: 2 or 3.
        bins: of the joint histogram, in each image.
        most_voxels: of larger images the means of blocks of 2, 3, ... voxels a side count: the Parzen windows of all
            voxels would take ``bins`` times the images' memory.
    """

    name = "mutual_information"
    gain = 5e-3
    one_modality = False

    def __init__(self, spatial_dims: int = 3, *, bins: int = 24, most_voxels: int = 300_000) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.pool = F.avg_pool3d if spatial_dims == 3 else F.avg_pool2d
        self.most_voxels = most_voxels
        self.loss = GlobalMutualInformationLoss(num_bins=bins, reduction="none")

    def forward(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """Return the mutual information (B,)."""
        every = math.ceil((moved[0].numel() / self.most_voxels) ** (1 / self.spatial_dims))
        if every > 1:
            moved, fixed = self.pool(moved.float(), every), self.pool(fixed.float(), every)
        with torch.autocast(moved.device.type, enabled=False):  # the joint histogram needs its digits
            information: Tensor = -self.loss(moved.float(), fixed.float()).flatten()
        return information


class MIND(Similarity):
    """Agreement of the MIND-SSC descriptors of both images, for images of two modalities.

    At a voxel x the descriptor has a channel for each two neighbours a, b of x in different directions::

        D_ab(x) = mean over a patch of (I(x + a) - I(x + b))^2
        MIND_ab(x) = exp(-(D_ab(x) - min D(x)) / mean D(x))

    so that it tells the shape of the surroundings, not their intensities. The similarity is 1 less the mean squared
    difference of the descriptors, in [0, 1].

    References:
        M. P. Heinrich et al., Towards realtime multimodal fusion for image-guided interventions using
        self-similarities, MICCAI 2013.

    Args:
        spatial_dims: 2 or 3.
        dilation: distance of the neighbours in voxels.
        radius: of the patches in voxels.
    """

    name = "mind"
    gain = 5e-4
    one_modality = False

    def __init__(self, spatial_dims: int = 3, *, dilation: int = 2, radius: int = 1) -> None:
        super().__init__()
        self.dilation = dilation
        self.radius = radius
        self.pool = F.avg_pool3d if spatial_dims == 3 else F.avg_pool2d
        # (axis, start of the slice in an image padded by the dilation)
        around = [(axis, start) for axis in range(2, spatial_dims + 2) for start in (0, 2 * dilation)]
        self.pairs = [(a, b) for a, b in combinations(around, 2) if a[0] != b[0]]

    def forward(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """Return 1 less the mean squared difference of the descriptors, (B,)."""
        off = self.describe(moved) - self.describe(fixed)
        return 1 - off.square().flatten(1).mean(1)

    def describe(self, image: Tensor) -> Tensor:
        """Return the descriptors (B, C, *spatial) of images (B, 1, *spatial): 12 channels in 3D, 4 in 2D."""
        size = image.shape[2:]
        padded = F.pad(image.float(), [self.dilation] * 2 * len(size), mode="replicate")

        def neighbour(axis: int, start: int) -> Tensor:
            x = padded
            for dim, n in enumerate(size, start=2):
                x = x.narrow(dim, start if dim == axis else self.dilation, n)
            return x

        squares = torch.cat([(neighbour(*a) - neighbour(*b)).square() for a, b in self.pairs], dim=1)
        patch = 2 * self.radius + 1
        distance = self.pool(F.pad(squares, [self.radius] * 2 * len(size), mode="replicate"), patch, 1)
        distance = distance - distance.amin(1, keepdim=True)
        scale = distance.mean(1, keepdim=True)
        typical = scale.detach().flatten(1).mean(1).reshape(-1, *[1] * (scale.ndim - 1))
        # flat regions have nothing to tell: their noise must not be blown up, nor an edge drown the rest
        scale = scale.clamp(min=1e-6).maximum(1e-3 * typical).minimum((1e3 * typical).clamp(min=1e-6))
        return torch.exp(-distance / scale)


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation of the intensities of two volumes, over all voxels."""
    a, b = a.flatten().double() - a.double().mean(), b.flatten().double() - b.double().mean()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-12))


def mutual_information(a: Tensor, b: Tensor, bins: int = 32) -> float:
    """Return the mutual information in nats of the intensities of two volumes in [0, 1], by their joint histogram."""
    index = [(x.flatten().double() * bins).long().clamp(0, bins - 1) for x in (a, b)]
    joint = torch.bincount(index[0] * bins + index[1], minlength=bins * bins).reshape(bins, bins).double()
    p = joint / joint.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    there = p > 0
    return float((p[there] * (p[there] / independent[there]).log()).sum())


def title(name: str) -> str:
    """Return a similarity's name as one writes it: NCC, MIND, mutual information."""
    return name.replace("_", " ") if "_" in name else name.upper()
