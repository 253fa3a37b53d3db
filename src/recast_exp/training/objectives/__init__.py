"""Training objectives: what a step minimises. One module each, named as the option of `training=`.

A module defines one subclass of `Objective`; its preset is in `conf/training/`. Other packages add theirs through an
entry point (`recast_exp.objectives`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from recast_exp.config.fields import build
from recast_exp.errors import UserError, section
from recast_exp.plugins import OBJECTIVES
from recast_exp.training.objectives._base import Objective, Step

__all__ = ["Objective", "Step", "from_config", "load", "names"]


def names() -> list[str]:
    """The names of all objectives, sorted."""
    return OBJECTIVES.names()


def load(name: str) -> type[Objective]:
    """The class of an objective.

    Raises:
        UnknownNameError: If there is no such objective.
        UserError: If its module does not define exactly one.
    """
    with section("training."):
        module = OBJECTIVES.load(name)
    found = [
        each
        for _, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, Objective) and each.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"training.name: expected one subclass of Objective in {module.__name__}, got {len(found)}")
    return found[0]


def from_config(node: Mapping[str, object]) -> Objective:
    """An objective with its options.

    Args:
        node: The node `training` of the configuration: `name`, and the options.

    Raises:
        UserError: If there is no such objective, or an option is unknown, of the wrong type or out of range. One line.
    """
    name = str(node["name"])
    options = {key: value for key, value in node.items() if key != "name"}
    return build(load(name), options, "training.", f"training={name}")
