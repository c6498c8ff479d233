"""Perceptual features: a frozen classification network, whichever the configuration names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_rl_reg.errors import InputError

logger = logging.getLogger(__name__)

LAYERS = {"vgg16": (3, 8, 15, 22), "squeezenet1_0": (1, 4, 7, 10)}
"""Layers of torchvision's ``features`` to look at: for VGG16 relu1_2, relu2_2, relu3_3 and relu4_3."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, which torchvision's weights expect."""


class FeatureNetwork(nn.Module):
    """The activations of some layers of a torchvision network, frozen.

    The weights come from a file, or from torchvision's own download. Where neither is to be had the network keeps
    fixed random weights, and says so: random filters still describe colours and textures (arXiv 1606.00021), but no
    objects.

    The network is no part of a checkpoint: its weights never change.

    Args:
        network: name of a torchvision model with a sequential ``features``, such as ``vgg16`` or ``squeezenet1_0``.
        weights: a file with the model's state dict; None downloads torchvision's.
        layers: indices into ``features``; by default those of :data:`LAYERS`.

    Raises:
        InputError: if torchvision is not installed or lacks the network, or the file is missing or of another one.
    """

    def __init__(
        self, network: str = "vgg16", *, weights: str | None = None, layers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.layers = tuple(layers if layers is not None else LAYERS.get(network, ()))
        if not self.layers:
            raise InputError(f"feature network {network}: expected layers to look at (known: {', '.join(LAYERS)})")
        model = _load(network, weights)
        for layer in self.layers:
            if layer + 1 < len(model) and isinstance(model[layer + 1], nn.ReLU):
                model[layer + 1].inplace = False  # it would overwrite what the layer gave
        # In a list, so that state_dict passes it by; _apply moves it all the same.
        self._model = [model[: max(self.layers) + 1].requires_grad_(False).eval()]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor, *, count: int | None = None) -> list[Tensor]:
        """Return the activations of the layers, or of the first ``count``, for an image (B, 3, H, W) in [0, 1]."""
        x = (image - self.mean) / self.std
        wanted = sorted(self.layers)[:count]
        features = []
        for index, layer in enumerate(self._model[0][: wanted[-1] + 1]):
            x = layer(x)
            if index in wanted:
                features.append(x)
        return features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureNetwork:
        self._model[0]._apply(fn)
        return super()._apply(fn, recurse)


class PerceptualDistance(nn.Module):
    """Distance of two images in feature space, after LPIPS (arXiv 1801.03924) without its learnt weights.

    Args:
        features: the feature network.
    """

    def __init__(self, features: FeatureNetwork) -> None:
        super().__init__()
        self.features = features

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of images (B, 3, H, W) in [0, 1], (B,): squared, of unit-length features, averaged."""
        distances = [
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).flatten(1).mean(1)
            for x, y in zip(self.features(a), self.features(b), strict=True)
        ]
        return torch.stack(distances).sum(0)


class LearnedPerceptualDistance(nn.Module):
    """LPIPS of the ``lpips`` package where its backbone's weights can be had, else :class:`PerceptualDistance`.

    Args:
        features: what stands in.
    """

    def __init__(self, features: FeatureNetwork) -> None:
        super().__init__()
        self.distance: nn.Module
        try:
            import lpips

            self.distance = lpips.LPIPS(net="alex", verbose=False).eval()
            self.signed = True
        except (ImportError, OSError) as error:  # URLError is an OSError
            logger.warning("lpips: no weights (%s); the distance is that of the feature network instead", error)
            self.distance, self.signed = PerceptualDistance(features), False

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of images (B, 3, H, W) in [0, 1], (B,)."""
        if self.signed:
            a, b = 2 * a - 1, 2 * b - 1
        return self.distance(a, b).flatten()  # type: ignore[no-any-return]


def _load(network: str, weights: str | None) -> Any:
    try:
        from torchvision.models import get_model
    except ImportError as error:
        raise InputError('feature network: expected torchvision, found none (pip install -e ".[images]")') from error
    with torch.random.fork_rng():
        torch.manual_seed(0)  # random weights, if it comes to that, are the same everywhere
        try:
            model = get_model(network, weights=None if weights else "DEFAULT")
        except ValueError as error:
            raise InputError(f"feature network {network}: expected one of torchvision's models ({error})") from error
        except (OSError, RuntimeError, HTTPException) as error:  # no network, or a file that came damaged
            logger.warning(
                "feature network %s: its weights could not be downloaded (%s); random filters take their place, which "
                "know colours and textures but no objects; name a file of weights with feature_weights",
                network,
                error,
            )
            model = get_model(network, weights=None)
    if weights:
        if not Path(weights).is_file():
            raise InputError(f"feature weights {weights}: expected a file, found none")
        try:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:
            raise InputError(
                f"feature weights {weights}: expected a state dict of torchvision's {network}, found: "
                f"{str(error).splitlines()[0]}"
            ) from error
    return model.features
