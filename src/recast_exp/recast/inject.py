"""Mimic a model's weights, put the banks into the model in place, and merge them back into plain weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_exp.errors import UnknownNameError, UserError
from recast_exp.plugins import SOLVERS
from recast_exp.recast.bank import Banks, TemplateBank, TemplateCombination, reference
from recast_exp.recast.grouping import Group, layer_module
from recast_exp.recast.solvers import check_options

BANKS = "banks"  # where the template banks are registered in the model


@torch.no_grad()
def mimic(
    model: nn.Module,
    groups: Iterable[Group],
    *,
    solver: str = "closed_form",
    num_sets: int = 2,
    seed: int = 42,
    settings: dict[str, Any] | None = None,
    progress: Callable[[], None] = lambda: None,
    **options: Any,
) -> Banks:
    """Neural Mimicry of a model: templates and coefficients for all groups. The model is not changed.

    Args:
        model: The pretrained model.
        groups: What `find_groups` found in it.
        solver: A name in `recast_exp.plugins.SOLVERS`: `closed_form`, `gradient`, `autoencoder` or another package's.
        num_sets: K.
        seed: Seed of the solver; each group has its own, derived from it.
        settings: A record of where the weights came from, kept with the banks.
        progress: Called after each step of an iterating solver.
        options: Options of the solver, see its `solve`.

    Raises:
        UnknownNameError: If there is no such solver, it has no such option, or the model no such layer.
    """
    if solver not in (known := SOLVERS.names()):
        raise UnknownNameError(f"solver: expected one of {', '.join(known)}, got {solver!r}")
    check_options(solver, options)
    solve = SOLVERS.load(solver).solve
    groups = tuple(groups)
    templates: dict[str, Tensor] = {}
    coefficients: dict[str, Tensor] = {}
    for index, group in enumerate(groups):
        weights = torch.stack([reference(model, layer) for layer in group.layers])
        with torch.enable_grad():
            found = solve(
                weights,
                group.num_templates,
                num_sets,
                group.num_blocks,
                seed=(seed + index) % 2**32,
                progress=progress,
                **options,
            )
        templates[group.name] = found.templates
        coefficients |= dict(zip(group.layers, found.coefficients.unbind(0), strict=True))
    return Banks(groups, templates, coefficients, settings or {})


def inject(model: nn.Module, banks: Banks) -> dict[str, str]:
    """Rewrite the grouped layers of a model in place: their weights become combinations of the banks' templates.

    The coefficients train, the templates do not; everything else stays as it is. The pretrained weights of the grouped
    layers are released. Further banks can be injected into other layers of the same model.

    Templates and coefficients are float32 whatever the model's dtype; the weights that they give have the dtype that
    the layer had, so a bfloat16 or float16 model computes as before. On the meta device the parameters are made
    without values, for a state dict to be loaded into.

    Returns:
        Layer name → name of its coefficients among the model's parameters, which a task trains.

    Raises:
        UnknownNameError: If the model does not have one of the banks' layers.
        UserError: If a layer has another shape or is parametrised already. The model is unchanged then.
    """
    _check_fit(model, banks)
    modules = _registered_banks(model)
    if modules is None:
        modules = nn.ModuleDict()
        model.add_module(BANKS, modules)
    names: dict[str, str] = {}
    for group in banks.groups:
        device = layer_module(model, group.layers[0]).weight.device
        bank = TemplateBank(banks.templates[group.name].to(device, copy=True))
        modules[_free_name(group.name, modules)] = bank
        for layer in group.layers:
            module = layer_module(model, layer)
            dtype = module.weight.dtype
            if dtype != bank.templates.dtype:
                # The coefficients take the place of the weight within the same parameter, which keeps its dtype
                module.weight = nn.Parameter(module.weight.detach().to(bank.templates.dtype))
            module.weight.requires_grad_(False)
            start = banks.coefficients[layer]
            combination = TemplateCombination(bank, start.shape[0], start.shape[1], dtype)
            parametrize.register_parametrization(module, "weight", combination, unsafe=True)
            names[layer] = f"{layer}.parametrizations.weight.original"
            coefficients = model.get_parameter(names[layer]).requires_grad_(True)
            with torch.no_grad():
                coefficients.copy_(start)  # the mimicked ones, not their projection
    return names


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Turn the combinations back into plain weights, in place; the model is a stock timm model again.

    Returns:
        The same model, with the logits it had and a state dict that loads strictly into stock timm.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and _is_combined(module):
            # A deep copy shares the class that torch made for its original: without one of its own, removing the
            # parametrisation here would break the other model.
            own = type(module)
            module.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
            weight = module.weight.detach()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            # In place of the coefficients, which may be of another dtype; frozen, as the rest of the backbone
            module.weight = nn.Parameter(weight, requires_grad=False)
    if _registered_banks(model) is not None:
        delattr(model, BANKS)
    return model


def _check_fit(model: nn.Module, banks: Banks) -> None:
    if hasattr(model, BANKS) and _registered_banks(model) is None:
        raise UserError(
            f"model: expected one without an attribute {BANKS!r}, which is to hold the templates, got "
            f"{type(model).__name__}"
        )
    for group in banks.groups:
        shape = tuple(banks.templates[group.name].shape[1:])
        for layer in group.layers:
            module = layer_module(model, layer)
            if parametrize.is_parametrized(module, "weight"):
                raise UserError(
                    f"banks: expected layers with weights of their own, got {layer}, whose weight is parametrised "
                    "already; merge the model first"
                )
            if shape != tuple(module.weight.shape):
                raise UserError(
                    f"banks: expected templates of shape {tuple(module.weight.shape)} for the layer {layer} of "
                    f"{type(model).__name__}, got {shape}"
                )


def _registered_banks(model: nn.Module) -> nn.ModuleDict | None:
    """Where `inject` has registered banks in this model; None if it has not."""
    modules = getattr(model, BANKS, None)
    if isinstance(modules, nn.ModuleDict) and all(isinstance(bank, TemplateBank) for bank in modules.values()):
        return modules
    return None


def _free_name(group: str, modules: nn.ModuleDict) -> str:
    """The name of a group as one of a module; with a number if another bank has it."""
    name = free = group.replace(".", "-")
    number = 1
    while free in modules:
        number += 1
        free = f"{name}-{number}"
    return free


def _is_combined(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module, "weight"):
        return False
    return isinstance(module.get_submodule("parametrizations.weight.0"), TemplateCombination)
