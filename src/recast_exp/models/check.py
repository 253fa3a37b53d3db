"""Check that a model can be made: timm knows its backbone, which has layers to group and a place for the adapter."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping

import torch
from torch import nn

from recast_exp.adapters import NoAdapter, check_adapter, from_config
from recast_exp.config.schema import MimicryConfig, ModelConfig, RecastConfig
from recast_exp.errors import RecastError, UserError, first_line, section
from recast_exp.models.bank_cache import groups_of
from recast_exp.models.create import backbone_name, blueprint, input_of
from recast_exp.models.features import classifier
from recast_exp.models.timm_model import timm_model
from recast_exp.recast.solvers import check_options

log = logging.getLogger(__name__)


def check_model(
    model: ModelConfig, recast: RecastConfig, mimicry: MimicryConfig, adapter: Mapping[str, object]
) -> None:
    """Refuse a backbone that timm does not know, that has no layers to group, or that has no place for the adapter.

    No weights are loaded.

    Args:
        model: The model.
        recast: How its layers are grouped, if they are.
        mimicry: How the templates are found.
        adapter: Name and options of the adapter.

    Raises:
        UserError: One line with the nearest names, or with the layers that can be grouped.
        UnfitError: If the adapter does not fit the backbone.
    """
    backbone_name(model)
    _check_size(model)
    chosen = from_config(adapter)
    if model.method == "recast":
        with section("mimicry."):
            check_options(mimicry.name, mimicry.options)
    if model.method != "recast" and isinstance(chosen, NoAdapter):
        return
    if (network := _blueprint(model)) is None:
        return
    check_adapter(functools.partial(blueprint, model), chosen)
    if model.method == "recast":
        with section("recast."):
            groups_of(network, recast)


def _check_size(model: ModelConfig) -> None:
    """Refuse an input size that the backbone does not take, or of which it would leave out a part without a word."""
    if model.img_size is None or (network := _blueprint(model)) is None:
        return
    name, size = model.backbone, model.img_size
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    for length in patch if isinstance(patch, tuple) else ():
        if isinstance(length, int) and size % length:
            raise UserError(
                f"model.img_size: expected a multiple of {length}, the patch size of {name}, got {size}; "
                f"{size // length * length or length} is one"
            )
    if (reason := _refused(network, size)) is None:
        return
    own = input_of(network, dataclasses.replace(model, img_size=None)).size
    # A few models do not compute without values at all; a model's own size is right
    if own != size and _refused(network, own) is None:
        raise UserError(f"model.img_size: expected a size that {name} takes, such as {own}, got {size} ({reason})")


def _refused(network: nn.Module, size: int) -> str | None:
    """Why a network on the meta device does not take an input size; None if it does."""
    try:
        with torch.no_grad():
            network.eval()(torch.empty(1, 3, size, size, device="meta"))
    except Exception as error:
        return first_line(error)
    return None


def check_classifier(model: ModelConfig) -> None:
    """Refuse a backbone whose classifier a solved head cannot replace, such as the two of a distilled model.

    Raises:
        UserError: One line with what takes such a backbone.
    """
    if (network := _blueprint(model)) is not None:
        with torch.device("meta"):
            timm_model(network).reset_classifier(2)
        classifier(network)


def _blueprint(model: ModelConfig) -> nn.Module | None:
    """As `blueprint`; None where it has to be checked later, as the model cannot be made without values."""
    try:
        return blueprint(model)
    except RecastError:
        raise
    except Exception as error:  # the constructors of a few models compute with their weights
        log.debug("%s cannot be created on the meta device (%s); it is checked later", model.backbone, error)
        return None
