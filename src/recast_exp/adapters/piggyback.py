"""Piggyback: a binary mask on each weight (Mallya, Davis and Lazebnik, ECCV 2018, arXiv 1801.06519).

    Ŵ = W ⊙ [m > t],   ∂L/∂m = ∂L/∂Ŵ ⊙ W   (straight-through)

The real mask m starts at one value above the threshold t, so that all weights are kept at first. A task file holds one
bit for each weight: 2.66 MB for a ResNet-34.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_exp.adapters._base import backbone_modules, parametrize_weight
from recast_exp.config.schema import key
from recast_exp.errors import UserError

LABEL = "Piggyback"
MASKED = "adapter/masked"
FITS = "linear layers and convolutions, as all of timm's models have"


@dataclass
class Options:
    """Options of the adapter."""

    start: float = key(1e-2, "first value of the real mask")
    threshold: float = key(5e-3, "above it, a weight is kept; below `start`")

    def __post_init__(self) -> None:
        if self.start <= self.threshold:
            raise UserError(f"adapter.start: got {self.start}, takes a number above adapter.threshold={self.threshold}")


class Mask(nn.Module):
    """Parametrisation of a weight by a mask over it; what it masks may itself be a combination of templates.

    Attributes:
        bits: How many bits a number of the mask takes in a task file.
    """

    bits = 1

    def __init__(self, weight: Tensor, options: Options) -> None:
        super().__init__()
        self.start = options.start
        self.threshold = options.threshold
        self.mask = nn.Parameter(torch.full_like(weight, options.start, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        """Mask the weight."""
        kept = (self.mask > self.threshold).to(self.mask.dtype)
        return weight * (kept + (self.mask - self.mask.detach()))  # the bracket is 0, with a gradient of 1

    def masked(self) -> int:
        """How many weights are masked."""
        return int((self.mask <= self.threshold).sum())

    def pack(self) -> Tensor:
        """The binary mask, eight weights to a byte: uint8 [⌈weights / 8⌉]."""
        kept = (self.mask > self.threshold).flatten().cpu().numpy()
        return torch.from_numpy(np.packbits(kept))

    @torch.no_grad()
    def unpack(self, packed: Tensor) -> None:
        """Take over a packed mask; a weight that is kept gets the real mask's first value, another one 0."""
        kept = np.unpackbits(packed.cpu().numpy(), count=self.mask.numel()).astype(np.float32)
        self.mask.copy_(torch.from_numpy(kept).view_as(self.mask) * self.start)


def inject(network: nn.Module, options: Options) -> dict[str, str]:
    """Put a mask on every weight of the backbone's linear layers and convolutions."""
    names: dict[str, str] = {}
    for path, layer in _layers(network):
        names[path] = f"{path}.{parametrize_weight(layer, Mask(layer.weight, options))}.mask"
    return names


@torch.no_grad()
def measure(network: nn.Module) -> dict[str, float]:
    """The share of the weights that are masked."""
    masks = [module for module in network.modules() if isinstance(module, Mask)]
    return {MASKED: sum(mask.masked() for mask in masks) / sum(mask.mask.numel() for mask in masks)}


def remark(reported: Mapping[str, float], last: Mapping[str, float], options: Options) -> str:
    """Masks that have not come as far as their threshold are none: no result of this adapter."""
    if reported.get(MASKED, 1.0):
        return ""
    if last.get(MASKED):
        return (
            "Piggyback masks no weight in the reported epoch, the best by validation; in the last epoch it masked "
            f"{100 * last[MASKED]:.1f} %"
        )
    return (
        "Piggyback has masked no weight: a real mask moves by about optimizer.adapter_lr (times optimizer.lr_scale) in "
        f"a step and has {options.start - options.threshold:g} to go; raise the rate, or train for more steps"
    )


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Put zeros into the weights and take the masks off."""
    for _, layer in _layers(network):
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[-1], Mask):
            own = type(layer)  # a deep copy shares it with its original, whose parametrisation is to stay
            layer.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            layer.weight.requires_grad_(False)


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    return [(path, layer) for path, layer in backbone_modules(network) if isinstance(layer, nn.Linear | nn.Conv2d)]
