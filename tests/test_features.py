from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import nn

from monai_rl_reg.errors import InputError
from monai_rl_reg.features import LAYERS, MEAN, STD, FeatureNetwork, LearnedPerceptualDistance, PerceptualDistance

models = pytest.importorskip("torchvision.models")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of SqueezeNet in a file: no download."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "squeezenet.pt"
    torch.save(models.squeezenet1_0(weights=None).state_dict(), file)
    return file


def make_features(weights: Path, **options: Any) -> FeatureNetwork:
    return FeatureNetwork("squeezenet1_0", weights=str(weights), **options)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """No weights can be downloaded; what the package logs about it."""
    real = models.get_model

    def get_model(name: str, weights: Any = None) -> nn.Module:
        if weights == "DEFAULT":
            raise URLError("no network")
        return real(name, weights=weights)

    monkeypatch.setattr(models, "get_model", get_model)
    monkeypatch.setattr(logging.getLogger("monai_rl_reg"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="monai_rl_reg")
    return caplog


@pytest.mark.parametrize("layers", [None, (1, 4, 7, 10), (4,), (3, 9), (0, 2)])
def test_features_are_the_activations_of_the_layers_of_the_normalised_image(
    layers: tuple[int, ...] | None, weights: Path
) -> None:
    model = models.squeezenet1_0(weights=None)
    model.load_state_dict(torch.load(weights, weights_only=True))
    image = torch.rand(2, 3, 48, 40)
    normalised = torch.stack([(image[:, i] - MEAN[i]) / STD[i] for i in range(3)], 1)
    found = make_features(weights, layers=layers)(image)
    expected = [model.features[: layer + 1](normalised) for layer in layers or LAYERS["squeezenet1_0"]]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(make_features(weights, layers=layers)(image, count=1), expected[:1])


def test_default_layers_of_vgg16_are_those_that_style_transfer_takes() -> None:
    with torch.device("meta"):
        model = models.vgg16(weights=None)
    names: list[str] = []
    block, convolution = 1, 0
    for layer in model.features:
        convolution += isinstance(layer, nn.Conv2d)
        kind = {nn.Conv2d: "conv", nn.ReLU: "relu", nn.MaxPool2d: "pool"}[type(layer)]
        names.append(f"{kind}{block}_{convolution}")
        if kind == "pool":
            block, convolution = block + 1, 0
    assert [names[layer] for layer in LAYERS["vgg16"]] == ["relu1_2", "relu2_2", "relu3_3", "relu4_3"]


def test_features_are_frozen_but_let_the_gradient_of_the_image_through(weights: Path) -> None:
    features = make_features(weights)
    image = torch.rand(1, 3, 40, 40, requires_grad=True)
    features.train()
    first = features(image)
    assert all(torch.equal(a, b) for a, b in zip(first, features(image), strict=True)), "no dropout"
    sum(x.sum() for x in first).backward()
    assert image.grad is not None
    assert image.grad.any()
    assert list(features.parameters()) == []
    assert all(parameter.grad is None for parameter in features._model[0].parameters())


def test_checkpoint_has_nothing_of_the_feature_network(weights: Path) -> None:
    assert make_features(weights).state_dict() == {}
    assert nn.ModuleDict({"features": make_features(weights)}).state_dict() == {}


def test_feature_network_moves_with_the_module_that_owns_it(weights: Path) -> None:
    owner = nn.ModuleDict({"features": make_features(weights)})
    image = torch.rand(1, 3, 40, 40)
    expected = owner["features"](image)
    owner.to(torch.float64)
    found = owner["features"](image.double())
    assert {x.dtype for x in found} == {torch.float64}
    torch.testing.assert_close(found, [x.double() for x in expected], rtol=1e-4, atol=1e-5)


def test_bad_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    other, text = tmp_path / "other.pt", tmp_path / "text.pt"
    torch.save(nn.Linear(2, 2).state_dict(), other)
    text.write_text("no weights")
    cases = [(tmp_path / "missing.pt", "expected a file, found none")]
    cases += [(file, "expected a state dict of torchvision's squeezenet1_0, found: ") for file in (other, text)]
    for file, message in cases:
        with pytest.raises(InputError, match=f"feature weights {file}: {message}") as raised:
            make_features(file)
        assert "\n" not in str(raised.value)


def test_unknown_networks_are_refused_in_one_sentence() -> None:
    with pytest.raises(InputError, match="feature network resnet18: expected layers to look at"):
        FeatureNetwork("resnet18")
    with pytest.raises(InputError, match="feature network vgg17: expected one of torchvision's models"):
        FeatureNetwork("vgg17", layers=(1,))


def test_without_a_download_random_filters_take_its_place_and_it_says_so(offline: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    first = FeatureNetwork("squeezenet1_0")
    after = torch.rand(1)
    (record,) = offline.records
    assert "squeezenet1_0: its weights could not be downloaded (<urlopen error no network>)" in record.getMessage()
    assert "feature_weights" in record.getMessage()
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after), "the caller's random numbers are the same"
    second, image = FeatureNetwork("squeezenet1_0"), torch.rand(1, 3, 40, 40)
    assert all(torch.equal(a, b) for a, b in zip(first(image), second(image), strict=True))


def test_perceptual_distance_is_zero_for_equal_images_and_grows_with_what_is_done_to_them(weights: Path) -> None:
    distance = PerceptualDistance(make_features(weights))
    image = torch.rand(2, 3, 40, 40)
    noise = torch.randn_like(image)
    assert distance(image, image).tolist() == [0, 0]
    little, much = (distance(image, image + size * noise) for size in (0.05, 0.3))
    assert (little > 0).all()
    assert (much > little).all()
    torch.testing.assert_close(distance(image + 0.05 * noise, image), little)
    torch.testing.assert_close(distance(image[:1], image[:1] + 0.3 * noise[:1]), much[:1])


def test_perceptual_distance_by_hand() -> None:
    class Channels(nn.Module):
        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [image[:, :2], image[:, :2, :1, :1]]

    a, b = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    a[0, 0] = 2.0  # direction (1, 0) at both places
    b[0, 0, 0, 0] = 5.0  # the same direction
    b[0, 1, 0, 1] = 3.0  # (0, 1): a squared distance of 2
    assert PerceptualDistance(Channels())(a, b).tolist() == [2 / 2 + 0]  # type: ignore[arg-type]


def test_learned_distance_falls_back_on_the_feature_network(
    weights: Path, monkeypatch: pytest.MonkeyPatch, offline: pytest.LogCaptureFixture
) -> None:
    lpips = pytest.importorskip("lpips")

    def refuse(**options: Any) -> nn.Module:
        raise URLError("no network")

    monkeypatch.setattr(lpips, "LPIPS", refuse)
    features = make_features(weights)
    found = LearnedPerceptualDistance(features)
    a, b = torch.rand(2, 2, 3, 40, 40)
    assert torch.equal(found(a, b), PerceptualDistance(features)(a, b))
    assert "lpips: no weights (<urlopen error no network>)" in offline.text


def test_learned_distance_gives_the_package_images_between_minus_one_and_one(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpips = pytest.importorskip("lpips")

    class Range(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a.amax((1, 2, 3), keepdim=True) - b.amin((1, 2, 3), keepdim=True)

    monkeypatch.setattr(lpips, "LPIPS", Range)
    distance = LearnedPerceptualDistance(make_features(weights))
    assert distance(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)).tolist() == [2, 2]
