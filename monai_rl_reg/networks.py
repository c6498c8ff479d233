"""The networks of the method: planner and actor (the policy) and the twin critics, in 2D and 3D.

One step of the policy, in the paper's words: the *planner* reads the state and draws a low-dimensional stochastic
*plan*; the *actor* turns plan and state into the *action* (for registration, one small displacement field); the
*critics* judge the plan, not the action, which is what keeps the value function tractable.

References:
    RL-I2IT, arXiv 2309.13672; SPAC, arXiv 2112.07415; tanh-squashed Gaussian: SAC, arXiv 1801.01290, appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Pool
from monai.networks.layers.utils import get_act_layer
from torch import Tensor, nn
from torch.nn import functional as F

LOG_STD_RANGE = (-5.0, 1.0)
"""The planner's log standard deviation before squashing stays in this range."""
ACTIVATION = ("LEAKYRELU", {"negative_slope": 0.1, "inplace": True})
"""Of every layer."""
VALUE_WIDTH = 64
"""Of the layers that end in a critic's value."""


def _block(
    spatial_dims: int, in_channels: int, out_channels: int, *, stride: int = 1, kernel_size: int = 3
) -> nn.Module:
    # Without normalisation: it takes away how large the remaining misalignment is, and with it the policy learnt
    # several times slower, and critics that saw the images hardly at all.
    return Convolution(
        spatial_dims,
        in_channels,
        out_channels,
        strides=stride,
        kernel_size=kernel_size,
        act=ACTIVATION,
        norm=None,
        adn_ordering="NA",
    )


def _crop(x: Tensor, size: list[int]) -> Tensor:
    for i, n in enumerate(size):
        x = x.narrow(i + 2, 0, n)
    return x


class _UpConvolution(nn.Module):
    """Convolution of what lies below, doubled in size by repeating its voxels, and what lies beside.

    Repeated voxels share their taps: the same sums come from a transposed convolution of the small map, whose kernel of
    4 adds up the kernel of 3, in a third of the products and without the large map. Of an odd size the last repetition
    is left out.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv: nn.Conv2d | nn.Conv3d = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 3, padding=1)
        self.act = get_act_layer(ACTIVATION)

    def forward(self, below: Tensor, beside: Tensor) -> Tensor:
        """Return (B, C, *spatial) from ``below`` (B, A, *half) and ``beside`` (B, D, *spatial)."""
        weight, bias = self.conv.weight, self.conv.bias
        taps = weight[:, : below.shape[1]].flip(list(range(2, weight.ndim))).transpose(0, 1)
        for dim in range(weight.ndim - 2):  # per direction, (k2, k1, k0) becomes (k2, k1 + k2, k0 + k1, k0)
            after, before = [0] * (2 * dim + 2), [0] * (2 * dim + 2)
            after[-1] = 1
            before[-2] = 1
            taps = F.pad(taps, after) + F.pad(taps, before)
        weight = weight[:, below.shape[1] :]
        if weight.ndim == 5:
            x = _crop(F.conv_transpose3d(below, taps, stride=2, padding=1), list(beside.shape[2:]))
            x += F.conv3d(beside, weight, bias, padding=1)
        else:
            x = _crop(F.conv_transpose2d(below, taps, stride=2, padding=1), list(beside.shape[2:]))
            x += F.conv2d(beside, weight, bias, padding=1)
        out: Tensor = self.act(x)
        return out


def channels_last(x: Tensor) -> Tensor:
    """Lay the channels of a voxel beside each other: convolutions in half precision are a fifth faster that way."""
    return x.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)


def _initialise(policy: nn.Module, heads: Sequence[nn.Module]) -> None:
    """Keep the signal's size from layer to layer (arXiv 1502.01852): without normalisation torch's own
    initialisation lets it die along the encoder. The heads start small: the first plans lie in the middle of their
    range, and an untrained policy leaves the image nearly as it is.
    """
    for module in policy.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, a=0.1)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for head in heads:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=1e-2) if parameter.ndim > 1 else nn.init.zeros_(parameter)


class Planner(nn.Module):
    """Encoder of the observation and the head of the plan's distribution, pi_phi(p given s).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the observation.
        channels: widths of the encoder's levels; every level halves the resolution.
        plan_channels: channels of the plan.
        plan_grid: spatial size of the plan; 1 in every direction makes it a vector.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: Sequence[int],
        plan_channels: int,
        plan_grid: Sequence[int],
    ) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        self.log_std_low, self.log_std_high = LOG_STD_RANGE
        self.levels = nn.ModuleList(
            nn.Sequential(_block(spatial_dims, a, b, stride=2), _block(spatial_dims, b, b)) for a, b in pairwise(widths)
        )
        self.head = nn.Sequential(
            Pool[Pool.ADAPTIVEAVG, spatial_dims](tuple(plan_grid)),
            _block(spatial_dims, channels[-1], channels[-1], kernel_size=1),
            Convolution(spatial_dims, channels[-1], 2 * plan_channels, kernel_size=1, conv_only=True),
        )

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return mean and log standard deviation before squashing, (B, P, *grid) each, and the levels' features."""
        features: list[Tensor] = []
        odd: list[int] = []
        for n in observation.shape[:1:-1]:
            odd += [0, n % 2]
        x = observation
        if max(odd) > 0:
            x = F.pad(x, odd, mode="replicate")  # even sizes: 0.001 of Dice in registration
        x = channels_last(x)
        for level in self.levels:
            x = level(x)
            features.append(x)
        mean, log_std = self.head(x).float().chunk(2, dim=1)
        log_std = self.log_std_low + 0.5 * (self.log_std_high - self.log_std_low) * (torch.tanh(log_std) + 1.0)
        return mean, log_std, features


