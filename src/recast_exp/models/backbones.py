"""Backbones: stock timm models with their pretrained weights, and the facts about them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from recast_exp.config.schema import ModelConfig
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import MissingInputError
from recast_exp.models.create import backbone_name, input_of
from recast_exp.models.digits import EMBEDDED
from recast_exp.models.weights import create, download, file_of, fingerprint, load_file
from recast_exp.torch_state import seeded

log = logging.getLogger(__name__)


@dataclass
class Backbone:
    """A pretrained model without a classifier, and the facts about it.

    Attributes:
        network: The timm model, created with `num_classes=0`.
        name: timm name with the tag of its weights.
        fingerprint: sha256 of all weights; backbones with the same fingerprint are the same bit for bit.
        input: The images that the weights expect: size in pixels, mean and standard deviation of the channels.
        arguments: What timm's constructor was given beside the size; JSON-able.
    """

    network: nn.Module
    name: str
    fingerprint: str
    input: InputSpec
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def computation(self) -> dict[str, object]:
        """All that features depend on but the images: with another number of heads, the same weights give others."""
        return {"name": self.name, "arguments": self.arguments, "fingerprint": self.fingerprint}


def is_embedded(model: ModelConfig) -> bool:
    """Whether a model takes the pretrained weights of an embedded backbone, which `experiment.pretrain` makes."""
    return model.backbone in EMBEDDED and model.pretrained and not model.weights


def create_backbone(model: ModelConfig, embedded: Path | None = None) -> Backbone:
    """Create the backbone of a model and load its weights. The generators of torch, NumPy and Python stay as they are.

    Args:
        model: Which backbone, and which weights.
        embedded: File of the weights of an embedded backbone (`experiment.pretrain`), for a model that `is_embedded`.

    Raises:
        UserError: If timm knows no such model, or a file of weights does not fit it.
        MissingInputError: If neither a file nor the network can provide the weights.
    """
    name = backbone_name(model)
    with seeded(0):  # random weights are the same in every run
        if model.pretrained and file_of(model) is None and name not in EMBEDDED:
            network = download(name, model.img_size, model.arguments)
        else:
            network = create(model)
        if is_embedded(model):
            if embedded is None:
                raise MissingInputError(
                    f"model.backbone: expected a file with the weights of the embedded backbone {name}, got none; make "
                    "it with recast_exp.experiment.pretrain, or set model.weights=FILE"
                )
            load_file(network, embedded, "model.backbone")
        elif file_of(model) is None and not model.pretrained:
            log.warning("model.pretrained=false: the backbone %s has random weights", name)
    return Backbone(network, name, fingerprint(network), input_of(network, model), dict(model.arguments))
