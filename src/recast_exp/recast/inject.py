"""Inject banks into a model in place, and merge them back into plain weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from recast_exp.errors import UserError, check_type
from recast_exp.recast.bank import Banks, templates_shape
from recast_exp.recast.combination import TemplateBank, TemplateCombination
from recast_exp.recast.grouping import check_distinct, layer_module, places_of_parameters

BANKS = "banks"  # where the template banks are registered in the model
MANY_TASKS = "_recast_exp_many_tasks"  # the attribute of a class whose tasks share one network


@torch.inference_mode(False)
def inject(model: nn.Module, banks: Banks) -> dict[str, str]:
    """Rewrite the grouped layers of a model in place: their weights become combinations of the banks' templates.

    The coefficients train, the templates do not; every other parameter keeps its `requires_grad`. The pretrained
    weights of the grouped layers are released. More banks can be injected into other layers of the same model.

    Templates and coefficients are float32 whatever the model's dtype. The weights rebuilt from them have the dtype that
    the layer had, so a bfloat16 or float16 model computes as before. On the meta device, the parameters are made
    without values; a state dict can be loaded into them.

    Args:
        model: The model that was mimicked, or another with the same layers.
        banks: Its templates and coefficients, from `mimic` or `Banks.load`. They are copied.

    Returns:
        Layer name → name of its coefficients [K, B, n] among the model's parameters, which a task trains.

    Raises:
        UnknownNameError: If the model does not have one of the banks' layers.
        UserError: If a layer has another shape or is parametrised already, or the model is a `RecastModel`. The model
            is unchanged then.

    Example:
        >>> import timm
        >>> from recast_exp import find_groups, inject, mimic
        >>> model = timm.create_model("vit_tiny_patch16_224").requires_grad_(False)
        >>> names = inject(model, mimic(model, find_groups(model, targets=["*.attn.qkv"])))
        >>> names["blocks.0.attn.qkv"]
        'blocks.0.attn.qkv.parametrizations.weight.original'
    """
    check_type("model", model, nn.Module, "a network")
    check_type("banks", banks, Banks, "those of mimic or Banks.load")
    check_one_task("model", model)
    _check_fit(model, banks)
    modules = _registered_banks(model)
    if modules is None:
        modules = nn.ModuleDict()
        model.add_module(BANKS, modules)
    names: dict[str, str] = {}
    for group in banks.groups:
        device = layer_module(model, group.layers[0]).weight.device
        bank = banks.bank(group, device)
        modules[_free_name(group.name, modules)] = bank
        for index, layer in enumerate(group.layers):
            module = layer_module(model, layer)
            combination = TemplateCombination(bank, banks.coefficients[layer], index, module.weight, banks.added)
            if module.weight.dtype != torch.float32:
                # The coefficients replace the weight within the same parameter, which keeps its dtype
                module.weight = nn.Parameter(module.weight.detach().float())
            module.weight.requires_grad_(False)
            parametrize.register_parametrization(module, "weight", combination, unsafe=True)
            names[layer] = f"{layer}.parametrizations.weight.original"
            model.get_parameter(names[layer]).requires_grad_(True)
    return names


@torch.inference_mode(False)
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Turn the combinations back into plain weights, in place; the model is a stock timm model again.

    Adapters stay; `recast_exp.merge` merges those too.

    Args:
        model: A model with templates or without.

    Returns:
        The same model, with the same logits and, without an adapter, a state dict that loads strictly into the stock
        timm model.

    Raises:
        UserError: If it is no model, or a `RecastModel`.
    """
    check_type("model", model, nn.Module, "a network")
    check_one_task("model", model)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and _is_combined(module):
            # A deep copy shares the class that torch made for its original: without one of its own, removing the
            # parametrisation here would break the other model.
            combined = type(module)
            module.__class__ = type(combined.__name__, combined.__bases__, dict(combined.__dict__))
            chain = module.get_submodule("parametrizations.weight")
            assert isinstance(chain, parametrize.ParametrizationList)
            combination, *others = chain
            weight = combination(chain.original)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            # Replaces the coefficients, which may be of another dtype; frozen, like the rest of the backbone
            module.weight = nn.Parameter(weight, requires_grad=False)
            for adapter in others:
                parametrize.register_parametrization(module, "weight", adapter, unsafe=True)
    if _registered_banks(model) is not None:
        delattr(model, BANKS)
    return model


def check_one_task(argument: str, model: nn.Module) -> None:
    """Refuse to change a model whose tasks share one network: they would all change.

    Raises:
        UserError: If it is a `RecastModel`, or contains one. One line.
    """
    if any(hasattr(type(module), MANY_TASKS) for module in model.modules()):
        raise UserError(
            f"{argument}: expected a network of one task, got a RecastModel, whose tasks share theirs; use its "
            "methods: merge(NAME) gives a plain model, add_task(…, adapter=…) a task with an adapter"
        )


def _check_fit(model: nn.Module, banks: Banks) -> None:
    check_distinct(banks.groups)
    if not any(tensor.is_meta for tensor in banks.coefficients.values()):  # those without values are not saved either
        banks.check()
    if hasattr(model, BANKS) and _registered_banks(model) is None:
        raise UserError(
            f"model: expected one without an attribute {BANKS!r}, which is to hold the templates, got "
            f"{type(model).__name__}"
        )
    places = places_of_parameters(model)
    for group in banks.groups:
        found = tuple(banks.templates[group.name].shape)
        for layer in group.layers:
            module = layer_module(model, layer)
            if parametrize.is_parametrized(module, "weight"):
                raise UserError(
                    f"banks: expected layers with weights of their own, got {layer}, whose weight is parametrised "
                    "already; merge the model first"
                )
            tied = places.get(id(module.weight), [])
            if not tied:  # no parameter, as torch.nn.utils.weight_norm leaves it
                raise UserError(
                    f"banks: expected layers with weights of their own, got {layer}, whose weight is computed from "
                    "other parameters; remove what computes it first"
                )
            if module.weight.is_inference():
                raise UserError(
                    f"model: expected weights that can change, got {layer}, made under torch.inference_mode(); make "
                    "the model outside of it"
                )
            if len(tied) > 1:
                raise UserError(
                    f"banks: expected layers with weights of their own, got {layer}, whose weight has several places: "
                    f"{', '.join(tied[:3])}; leave it out of the targets"
                )
            expected = templates_shape(group, module.weight.shape, banks.mixing)
            if found[1:] != expected[1:]:
                raise UserError(
                    f"banks: expected templates of shape {expected[1:]} for the layer {layer} of "
                    f"{type(model).__name__}, got {found[1:]}"
                )


def _registered_banks(model: nn.Module) -> nn.ModuleDict | None:
    """The module in which `inject` has registered the banks of this model; None if it has not."""
    modules = getattr(model, BANKS, None)
    if isinstance(modules, nn.ModuleDict) and all(isinstance(bank, TemplateBank) for bank in modules.values()):
        return modules
    return None


def _free_name(group: str, modules: nn.ModuleDict) -> str:
    """The name of a group as the name of a module, with a number if another bank already has it."""
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
