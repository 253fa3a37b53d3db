"""What a network computes beside its weights: two networks with the same weights need not give the same features.

timm makes a network with arguments, such as a number of heads or an activation, which no weight shows. A network is
compared with the one that timm makes by the same name: what differs is the same in every version of timm, so files can
keep it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from recast_exp.config.schema import ModelConfig
from recast_exp.errors import UserError
from recast_exp.models.create import create_network, current_name
from recast_exp.models.elsewhere import is_elsewhere
from recast_exp.models.timm_model import timm_model

Fact: TypeAlias = "bool | int | float | str | list[Fact] | None"
Differences: TypeAlias = "dict[str, dict[str, Fact]]"
"""Module → name of an attribute, or `kind` → its value, where it is another than that of timm's network."""

KIND = "kind"

_SHOWN = frozenset(
    {"in_features", "out_features", "in_channels", "out_channels", "in_chans", "num_features", "normalized_shape"}
    | {"embed_dim", "head_hidden_size", "num_classes", "distillation", "dim", "depth", "num_prefix_tokens"}
    | {"img_size", "grid_size", "num_patches", "feat_size", "input_resolution", "seq_len"}
)
"""What the shapes of weights or images show, or belongs to the classifier."""

_OF_TRAINING = frozenset({"training", "grad_checkpointing", "fused_attn", "inplace", "momentum"})
"""What changes no result of a network in evaluation mode but by rounding; as names with `drop` in them."""


def stock(model: ModelConfig) -> nn.Module | None:
    """The network that timm makes for a model, without classifier and values; None if timm makes none of this name.

    Raises:
        UserError: If it does not take the arguments of the model.
    """
    name = current_name(model.backbone or "")
    if is_elsewhere(name):
        return None
    try:
        with torch.device("meta"):
            network = create_network(name, model.img_size, arguments=model.arguments)
    except Exception as error:  # timm has no such model, or not of this size; or its constructor computes with weights
        if model.arguments and isinstance(error, UserError):
            raise
        return None
    if not hasattr(network, "reset_classifier"):  # an encoder, which no task has
        return None
    timm_model(network).reset_classifier(0)
    return network


def differences(expected: nn.Module, network: nn.Module, brought: Collection[str] = ()) -> Differences:
    """What a timm network computes otherwise than another of the same weights.

    Args:
        expected: The other, as `stock` makes it.
        network: The network, whose weights may be parametrised.
        brought: Names of parameters that a classifier and an adapter have brought. Modules that they have replaced are
            left out.
    """
    changed = {path[:end] for path in brought for end in range(len(path)) if path[end] == "."}
    modules = dict(network.named_modules())
    found: Differences = {}
    for name, module in expected.named_modules():
        if name not in modules:
            continue
        wanted, got = _facts(module), _facts(modules[name])
        if name in changed and wanted[KIND] != got[KIND]:
            continue
        if other := {fact: got.get(fact) for fact, value in wanted.items() if got.get(fact) != value}:
            found[name] = other
    return found


def _facts(module: nn.Module) -> dict[str, Fact]:
    kind = type_before_parametrizations(module).__name__
    if isinstance(module, nn.Identity) or "Drop" in kind:
        return {KIND: nn.Identity.__name__}
    facts: dict[str, Fact] = {KIND: kind}
    for name, value in vars(module).items():
        if not (name.startswith("_") or "drop" in name or name in _SHOWN or name in _OF_TRAINING):
            fact = _fact(value)
            if fact is not None or value is None:
                facts[name] = fact
    return facts


def _fact(value: object) -> Fact:
    """A value as JSON holds it; None for what is none."""
    if inspect.isroutine(value):
        return value.__name__
    if isinstance(value, tuple | list):
        parts = [_fact(each) for each in value]
        return parts if all(part is not None for part in parts) else None
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return None


def mismatch(expected: nn.Module, recorded: Mapping[str, Mapping[str, Fact]], network: nn.Module) -> str | None:
    """The first fact by which a network is not the one of a record, in words; None where there is none.

    Args:
        expected: The network that timm makes.
        recorded: What the network of the record computes otherwise (`differences`).
        network: The network at hand.
    """
    found = differences(expected, network)
    for name in [*found, *recorded]:
        here, there = found.get(name, {}), recorded.get(name, {})
        for fact in [*here, *there]:
            plain = _facts(expected.get_submodule(name)).get(fact) if name in found else None
            got, wanted = here.get(fact, plain), there.get(fact, plain)
            if got != wanted:
                return f"the {fact} of {name or 'the network'} is {got}, not {wanted}"
    return None
