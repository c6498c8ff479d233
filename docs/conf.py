"""Configuration of the documentation: ``sphinx-build -W -b html docs docs/_build/html``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sphinx.application import Sphinx  # noqa: E402
from sphinx.util import logging  # noqa: E402

from monai_rl_reg import __version__  # noqa: E402

project = "monai_rl_reg"
author = "The monai_rl_reg developers"
project_copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx-mathjax-offline"]  # equations without a network connection
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False

logger = logging.getLogger(__name__)


def check_configuration_tables(app: Sphinx) -> None:
    """Warn, which ``-W`` makes an error, where the tables of ``bundle.md`` and the bundle's configs disagree.

    Every key in a table must be in the config that its heading names, with that default; every plain value at the top
    of ``train.json`` and ``inference.json`` must be in the table.
    """
    configs = ROOT / "bundles" / "rl_reg" / "configs"
    page = (Path(app.srcdir) / "bundle.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        name = section.splitlines()[0].strip("` ")
        if not (configs / name).is_file():
            continue
        config = json.loads((configs / name).read_text(encoding="utf-8"))
        rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", section, flags=re.MULTILINE)
        for key, default in rows:
            found = _look_up(config, key)
            computed = isinstance(found, dict) or (isinstance(found, str) and found[:1] in "$@%")
            if found is KeyError:
                logger.warning("bundle.md: %s has no key %s", name, key)
            elif computed != default.startswith("computed:") or not (computed or _read(default) == found):
                logger.warning("bundle.md: %s of %s is %s, not %s", key, name, json.dumps(found), default)
        plain = {k for k, v in config.items() if not isinstance(v, dict | list) and str(v)[:1] not in "$@%"}
        if name in ("train.json", "inference.json") and (missing := plain - {key for key, _ in rows}):
            logger.warning("bundle.md: the table of %s lacks %s", name, ", ".join(sorted(missing)))


def _look_up(config: Any, key: str) -> Any:
    if isinstance(config, dict) and key in config:  # the overlays have keys such as validate::key_metric
        return config[key]
    for part in key.split("::"):
        if not isinstance(config, dict) or part not in config:
            return KeyError
        config = config[part]
    return config


def _read(cell: str) -> Any:
    text = cell.strip().strip("`")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def prepare_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn shapes such as (B, C, *spatial) into code and |x| into plain text: to reStructuredText they are markup.

    In a variable's docstring a colon becomes a dash: napoleon would take what stands before it for a type.
    """
    for i, line in enumerate(lines):
        line = re.sub(r"(?<!`)\((?:\w+, )*\*\w+(?:, \w+)*\)", r"``\g<0>``", line)
        line = re.sub(r"\|(?=\w)|(?<=\w)\|", r"\\|", line)
        lines[i] = line.replace(": ", " -- ", 1) if what in ("attribute", "data") else line


def setup(app: Sphinx) -> None:
    """Check the tables before the pages are built; prepare docstrings."""
    app.connect("builder-inited", check_configuration_tables)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon
