"""Heads: classifiers on the features of a backbone, solved in closed form or to convergence.

Each head is one module with one dataclass that derives from `Head`: its fields are its options. The module's name is
the option of the config group `head`, with a preset under `conf/head/`; other packages add theirs through an entry
point (`recast_exp.heads`).

Example:
    >>> import torch
    >>> from recast_exp.heads import Features, choose
    >>> from recast_exp.heads.lda import LDA
    >>> labels = torch.arange(40) % 4
    >>> images = torch.nn.functional.one_hot(labels).float() + 0.1 * torch.randn(40, 4)
    >>> chosen = choose(LDA(), Features(images[:20], labels[:20], 4), Features(images[20:], labels[20:], 4))
    >>> chosen.solution.weight.shape
    torch.Size([4, 4])
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from recast_exp.config.fields import build
from recast_exp.errors import UserError, section
from recast_exp.heads._base import Features, Head, Moments, Setting, Solution
from recast_exp.heads._choice import Chosen, Trial, choose, describe, temperature
from recast_exp.plugins import HEADS

__all__ = [
    "Chosen",
    "Features",
    "Head",
    "Moments",
    "Setting",
    "Solution",
    "Trial",
    "choose",
    "describe",
    "from_config",
    "load",
    "names",
    "temperature",
]


def names() -> list[str]:
    """The names of all heads, sorted."""
    return HEADS.names()


def load(name: str) -> type[Head]:
    """The class of a head.

    Raises:
        UnknownNameError: If there is no such head.
        UserError: If its module does not define exactly one.
    """
    with section("head."):
        module = HEADS.load(name)
    found = [
        each
        for _, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, Head) and each.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"head.name: expected one subclass of Head in {module.__name__}, got {len(found)}")
    return found[0]


def from_config(node: Mapping[str, object]) -> Head:
    """A head with its options.

    Args:
        node: The node `head` of the configuration: `name`, and the options.

    Raises:
        UserError: If there is no such head, or an option is unknown, of the wrong type or out of range. One line.
    """
    if "name" not in node:
        raise UserError(f"head.name: expected one of {', '.join(names())}, got none")
    name = str(node["name"])
    options = {key: value for key, value in node.items() if key != "name"}
    head = build(load(name), options, "head.", f"head={name}")
    for line in head.problems():
        raise UserError(f"head.{line}")
    return head
