"""The presets: the YAML files of the config groups, and what one of them sets."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

import recast_exp


def conf_dir() -> Path:
    """The folder of the configuration: inside the package (a wheel) or at the top of the checkout."""
    package = Path(recast_exp.__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parents[1] / "conf"


@functools.cache
def options_of(group: str, name: str) -> Mapping[str, object]:
    """What the preset of a plug-in sets of its node; nothing for one of another package.

    Args:
        group: Its group: `adapter`.
        name: Its name.
    """
    path = conf_dir() / group / f"{Path(name).name}.yaml"
    content = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    assert isinstance(content, dict)
    node = content.get(group, content)
    return {str(option): value for option, value in node.items()} if isinstance(node, dict) else {}
