"""What the tests share: a small cohort, and the bundle's commands run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch starts its threads: here and in what the tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from demons import demons_bundle
from oblique_pair import write_oblique_pair

from monai_rl_reg.phantoms import make_cohort
from monai_rl_reg.registration import Registrar, Registration
from monai_rl_reg.request import Options, Pair

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "bundles" / "rl_reg" / "configs"
DATA = Path(os.environ.get("MONAI_RL_REG_TEST_DATA", ROOT.parent / "shared" / "data"))

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same numbers, whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small synthetic cases, two of them with oblique affines."""
    return make_cohort(tmp_path_factory.mktemp("phantoms"), count=6, size=24)


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """The real hippocampus set, where the machine has it."""
    folder = DATA / "Task04_Hippocampus"
    if not folder.is_dir():
        pytest.skip(f"needs the Decathlon's Task04_Hippocampus in {folder}")
    return folder


def bundle_command(run_id: str, *configs: str, **overrides: object) -> list[str]:
    """Return ``python -m monai.bundle run`` with these configs of the bundle and overrides."""
    files = [str(CONFIGS / f"{name}.json") for name in configs]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(files)]
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    return command


def run_bundle(run_id: str, *configs: str, **overrides: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the bundle from the repository's root and return its exit status and output."""
    command = bundle_command(run_id, *configs, **overrides)
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600)


SMALL = {
    "max_epochs": 1,
    "epoch_length": 3,
    "val_interval": 1,
    "batch_size": 2,
    "steps": 2,
    "val_steps": 2,
    "update_batch_size": 2,
}
"""Overrides that make a training short."""


@pytest.fixture(scope="session")
def trained(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short training on the small cohort."""
    output = tmp_path_factory.mktemp("run") / "output"
    result = run_bundle("training", "train", dataset_dir=cohort, output_dir=output, **SMALL | {"epoch_length": 4})
    assert result.returncode == 0, result.stderr[-3000:]
    return output


@pytest.fixture(scope="session")
def trained_with_labels(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short training with the overlay for labels."""
    output = tmp_path_factory.mktemp("run_with_labels") / "output"
    result = run_bundle("training", "train", "with_labels", dataset_dir=cohort, output_dir=output, **SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    return output


@pytest.fixture(scope="session")
def demons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose policy needs no weights."""
    return demons_bundle(tmp_path_factory.mktemp("bundle") / "demons")


@pytest.fixture(scope="session")
def registrar(demons: Path) -> Registrar:
    """The registrar of that bundle."""
    return Registrar(bundle=demons, device="cpu")


@pytest.fixture(scope="session")
def oblique_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A pair on oblique grids: ``fixed``, ``moving``, ``fixed_label``, ``moving_label`` and ``landmarks``."""
    return write_oblique_pair(tmp_path_factory.mktemp("oblique_pair"))


@pytest.fixture(scope="session")
def registration(oblique_files: dict[str, str], registrar: Registrar) -> Registration:
    """That pair, registered."""
    return registrar.register(Pair.read(**oblique_files), Options(steps=4, uncertainty=3))


@pytest.fixture(scope="session")
def registration_folder(registration: Registration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output folder."""
    folder = tmp_path_factory.mktemp("registration") / "out"
    registration.save(folder, tfm=True)
    return folder
