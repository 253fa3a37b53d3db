"""What a model of many tasks is made of: a backbone, and the templates that mimic its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recast_exp.config.schema import ModelConfig, RecastConfig
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import UserError, check_integer, check_type
from recast_exp.files import cache_folder
from recast_exp.models import loading
from recast_exp.models.adapted import other_heads
from recast_exp.models.backbones import Backbone, create_backbone
from recast_exp.models.bank_cache import changed_by, groups_of
from recast_exp.models.check import check_size
from recast_exp.models.create import input_of
from recast_exp.models.features import classifier
from recast_exp.models.timm_model import timm_model
from recast_exp.models.weights import fingerprint
from recast_exp.recast import Banks, mimic
from recast_exp.tasks import library
from recast_exp.tasks.differences import differences_of


@dataclass(frozen=True, eq=False)
class Parts:
    """A pretrained backbone, and the templates that are to make its weights.

    Attributes:
        network: The backbone: images [N, 3, H, W] → features [N, D].
        banks: Its templates and mimicked coefficients, which are not injected yet.
        width: The number D of features.
        backbone: timm name; the name of its class for another model.
        weights: Fingerprint of the pretrained weights.
        input: How its images are prepared; None if it is no model of timm, as nothing says it.
        arguments: What timm's constructor was given beside the size.
    """

    network: nn.Module
    banks: Banks
    width: int
    backbone: str
    weights: str
    input: InputSpec | None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def of_backbone(backbone: Backbone, banks: Banks) -> Parts:
    """A backbone with templates that are there already; see `RecastModel.on`."""
    network = backbone.network
    check_one_head(network, backbone.name)
    return Parts(
        network, banks, _width(network), backbone.name, backbone.fingerprint, backbone.input, backbone.arguments
    )


def of_timm(
    name: str,
    recast: RecastConfig | None,
    weights: str | Path | None,
    pretrained: bool,
    img_size: int | None,
    seed: int,
) -> Parts:
    """A backbone of timm; see `RecastModel.from_timm`."""
    check_type("name", name, str, "a name of timm")
    check_type("pretrained", pretrained, bool, "True or False")
    if img_size is not None:
        check_integer("img_size", img_size, 1, 2**31)
    settings = ModelConfig(
        backbone=name, img_size=img_size, pretrained=pretrained, weights=None if weights is None else str(weights)
    )
    check_size(settings)
    made = create_backbone(settings)
    banks = _mimicked(made.network, made.name, recast, seed)
    return Parts(made.network, banks, _width(made.network), made.name, made.fingerprint, made.input)


def check_own(model: nn.Module, width: int | None) -> None:
    """Refuse what `of_own` cannot take; see `RecastModel.wrap`."""
    if width is not None:
        check_integer("width", width, 1, 2**31)
    if hasattr(model, "_orig_mod"):
        raise UserError("model: expected one that is not compiled, got torch.compile's; compile it afterwards")
    check_type("model", model, nn.Module, "a network (from_timm takes a name)")
    loading.check_unadapted(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise UserError("model: expected weights with values, got a model on the meta device")


def of_own(model: nn.Module, recast: RecastConfig | None, width: int | None, seed: int) -> Parts:
    """A model of one's own, whose classifier is removed if it is one of timm; see `RecastModel.wrap`."""
    spec: InputSpec | None = None
    name: str = type(model).__name__
    if hasattr(model, "reset_classifier"):
        classifier(model)
        settings = library.described(model)
        spec, name = input_of(model, settings), settings.backbone or name
        timm_model(model).reset_classifier(0)
        own = _width(model)
        if width is not None and width != own:
            raise UserError(f"width: expected {own}, the number of features of {name}, or None, got {width!r}")
        width = own
    if width is None:
        raise UserError(f"width: expected the number of features that {name} gives for an image, got None")
    weights = fingerprint(model)
    return Parts(model, _mimicked(model, name, recast, seed), width, name, weights, spec)


def _mimicked(network: nn.Module, backbone: str, recast: RecastConfig | None, seed: int) -> Banks:
    chosen = RecastConfig() if recast is None else recast
    if not isinstance(chosen, RecastConfig):
        raise UserError(f"recast: expected a RecastConfig, got {type(chosen).__name__}")
    check_one_head(network, backbone)
    groups = groups_of(network, chosen)
    differences: list[dict[str, Tensor]] = []
    if chosen.templates == "tasks":
        differences = differences_of(network, chosen.tasks, cache_folder(None))
        groups = changed_by(groups, differences)
    return mimic(
        network,
        groups,
        num_sets=chosen.num_coefficient_sets,
        seed=seed,
        templates=chosen.templates,
        mixing=chosen.mixing,
        differences=differences,
        template_dtype=chosen.template_dtype,
    )


def check_one_head(network: nn.Module, backbone: str) -> None:
    """Refuse a timm model without a classifier that would get several heads: a task here has one.

    Raises:
        UserError: One line.
    """
    if hasattr(network, "reset_classifier") and (others := other_heads(network)):
        raise UserError(
            f"model: expected one whose logits are those of its classifier, got {backbone}, which adds those of "
            f"{others[0].rpartition('.')[0]}; use another backbone"
        )


def _width(network: nn.Module) -> int:
    """The number of features that a timm model without a classifier gives."""
    for name in ("head_hidden_size", "num_features"):
        if isinstance(width := getattr(network, name, None), int):
            return width
    raise UserError(f"width: expected the number of features of {type(network).__name__}, got None; pass it to wrap")
