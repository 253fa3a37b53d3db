"""What is used of a timm model beyond `nn.Module`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

from torch import nn


class TimmModel(Protocol):
    """The attributes that all models of timm have."""

    num_classes: int
    pretrained_cfg: Mapping[str, object]
    default_cfg: Mapping[str, object]

    def get_classifier(self) -> nn.Module | tuple[nn.Module | None, ...] | list[nn.Module | None] | None:
        """Its classifier: a few models, such as distilled ones, have two."""
        ...

    def reset_classifier(self, num_classes: int) -> object:
        """Give it a new classifier; none for 0 classes."""
        ...


def timm_model(network: nn.Module) -> TimmModel:
    """A network that is known to be one of timm, whose models have no class in common but `nn.Module`."""
    return cast("TimmModel", network)
