"""Classes of their own for layers with hooks, so that torch.compile tells them from the same layers without.

It compiles a model's code once for several models that look alike to it: it compares the classes of layers, but not
their hooks. A model with an adapter that works by hooks would compute as one without.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

_BASE = "_recast_exp_base"  # the attribute of a class that derives from a layer's and does the same
_made: WeakKeyDictionary[type[nn.Module], dict[str, type[nn.Module]]] = WeakKeyDictionary()


def hooks_of(network: nn.Module) -> dict[nn.Module, int]:
    """Module → number of its forward hooks."""
    return {module: len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()}


def tell_apart(network: nn.Module, before: Mapping[nn.Module, int], adapter: str) -> None:
    """Give the layers that have got hooks other classes, which do the same; `take_back` undoes it.

    Args:
        network: The network, changed in place.
        before: `hooks_of` the network without these hooks.
        adapter: What has brought them, with its options. For equal ones, layers of a class get the same other class.
    """
    for module, count in hooks_of(network).items():
        if count > before.get(module, count) and not isinstance(module, torch.jit.ScriptModule):
            module.__class__ = _other(type(module), adapter, parametrize.is_parametrized(module))


def take_back(network: nn.Module) -> None:
    """Give layers that have no hooks any more the classes that they had before `tell_apart`."""
    for module, count in hooks_of(network).items():
        while not count and (base := vars(type(module)).get(_BASE)) is not None:
            module.__class__ = base


def _other(kind: type[nn.Module], adapter: str, parametrized: bool = False) -> type[nn.Module]:
    made = _made.setdefault(kind, {})
    if adapter not in made:
        if parametrized:  # torch has made the class for this layer, and looks for the weight in it, not in its bases
            bases, body = kind.__bases__, dict(vars(kind))
        else:
            names = {name: getattr(kind, name) for name in ("__module__", "__qualname__")}
            bases, body = (kind,), {**names, _BASE: kind, "__reduce_ex__": _reduced(kind, adapter)}
        made[adapter] = types.new_class(kind.__name__, bases, exec_body=lambda own: own.update(body))
    return made[adapter]


def _reduced(kind: type[nn.Module], adapter: str) -> Callable[[nn.Module, SupportsIndex], Any]:
    """How such a module is copied and pickled: its class has no name of its own."""

    def __reduce_ex__(self: nn.Module, protocol: SupportsIndex) -> Any:  # noqa: N807
        reduced = kind.__reduce_ex__(self, protocol)
        if isinstance(reduced, tuple) and reduced[1] == (type(self),):  # as object does it
            return _empty, (kind, adapter), *reduced[2:]
        return reduced

    return __reduce_ex__


def _empty(kind: type[nn.Module], adapter: str) -> nn.Module:
    other = _other(kind, adapter)
    return other.__new__(other)
