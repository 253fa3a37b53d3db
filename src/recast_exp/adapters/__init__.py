"""Adapters: a second method on the backbone, next to RECAST or instead of it.

Each adapter is one module with one dataclass that derives from `Adapter`: its fields are its options. The module's name
is the option of the config group `adapter`, with a preset under `conf/adapter/`; other packages add theirs through an
entry point (see `recast_exp.plugins`). Nothing is registered anywhere else.

    from recast_exp.adapters import inject_adapter
    from recast_exp.adapters.melo import MeLo

    trained = inject_adapter(network, MeLo(rank=2))

`models.adapted` applies the one rule of what trains: the parameters that `inject` returns, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from recast_exp import errors
from recast_exp.adapters._base import (
    NORMS,
    Adapter,
    attach,
    backbone_modules,
    detach,
    own_parameters,
    parametrize_weight,
)
from recast_exp.adapters.none import NoAdapter
from recast_exp.errors import RecastError, UnfitError, UserError
from recast_exp.plugins import ADAPTERS

__all__ = [
    "NORMS",
    "Adapter",
    "NoAdapter",
    "attach",
    "backbone_modules",
    "check_adapter",
    "detach",
    "fitting",
    "from_config",
    "inject_adapter",
    "load",
    "merge",
    "names",
    "own_parameters",
    "parametrize_weight",
]


def names() -> list[str]:
    """The names of all adapters, sorted."""
    return ADAPTERS.names()


def load(name: str) -> type[Adapter]:
    """The class of an adapter.

    Raises:
        UnknownNameError: If there is no adapter of that name.
        UserError: If the module of an entry point cannot be imported, or a module does not hold exactly one adapter.
    """
    module = ADAPTERS.load(name)
    classes = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Adapter) and value.__module__ == module.__name__
    }
    if len(classes) != 1:
        listed = ", ".join(sorted(each.__name__ for each in classes)) or "none"
        raise UserError(f"name: expected one class that derives from Adapter in {module.__name__}, got {listed}")
    (adapter_class,) = classes
    if "__dataclass_fields__" not in vars(adapter_class):
        raise UserError(f"name: expected {module.__name__}.{adapter_class.__name__} to be a dataclass; add @dataclass")
    for field in dataclasses.fields(adapter_class):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(
                f"name: expected a default for each option of {module.__name__}.{adapter_class.__name__}, got none for "
                f"{field.name}"
            )
    return adapter_class


def from_config(node: Mapping[str, Any]) -> Adapter:
    """The adapter that is configured.

    Args:
        node: The `adapter` node of the configuration: `name`, and the options that differ from their defaults.

    Raises:
        UserError: If there is no such adapter, or an option is unknown, of a wrong type or out of range; one line that
            begins with the key (`adapter.rank: …`).
    """
    options = {str(option): value for option, value in node.items()}
    name = str(options.pop("name", ""))
    with errors.section("adapter."):
        adapter_class = load(name)
        known = [field.name for field in dataclasses.fields(adapter_class)]
        for option in options:
            if option not in known:
                raise UserError(f"{option}: unknown option; adapter={name} takes {', '.join(known) or 'no options'}")
        return adapter_class(**options)


def inject_adapter(network: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Add an adapter to a network, in place.

    Args:
        network: A timm model, with RECAST's templates or without.
        adapter: The adapter.

    Returns:
        Public name → parameter name, of the parameters that train.

    Raises:
        UserError: If the adapter finds no place in the network.
    """
    trained = adapter.inject(network)
    if not trained and not isinstance(adapter, NoAdapter):
        raise UserError(f"adapter: {adapter.name} does not fit {type(network).__name__}; it needs {adapter.fits}")
    return trained


def check_adapter(create: Callable[[], nn.Module], adapter: Adapter) -> None:
    """Check that an adapter fits a network.

    Args:
        create: Makes the network, with a classifier; on the meta device it costs little.
        adapter: The adapter.

    Raises:
        UnfitError: If it does not fit; one line that names the adapters that do.
    """
    if isinstance(adapter, NoAdapter):
        return
    try:
        inject_adapter(create(), adapter)
    except RecastError as error:
        raise UnfitError(f"{error}; choose one of {', '.join(fitting(create))}") from None


def fitting(create: Callable[[], nn.Module]) -> list[str]:
    """The names of the adapters that find a place in a network, with their defaults; "none" is always one of them.

    Args:
        create: Makes the network, with a classifier or without; on the meta device it costs little.
    """

    def fits(name: str) -> bool:
        try:
            adapter = load(name)()
            return isinstance(adapter, NoAdapter) or bool(adapter.inject(create()))
        except RecastError:  # a library that it needs is not installed
            return False

    return [name for name in names() if fits(name)]


def merge(network: nn.Module) -> nn.Module:
    """Make every adapter that can be a part of the weights one, in place; after RECAST's own `merge`."""
    for name in names():
        with contextlib.suppress(RecastError):  # what cannot be imported is not in the network either
            load(name).merge(network)
    return network