class Actor(nn.Module):
    """Decoder that turns a plan and the planner's features into the bounded action, pi_psi(s, p).

    Args:
        spatial_dims: 2 or 3.
        channels: widths of the planner's levels, finest first.
        plan_channels: channels of the plan.
        out_channels: channels of the action.
        action_bound: the action lies in ``[-action_bound, action_bound]``, here and nowhere else.
        action_stride: the action has 1 / ``action_stride`` of the observation's resolution (1 or 2).
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: Sequence[int],
        plan_channels: int,
        out_channels: int,
        action_bound: float,
        action_stride: int,
    ) -> None:
        super().__init__()
        self.action_bound = action_bound
        self.mode = "trilinear" if spatial_dims == 3 else "bilinear"
        self.join = _block(spatial_dims, channels[-1] + plan_channels, channels[-1])
        self.levels = nn.ModuleList(
            _UpConvolution(spatial_dims, below + skip, skip)
            for below, skip in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.full = _block(spatial_dims, channels[0], channels[0]) if action_stride == 1 else nn.Identity()
        self.upsample_first = action_stride == 1
        self.head = Convolution(spatial_dims, channels[0], out_channels, kernel_size=3, conv_only=True)

    def forward(self, plan: Tensor, features: list[Tensor], size: list[int]) -> Tensor:
        """Return the action from the plan (B, P, *grid) and the planner's features.

        Its shape is (B, out_channels, *size), or that of the finest features at an ``action_stride`` of 2.
        """
        x = features[-1]
        plan = F.interpolate(plan.to(x.dtype), size=x.shape[2:], mode=self.mode, align_corners=False)
        x = self.join(channels_last(torch.cat([x, plan], dim=1)))
        deepest = len(features) - 1
        for i, level in enumerate(self.levels):
            x = level(x, features[deepest - 1 - i])
        if self.upsample_first:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        # fp32 from here on: a displacement in half precision is off by up to half a voxel in a large volume.
        action = self.head(self.full(x)).float()
        if self.upsample_first:  # after the convolutions, which would see zeros where it ends
            action = _crop(action, size)
        return self.action_bound * torch.tanh(action.contiguous())


class PlannerActor(nn.Module):
    """The policy: planner and actor. Any image size.

    ``forward`` is one deterministic step (the plan's mode), tensor in and tensor out, and scriptable;
    :meth:`sample` is the stochastic one.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the observation.
        out_channels: channels of the action.
        channels: widths of the encoder's levels, finest first; every level halves the resolution.
        plan_channels: channels of the plan; the plan has ``plan_channels * prod(plan_grid)`` numbers.
        plan_grid: ``None`` for a vector plan, else the spatial size of a map-shaped one.
        action_bound: largest absolute value of the action; for registration in voxels of the action's grid.
        action_stride: the action has 1 / ``action_stride`` of the observation's resolution, 1 or 2, rounded up.

    Raises:
        ValueError: if ``spatial_dims`` is not 2 or 3, ``action_stride`` not 1 or 2, ``plan_grid`` has another number
            of dimensions, or ``channels`` has fewer than two levels.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (16, 32, 64, 64),
        plan_channels: int = 64,
        plan_grid: Sequence[int] | None = None,
        action_bound: float = 1.0,
        action_stride: int = 1,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        if action_stride not in (1, 2):
            raise ValueError(f"action_stride must be 1 or 2, got {action_stride}")
        if len(channels) < 2:
            raise ValueError(f"channels must name at least two levels, got {tuple(channels)}")
        grid = tuple(plan_grid) if plan_grid is not None else (1,) * spatial_dims
        if len(grid) != spatial_dims:
            raise ValueError(f"plan_grid must have {spatial_dims} entries, got {grid}")
        self.plan_shape = (plan_channels, *grid)
        self.planner = Planner(spatial_dims, in_channels, channels, plan_channels, grid)
        self.actor = Actor(spatial_dims, channels, plan_channels, out_channels, action_bound, action_stride)
        _initialise(self, heads=[self.planner.head[-1], self.actor.head])

    def forward(self, observation: Tensor) -> Tensor:
        """One deterministic step: observation (B, in_channels, *spatial) to action (B, out_channels, *strided)."""
        return self.decide(observation)[1]

    def decide(self, observation: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the mode of the plan, (B, P, *grid), the action (B, out_channels, *strided), and the features."""
        mean, _, features = self.planner(observation)
        plan = torch.tanh(mean)
        return plan, self.actor(plan, features, list(observation.shape[2:])), features

    @torch.jit.unused
    def sample(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """One stochastic step, differentiable by reparameterisation.

        Args:
            observation: (B, in_channels, *spatial).

        Returns:
            plan (B, P, *grid) in (-1, 1), its log-probability (B,), action (B, out_channels, *strided), and the
            planner's features of every level, finest first.
        """
        plan, log_prob, features = self.draw(observation)
        return plan, log_prob, self.actor(plan, features, list(observation.shape[2:])), features

    @torch.jit.unused
    def draw(self, observation: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Draw a plan (B, P, *grid) without acting on it; return its log-probability (B,) and the features too."""
        mean, log_std, features = self.planner(observation)
        noise = torch.randn_like(mean)
        unsquashed = mean + log_std.exp() * noise
        # log N(u; mean, std) - log(1 - tanh(u)^2), the second in its numerically stable form
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - unsquashed - F.softplus(-2 * unsquashed))
        return torch.tanh(unsquashed), log_prob.flatten(1).sum(1), features


class Critic(nn.Module):
    """Q_theta(s, p): the value of a plan in a state, by the features that the planner found in it.

    The planner has learnt what is still to be done, and its features are the larger the more that is: mean, largest
    value and root mean square of every channel say it. The plan scales and shifts the deepest ones (FiLM, arXiv
    1709.07871), so that Q's gradient by the plan differs between states.
    """

    def __init__(self, spatial_dims: int, channels: Sequence[int], plan_channels: int) -> None:
        super().__init__()
        last = channels[-1]
        self.mode = "trilinear" if spatial_dims == 3 else "bilinear"
        self.film = nn.Sequential(
            Convolution(spatial_dims, plan_channels, 2 * last, kernel_size=1, conv_only=True),
            nn.LeakyReLU(0.1),
            Convolution(spatial_dims, 2 * last, 2 * last, kernel_size=1, conv_only=True),
        )
        self.mix = _block(spatial_dims, last, last)
        self.value = nn.Sequential(
            nn.Linear(3 * sum(channels) + 2 * last, VALUE_WIDTH),
            nn.LeakyReLU(0.1),
            nn.Linear(VALUE_WIDTH, VALUE_WIDTH),
            nn.LeakyReLU(0.1),
            nn.Linear(VALUE_WIDTH, 1),
        )

    def forward(self, summary: Tensor, deepest: Tensor, plan: Tensor) -> Tensor:
        """Return the value (B,) of plan (B, P, *grid) in a state.

        Args:
            summary: (B, N), of all features.
            deepest: (B, C, *coarse), the features of the last level.
            plan: judged.
        """
        scale, shift = self.film(plan.to(deepest)).chunk(2, dim=1)
        if any(n > 1 for n in scale.shape[2:]):
            size = deepest.shape[2:]
            scale = F.interpolate(scale, size=size, mode=self.mode, align_corners=False)
            shift = F.interpolate(shift, size=size, mode=self.mode, align_corners=False)
        mixed = self.mix(deepest * (1 + scale) + shift).flatten(2)
        value: Tensor = self.value(torch.cat([summary, mixed.mean(-1), mixed.amax(-1)], dim=1))
        return value.squeeze(1).float()


def _summary(x: Tensor) -> Tensor:
    """Mean, largest value and root mean square of every channel, (B, 3 C)."""
    x = x.flatten(2)
    return torch.cat([x.mean(-1), x.amax(-1), x.square().mean(-1).sqrt()], dim=1)


def _even(x: Tensor) -> Tensor:
    """Bring features of any size to about one, in their order: a norm would take away how large they are."""
    return torch.asinh(5 * x)


class TwinCritic(nn.Module):
    """Two independent critics; taking their minimum keeps the value from being over-estimated.

    What they learn moves the critics alone: no gradient goes into the planner's features.

    Args:
        spatial_dims: 2 or 3.
        channels: widths of the planner's levels, finest first.
        plan_channels: channels of the plan.
    """

    def __init__(self, spatial_dims: int, channels: Sequence[int], plan_channels: int) -> None:
        super().__init__()
        self.critics = nn.ModuleList(Critic(spatial_dims, channels, plan_channels) for _ in range(2))

    def forward(self, features: Sequence[Tensor], plan: Tensor) -> Tensor:
        """Return both values, (B, 2), of plan (B, P, *grid) in the state where the planner found these features."""
        levels = [x.detach().float() for x in features]
        summary, deepest = _even(torch.cat([_summary(x) for x in levels], dim=1)), _even(levels[-1])
        return torch.stack([critic(summary, deepest, plan) for critic in self.critics], dim=1)
