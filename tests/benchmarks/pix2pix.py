"""A pix2pix U-Net against the stepwise policy on photo translation: same data, same discriminator, same time.

    python tests/benchmarks/pix2pix.py --dataset_dir facades/train --minutes 30 --ckpt output/rl_photo/model.pt

trains the U-Net of pix2pix (arXiv 1611.07004: batches of 1, L1 weight 100, learning rate 2e-4, dropout; with batches
of 1 its batch normalisation is instance normalisation) for the given
minutes, then evaluates both with the bundle's own evaluation.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from torch import Tensor, nn

from monai_rl_reg.checkpoints import load_policy
from monai_rl_reg.tasks.translation import GREY, TranslationTask

CONFIGS = Path(__file__).parents[2] / "bundles" / "rl_photo" / "configs"


class UNet(nn.Module):
    """The generator of pix2pix: halves the image down to 1 x 1 and doubles it again, with skip connections."""

    def __init__(self, width: int = 64, depth: int = 7) -> None:
        super().__init__()
        widths = [min(width * 2**i, 8 * width) for i in range(depth)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(widths):
            norm = level not in (0, depth - 1)
            layers: list[nn.Module] = [nn.LeakyReLU(0.2)] if level else []
            layers += [nn.Conv2d(widths[level - 1] if level else 3, channels, 4, 2, 1)]
            self.down.append(nn.Sequential(*layers, *([nn.InstanceNorm2d(channels, affine=True)] if norm else [])))
        for level in reversed(range(depth)):
            below = widths[level] * (1 if level == depth - 1 else 2)
            above = widths[level - 1] if level else 3
            layers = [nn.ReLU(), nn.ConvTranspose2d(below, above, 4, 2, 1)]
            if level:
                layers += [nn.InstanceNorm2d(above, affine=True)] + (
                    [nn.Dropout(0.5)] if depth - 4 <= level < depth - 1 else []
                )
            self.up.append(nn.Sequential(*layers))

    def forward(self, observation: Tensor) -> Tensor:
        """Return the photograph for (source, prediction), as the correction of a grey prediction."""
        x, skips = 2 * observation[:, :3] - 1, []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        x = self.up[0](skips.pop())
        for layer in self.up[1:]:
            x = layer(torch.cat([x, skips.pop()], dim=1))
        return (torch.tanh(x) + 1) / 2 - GREY


def main() -> None:
    """Train the U-Net and evaluate both."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dataset_dir", required=True)
    arguments.add_argument("--hold_back", type=float, default=50)
    arguments.add_argument("--minutes", type=float, required=True)
    arguments.add_argument("--width", type=int, default=64, help="channels of the first layer, 64 in the paper")
    arguments.add_argument("--ckpt", help="the policy's checkpoint, to evaluate beside it")
    arguments.add_argument("--feature_weights")
    arguments.add_argument("--output_dir", default="output/pix2pix")
    options = arguments.parse_args()

    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "evaluate.json")])
    for name in ("dataset_dir", "hold_back", "feature_weights", "output_dir"):
        parser[name] = getattr(options, name)
    set_determinism(0)
    unet = train(parser, options.minutes, options.width)
    unet.eval()
    policy = parser.get_parsed_content("network")
    print(f"parameters: pix2pix {_count(unet):,}, policy {_count(policy):,}")
    evaluation = parser.get_parsed_content("evaluation")
    evaluation.models = {"pix2pix": (unet, 1)}
    if options.ckpt:
        load_policy(policy, options.ckpt)
        evaluation.models["policy"] = (policy, parser.get_parsed_content("val_steps"))
    evaluation.run()


def train(parser: ConfigParser, minutes: float, width: int) -> UNet:
    """Train by L1 and the least-squares adversarial loss for some minutes."""
    dataset = parser.get_parsed_content("train::dataset")
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, shuffle=True)
    unet = UNet(width)
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=0.02)
    discriminator = parser.get_parsed_content("discriminator")
    task = TranslationTask(l1_weight=100.0, adversarial_weight=1.0, discriminator=discriminator)
    optimizers = [torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (unet, task)]
    end, updates = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        for batch in loader:
            state = task.reset(torch.as_tensor(batch["image"]), torch.as_tensor(batch["label"]))
            terms = task.loss(state, unet(task.observe(state)), unet)
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            updates += 1
            if updates % 100 == 0:
                shown = ", ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
                print(f"{minutes - (end - time.monotonic()) / 60:.1f} min, {updates} updates: {shown}", flush=True)
            if time.monotonic() > end:
                break
    return unet


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
