"""Stock timm models by name, with weights or without values, and the input that their weights expect."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from recast_exp.config.schema import ModelConfig
from recast_exp.data.transforms import InputSpec
from recast_exp.errors import RecastError, UserError
from recast_exp.models import digits as digits  # registers the embedded backbones with timm

log = logging.getLogger(__name__)


def check_name(name: str) -> None:
    """Refuse a name, or a tag of weights, that timm does not know.

    Raises:
        UserError: One line with the nearest names.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"model.backbone: expected a timm model, got {architecture!r}; {hint}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        near = get_close_matches(tag, tags, n=1, cutoff=0) + tags
        expected = f"one of the tags {', '.join(dict.fromkeys(near))}" if tags else "no tag, as timm has no weights"
        raise UserError(f"model.backbone: expected {expected} for {architecture}, got {tag!r}")


def backbone_name(model: ModelConfig) -> str:
    """The timm name of a model's backbone, after a check that timm knows it.

    Raises:
        UserError: If the model has none, or timm does not know it.
    """
    if not model.backbone:
        raise UserError("model.backbone: expected the name of a timm model, got nothing")
    check_name(model.backbone)
    return model.backbone


def create_network(name: str, img_size: int | None, pretrained: bool = False) -> nn.Module:
    """Create a timm model without a classifier.

    A model whose weights depend on the input size is created for that size.

    Args:
        name: timm name, with or without a tag.
        img_size: Input size in pixels; None is the model's own.
        pretrained: Whether to load the weights that timm has pinned.

    Raises:
        UserError: If the model does not take this input size.
    """
    if img_size is not None:
        entrypoint = timm.model_entrypoint(name.partition(".")[0])
        try:
            return timm.create_model(name, num_classes=0, img_size=img_size, pretrained=pretrained)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            log.debug("%s accepts any input size (%s)", entrypoint.__name__, error)
        except AssertionError as error:
            raise UserError(f"model.img_size: expected a size that {name} takes, got {img_size} ({error})") from error
    return timm.create_model(name, num_classes=0, pretrained=pretrained)


def blueprint(model: ModelConfig, device: str = "meta") -> nn.Module:
    """The backbone of a model without values, on the meta device: fast for a model of any size.

    Args:
        model: The model.
        device: Another device, for random values.

    Raises:
        UserError: If timm knows no such model, or the model does not take the input size.
    """
    name = backbone_name(model)
    with torch.device(device):
        return create_network(name, model.img_size)


def input_spec(model: ModelConfig) -> InputSpec:
    """The input that the backbone of a model expects, without loading its weights.

    Raises:
        UserError: If timm knows no such model, or the model does not take the input size.
    """
    try:
        network = blueprint(model)
    except RecastError:
        raise
    except Exception:  # the constructors of a few models compute with their weights
        network = create_network(backbone_name(model), model.img_size)
    return input_of(network, model)


def input_of(network: nn.Module, model: ModelConfig) -> InputSpec:
    """The input that the weights of a network expect: timm's record of them, overridden by the model's settings."""
    data = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    size = model.img_size or data["input_size"][-1]
    return InputSpec(
        size=int(size),
        mean=_three(model.mean or data["mean"]),
        std=_three(model.std or data["std"]),
        crop_pct=float(data["crop_pct"]),
        interpolation=str(data["interpolation"]),
        squash=data.get("crop_mode") == "squash",
        background="white",
        orient=True,
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    numbers = [float(value) for value in values]
    first, second, third = numbers * 3 if len(numbers) == 1 else numbers
    return first, second, third
