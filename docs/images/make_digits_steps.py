"""Draw docs/images/digits_steps.png: six pairs of digits that were held back from training, along the steps.

python docs/images/make_digits_steps.py mnist_train.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from monai.bundle import ConfigParser

from monai_rl_reg.checkpoints import load_policy
from monai_rl_reg.digits import DigitPairs, split_digits
from monai_rl_reg.pictures import strip, write_picture
from monai_rl_reg.rollout import follow
from monai_rl_reg.tasks.registration import RegistrationTask

ROWS, STEPS, ENLARGE = 6, (0, 1, 2, 3, 5, 8, 12, 20), 3
HERE = Path(__file__).parent
BUNDLE = HERE.parent.parent / "bundles" / "rl_digits"

config = ConfigParser(ConfigParser.load_config_file(str(BUNDLE / "configs" / "inference.json")))
network = load_policy(config.get_parsed_content("network_def"), str(BUNDLE / "models" / "model.pt")).eval()
pairs = DigitPairs(split_digits(sys.argv[1] if len(sys.argv) > 1 else None)["validation"], ROWS)
task = RegistrationTask(2)
start = task.reset(torch.stack([pairs[i]["image"] for i in range(ROWS)]))
with torch.no_grad():
    states = [start, *follow(network, task, start, max(STEPS))]
captions = [*(f"{i} step{'s' if i != 1 else ''}" for i in STEPS), "fixed"]
columns = [*(states[i]["moved"] for i in STEPS), start["fixed"]]
rows = []
for row in range(ROWS):
    cells = [column[row].repeat_interleave(ENLARGE, 1).repeat_interleave(ENLARGE, 2) for column in columns]
    rows.append(strip(cells, captions if row == 0 else None))
write_picture(HERE / "digits_steps.png", torch.cat(rows, dim=1))
