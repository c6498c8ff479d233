"""The mean of a network's weights over the last part of its training."""

from __future__ import annotations

from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

RECENT = 10
"""A mean looks back over about the last 1 / RECENT of the iterations."""


class WeightAverage(AveragedModel):
    """A copy of a network, ``module``, whose weights are the mean of those it had after its last iterations.

    Small updates at a high rate leave a network's weights swinging about a better point, which their mean is near. With
    ``t`` iterations done, ``w <- w + (network - w) * RECENT / (t + RECENT - 1)``: polynomial-decay averaging, O. Shamir
    and T. Zhang, Stochastic gradient descent for non-smooth optimization, ICML 2013. It needs no setting for the length
    of a training, and has forgotten the beginning whenever training ends.

    Attach it to the trainer as a handler; its ``state_dict`` holds the number of iterations too.

    Args:
        network: what is trained.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, avg_fn=_recent)
        self.requires_grad_(False)
        # not a submodule: it would be saved twice
        self._network = [network]

    def attach(self, engine: Engine) -> None:
        """Follow this trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._average)

    def _average(self) -> None:
        self.update_parameters(self._network[0])


def _recent(averaged: Tensor, current: Tensor, averages: Tensor | int) -> Tensor:
    return averaged.lerp(current, RECENT / (averages + RECENT))
