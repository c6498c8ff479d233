"""The command line of ``python -m monai.bundle run``, as far as a bundle's configurations ask what it says."""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.scripts import run
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from monai_rl_reg.errors import InputError
from monai_rl_reg.policy_bundle import BUNDLES


def bundle_folder(name: str) -> str:
    """Return the folder of the bundle that is run, for its configurations' ``bundle_root``.

    It is that of the first ``--config_file`` on the command line, so that a copy of a bundle uses its own weights, from
    whatever folder it is run; else the working folder, the ``bundles`` in it, or
    :data:`~monai_rl_reg.policy_bundle.BUNDLES`, wherever there is one of this name.
    """
    found = [Path(file).parent.parent for file in _config_files()[:1]]
    for folder in [*found, Path(), Path("bundles") / name, BUNDLES / name]:
        if (folder / "configs" / "metadata.json").is_file() or (folder in found and (folder / "configs").is_dir()):
            return str(folder)
    return "."


def check_settings() -> None:
    """Refuse what the command line sets and no configuration has, a misspelt key above all: MONAI says nothing of it.

    What is new inside a component, one more argument of it, is left alone.

    Raises:
        InputError: naming the key, and those that are like it.
    """
    files = _config_files()
    if not files or Path(sys.argv[0]).parts[-3:-1] != ("monai", "bundle"):  # another program's command
        return
    config = ConfigParser.load_config_files(files)
    known = {re.split("::|#", key)[0].lstrip("+") for key in config}
    tracking: Any = DEFAULT_MLFLOW_SETTINGS["configs"]
    known |= {*inspect.signature(run).parameters, *tracking}
    for key in _given():
        if (name := re.split("::|#", key)[0]) not in known:
            like = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"setting {key}: expected one that the configuration has, found none of this name"
                + (f" (is it {like[0]}?)" if like else "")
            )


def _given() -> Iterator[str]:
    """Yield the keys that the command line gives values to."""
    for argument in sys.argv[1:]:
        if named := re.match(r"--?([A-Za-z_][\w:#-]*)(=|$)", argument):
            yield named[1].replace("-", "_")


def _config_files() -> list[str]:
    """Return the configurations that the command line names; none where there is no such command."""
    arguments = sys.argv[1:]
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        option, _, value = argument.partition("=")
        if option in ("--config_file", "--config-file"):
            return _listed(value or following)
    return []


def _listed(value: str) -> list[str]:
    with contextlib.suppress(ValueError, SyntaxError):
        parsed: Any = ast.literal_eval(value)
        return [str(file) for file in (parsed if isinstance(parsed, list | tuple) else [parsed])]
    inside = value.strip("[]() ")
    return [inside] if Path(inside).is_file() else [file.strip(" '\"") for file in inside.split(",")]
