"""Small networks with lively weights, and adapters on them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from recast_exp.adapters import from_config
from recast_exp.config.schema import ModelConfig
from recast_exp.models.adapted import AdaptedModel, assemble
from recast_exp.recast import Banks, find_groups, mimic
from support.adapted import NETWORKS, Make, create


@pytest.fixture(scope="session")
def make(enliven: Callable[..., nn.Module]) -> Make:
    stock = {kind: enliven(create(kind)) for kind in NETWORKS}

    @functools.cache
    def banks_of(kind: str) -> Banks:
        return mimic(stock[kind], find_groups(stock[kind], targets=NETWORKS[kind][2], num_groups=1))

    def make(name: str, kind: str, base: str, **options: Any) -> AdaptedModel:
        banks = copy.deepcopy(banks_of(kind)) if base == "recast" else None
        adapter = from_config({"name": name, **options})
        return assemble(copy.deepcopy(stock[kind]), ModelConfig(method=base), adapter, banks, num_classes=5, seed=3)

    return make
