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

from recast_exp.adapters._base import Adapter, backbone_modules, parametrize_weight
from recast_exp.config.schema import key
from recast_exp.errors import UserError

MASKED = "adapter/masked"


@dataclass
class Piggyback(Adapter):
    """A binary mask on every weight of the linear layers and convolutions."""

    fits = "linear layers and convolutions, as in all of timm's models"

    start: float = key(1e-2, "first value of the real mask")
    threshold: float = key(5e-3, "above it, a weight is kept; below `start`")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start <= self.threshold:
            raise UserError(f"start: expected a number above threshold={self.threshold}, got {self.start}")

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Put a mask on every weight of the backbone's linear layers and convolutions."""
        names: dict[str, str] = {}
        for path, layer in _layers(network):
            mask = Mask(layer.weight, start=self.start, threshold=self.threshold)
            names[path] = f"{path}.{parametrize_weight(layer, mask)}.mask"
        return names

    @torch.no_grad()
    def measure(self, network: nn.Module) -> dict[str, float]:
        """The share of the weights that are masked."""
        masks = [module for module in network.modules() if isinstance(module, Mask)]
        return {MASKED: sum(mask.masked() for mask in masks) / sum(mask.mask.numel() for mask in masks)}

    def remark(self, reported: Mapping[str, float], last: Mapping[str, float]) -> str:
        """Warn where no weight is masked: such a run says nothing about this adapter."""
        if reported.get(MASKED, 1.0):
            return ""
        if last.get(MASKED):
            return (
                "Piggyback masks no weight in the reported epoch, the best by validation; in the last epoch it masked "
                f"{100 * last[MASKED]:.1f} %"
            )
        return (
            "Piggyback has masked no weight: a real mask moves by about optimizer.adapter_lr (times "
            f"optimizer.lr_scale) in a step and has {self.start - self.threshold:g} to go; raise the learning rate, or "
            "train for more steps"
        )

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Set the masked weights to zero and remove the masks."""
        for _, layer in _layers(network):
            if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[-1], Mask):
                own = type(layer)  # a deep copy shares it with its original, whose parametrisation is to stay
                layer.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
                layer.weight.requires_grad_(False)


class Mask(nn.Module):
    """Parametrisation of a weight by a mask over it; what it masks may itself be a combination of templates.

    Attributes:
        bits: How many bits a number of the mask takes in a task file.
    """

    bits = 1

    def __init__(self, weight: Tensor, *, start: float, threshold: float) -> None:
        super().__init__()
        self.start = start
        self.threshold = threshold
        self.mask = nn.Parameter(torch.full_like(weight, start, dtype=torch.float32))

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


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    return [(path, layer) for path, layer in backbone_modules(network) if isinstance(layer, nn.Linear | nn.Conv2d)]
