"""Adapters: one module each, named as the option of the config group `adapter`.

A module has one function, `inject(network, cfg) -> dict[str, str]`: it changes the network in place and returns what
it adds, public name → parameter name. The rule "what is returned trains, the rest is frozen" is applied by `assembly`.
"""

from __future__ import annotations

import importlib

from omegaconf import DictConfig
from torch import nn


def inject_adapter(network: nn.Module, cfg: DictConfig) -> dict[str, str]:
    """Add the adapter named `cfg.name`; returns public name → parameter name."""
    module = importlib.import_module(f"{__name__}.{cfg.name}")
    names: dict[str, str] = module.inject(network, cfg)
    return names
