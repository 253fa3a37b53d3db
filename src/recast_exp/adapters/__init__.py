"""Adapters: one module each, named as the option of the config group `adapter`, with a preset under `conf/adapter/`.

A module has

- `LABEL`: what tables and plots call it; `{option}` stands for the value of an option;
- `Options`: a dataclass of its options, with the defaults, ranges and help texts; the preset lists the same;
- `FITS`: what it needs to find in a network, in words;
- `inject(network, options) -> dict[str, str]`: changes the network in place and returns what trains, public name →
  parameter name; nothing where the adapter finds no place;
- `merge(network)`, if its work can become a part of the weights;
- `measure(network) -> dict[str, float]`, if there is something to see after each epoch: numbers by name, `adapter/…`;
- `remark(reported, last, options) -> str`, if those of the reported epoch may be worth a warning: its text, or nothing.

The rule "what is returned trains, the rest is frozen" is applied by `assembly`. Nothing is registered anywhere else.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from recast_exp.config import schema as config
from recast_exp.errors import RecastError, UnfitError, UserError


def names() -> list[str]:
    """The names of all adapters, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def label(cfg: DictConfig) -> str:
    """What tables and plots call the adapter that is configured; empty for none."""
    text: str = _module(cfg.name).LABEL
    return text.format(**dataclasses.asdict(options_of(cfg)))


def options_of(cfg: DictConfig) -> Any:
    """The checked options of the adapter that is configured.

    Args:
        cfg: The `adapter` node of the configuration: its name and its options.

    Returns:
        The `Options` of the adapter's module.

    Raises:
        UserError: If there is no such adapter, or an option is unknown, of a wrong type or out of range.
    """
    module = _module(cfg.name)
    fields = {field.name: field for field in dataclasses.fields(module.Options)}
    options = OmegaConf.structured(module.Options)
    for key, value in cfg.items():
        name = str(key)
        if name == "name":
            continue
        if name not in fields:
            takes = ", ".join(fields) or "no options"
            raise UserError(f"adapter.{name}: unknown option, adapter={cfg.name} takes {takes}")
        problem = None
        try:
            options[name] = value
            problem = config.range_problem(f"adapter.{name}", fields[name], options[name])
        except OmegaConfBaseException:
            problem = f"adapter.{name}: got {value!r}, takes {config.accepted(fields[name])}"
        if problem:
            raise UserError(problem)
    return OmegaConf.to_object(options)


def inject_adapter(network: nn.Module, cfg: DictConfig) -> dict[str, str]:
    """Add the adapter that is configured; returns public name → parameter name.

    Raises:
        UserError: If an option is wrong, or the adapter finds no place in the network.
    """
    module, options = _module(cfg.name), options_of(cfg)
    found: dict[str, str] = module.inject(network, options)
    if not found and cfg.name != "none":
        raise UserError(f"adapter: {cfg.name} does not fit {type(network).__name__}, it needs {module.FITS}")
    return found


def check_adapter(create: Callable[[], nn.Module], cfg: DictConfig) -> None:
    """Refuse wrong options, and an adapter that does not fit.

    Args:
        create: Makes the network, without numbers, with a classifier.
        cfg: The `adapter` node of the configuration.

    Raises:
        UserError: One line.
        UnfitError: Where the adapter does not fit, with those that do.
    """
    options_of(cfg)
    if cfg.name == "none":
        return
    try:
        inject_adapter(create(), cfg)
    except RecastError as error:
        raise UnfitError(f"{error}; takes one of {', '.join(fitting(create))}") from None


def fitting(create: Callable[[], nn.Module]) -> list[str]:
    """The names of the adapters that find a place in a network, with their defaults; "none" is one of them.

    Args:
        create: Makes the network, with a classifier or without; on the meta device it costs little.
    """

    def fits(name: str) -> bool:
        try:
            return bool(_module(name).inject(create(), _module(name).Options()))
        except RecastError:  # a library that it needs is not installed
            return False

    return [name for name in names() if name == "none" or fits(name)]


def merge(network: nn.Module) -> nn.Module:
    """Make every adapter that can be a part of the weights one, in place; after RECAST's own `merge`."""
    for name in names():
        if hasattr(_module(name), "merge"):
            _module(name).merge(network)
    return network


def measure(cfg: DictConfig, network: nn.Module) -> dict[str, float]:
    """What the adapter that is configured measures after each epoch, by name; mostly nothing."""
    module = _module(cfg.name)
    measured: dict[str, float] = module.measure(network) if hasattr(module, "measure") else {}
    return measured


def remark(cfg: DictConfig, reported: Mapping[str, float], last: Mapping[str, float]) -> str:
    """What the adapter that is configured has to say of its run; mostly nothing.

    Args:
        cfg: The `adapter` node of the configuration.
        reported: What was measured in the reported epoch.
        last: What was measured in the last epoch.
    """
    module = _module(cfg.name)
    text: str = module.remark(reported, last, options_of(cfg)) if hasattr(module, "remark") else ""
    return text


def _module(name: str) -> ModuleType:
    if name not in names():
        raise UserError(f"adapter.name: got {name!r}, takes one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
