"""The embedded backbones: small timm models for 16 px images, registered with timm under their names.

They make the default run self-contained: no download, real images, and a backbone that knows the digits 0 to 4 but has
never seen the five classes of the task. `experiment.pretrain` trains each of them once, by its recipe and with its own
seed, and keeps the weights in the user's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from timm.models import load_pretrained, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from recast_exp.models.timm_model import timm_model

SIZE = 16
PRETRAINED_CFG = {
    "input_size": (3, SIZE, SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}


class Pretraining(TypedDict):
    """How a backbone is trained, and its size: a ViT's width, heads and patch, or a ResNet's channels."""

    epochs: int
    lr: float
    batch_size: int
    seed: int
    width: NotRequired[int]
    heads: NotRequired[int]
    patch: NotRequired[int]
    channels: NotRequired[list[int]]


# All that the weights depend on; the key of the cached file.
RECIPES: dict[str, Pretraining] = {
    "digits_vit": {"epochs": 24, "lr": 1e-3, "batch_size": 32, "seed": 0, "width": 96, "heads": 3, "patch": 4},
    "digits_resnet": {"epochs": 30, "lr": 2e-3, "batch_size": 32, "seed": 0, "channels": [16, 24, 32, 48]},
}
EMBEDDED = tuple(RECIPES)


@register_model  # type: ignore[untyped-decorator, unused-ignore]
def digits_vit(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """A ViT with 12 blocks, as deep as a ViT-S, for 16 px images."""
    recipe = RECIPES["digits_vit"]
    defaults: dict[str, Any] = {
        "img_size": SIZE,
        "patch_size": recipe["patch"],
        "embed_dim": recipe["width"],
        "depth": 12,
    }
    network = VisionTransformer(**(defaults | {"num_heads": recipe["heads"]} | _timm_kwargs(kwargs)))
    return _registered("digits_vit", network, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator, unused-ignore]
def digits_resnet(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """A ResNet with the blocks of a ResNet-34 and few channels, for 16 px images."""
    defaults: dict[str, Any] = {
        "block": BasicBlock,
        "layers": (3, 4, 6, 3),
        "channels": tuple(RECIPES["digits_resnet"]["channels"]),
    }
    stem: dict[str, Any] = {"stem_width": 16, "replace_stem_pool": True}
    network = ResNet(**(defaults | stem | _timm_kwargs(kwargs)))
    return _registered("digits_resnet", network, pretrained, kwargs)


def _timm_kwargs(kwargs: Mapping[str, object]) -> dict[str, object]:
    """The arguments without those that timm passes to every model for its own bookkeeping."""
    own = {name: value for name, value in kwargs.items() if not name.startswith("pretrained_") and name != "cache_dir"}
    if (config := _from_elsewhere(kwargs)) and "num_classes" in config:
        own.setdefault("num_classes", config["num_classes"])
    return own


def _from_elsewhere(kwargs: Mapping[str, object]) -> dict[str, Any] | None:
    """The record of a model in a folder or on the Hub, where timm was asked for one."""
    given: Any = kwargs.get("pretrained_cfg")  # a mapping, or timm's PretrainedCfg
    config: dict[str, Any] | None = given if isinstance(given, dict | None) else given.to_dict()
    return config if config and config.get("source") in ("hf-hub", "local-dir") else None


def _registered(name: str, network: nn.Module, pretrained: bool, kwargs: Mapping[str, object]) -> nn.Module:
    """The model with its record; and with the weights of a folder or of the Hub, where timm was asked for these."""
    model = timm_model(network)
    model.pretrained_cfg = model.default_cfg = {"architecture": name, **PRETRAINED_CFG}
    if pretrained and (config := _from_elsewhere(kwargs)):
        model.pretrained_cfg = config
        load_pretrained(network, pretrained_cfg=config, num_classes=model.num_classes)
    return network
