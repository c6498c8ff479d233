"""A policy that needs no weights, in a bundle of its own: tests of a registration then do not hang on a training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from monai.networks.layers import GaussianFilter
from torch import Tensor, nn
from torch.nn import functional as F

CONFIGS = Path(__file__).parent.parent / "bundles" / "rl_reg" / "configs"


class Demons(nn.Module):
    """One step of the demons algorithm on half the resolution; a sampled one has smooth noise on it."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.dims = spatial_dims
        self.smooth = GaussianFilter(spatial_dims, 1.5)

    def forward(self, observation: Tensor) -> Tensor:
        pads = [p for n in observation.shape[:1:-1] for p in (0, n % 2)]
        pool = F.avg_pool3d if self.dims == 3 else F.avg_pool2d
        fixed, moved = pool(F.pad(observation[:, :2], pads, mode="replicate"), 2).split(1, 1)
        axes = list(range(2, self.dims + 2))
        slope = torch.cat(torch.gradient(moved, dim=axes), 1)
        force = (fixed - moved) * slope / (slope.square().sum(1, keepdim=True) + (fixed - moved).square() + 1e-3)
        return self.smooth(2 * force).clamp(-1, 1)

    def sample(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        action = self(observation)
        return action, action, action + self.smooth(0.3 * torch.randn_like(action))


def demons_bundle(folder: Path) -> Path:
    """Make a bundle like the shipped one, but for its network."""
    shutil.copytree(CONFIGS, folder / "configs")
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["network_def"] = {"_target_": "demons.Demons", "spatial_dims": "@spatial_dims"}
    config["similarity"]["_target_"] = "monai_rl_reg.similarity.LocalNCC"
    config |= {
        "critic": None,
        "structures": 0,
        "guided": False,
        "intensity_range": None,
        "relax": 0,
        "half": False,
        "field_stride": 2,
        "run": ["$@evaluator.run()"],
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder
