"""Piggyback: a binary mask on each weight (Mallya, Davis and Lazebnik, ECCV 2018, arXiv 1801.06519).

    Ŵ = W ⊙ [m > t],   ∂L/∂m = ∂L/∂Ŵ ⊙ W   (straight-through)

The real-valued mask m starts above the threshold t everywhere, so all weights are kept at first. A task file holds one
bit per weight: 2.66 MB for a ResNet-34.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recast_exp.adapters._base import Adapter, backbone_modules, merge_parametrized, parametrize_weight
from recast_exp.config.fields import option
from recast_exp.errors import UserError

MASKED = "adapter/masked"


@dataclass
class Piggyback(Adapter):
    """A binary mask on every weight of the linear layers and convolutions (Mallya et al., arXiv 1801.06519).

    Args:
        start: Initial value of the real-valued mask.
        threshold: Weights whose mask is above it are kept; less than `start`, also as float32.
    """

    fits = "linear layers and convolutions, as in all of timm's models"

    start: float = option(1e-2, "initial value of the real-valued mask", ge=-10_000, le=10_000)
    threshold: float = option(5e-3, "weights whose mask is above it are kept; less than `start`", ge=-10_000, le=10_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if np.float32(self.start) <= np.float32(self.threshold):  # as the masks are compared
            alike = ", which is the same in float32" if self.start > self.threshold else ""
            raise UserError(f"start: expected a number above threshold={self.threshold}, got {self.start}{alike}")

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Put a mask on every weight of the backbone's linear layers and convolutions."""
        names: dict[str, str] = {}
        for path, layer in _layers(network):
            mask = Mask(layer.weight, start=self.start, threshold=self.threshold)
            names[path] = f"{path}.{parametrize_weight(layer, mask)}.mask"
        return names

    @torch.no_grad()
    def measure(self, network: nn.Module) -> dict[str, float]:
        """The fraction of masked weights, from 0 to 1, as `adapter/masked`."""
        masks = [module for module in network.modules() if isinstance(module, Mask)]
        return {MASKED: sum(mask.masked() for mask in masks) / sum(mask.mask.numel() for mask in masks)}

    def remark(self, reported: Mapping[str, float], last: Mapping[str, float]) -> str:
        """Warn if no weight is masked: such a run says nothing about this adapter."""
        if reported.get(MASKED, 1.0):
            return ""
        if last.get(MASKED):
            return (
                "Piggyback masks no weight in the reported epoch, the best by validation; in the last epoch, it masks "
                f"{100 * last[MASKED]:.1f} %"
            )
        return (
            "Piggyback has masked no weight: the mask's values change by about optimizer.adapter_lr times "
            f"optimizer.lr_scale per step, and the threshold is {self.start - self.threshold:g} away; raise the "
            "learning rate, or train for more steps"
        )

    @staticmethod
    @torch.no_grad()
    def merge(network: nn.Module) -> None:
        """Set the masked weights to zero and remove the masks."""
        merge_parametrized(network, Mask)


class Mask(nn.Module):
    """Parametrisation of a weight by a mask; the weight itself may be a combination of templates.

    Args:
        weight: The weight to mask; only its shape and device are used.
        start: Initial value of the real-valued mask.
        threshold: Weights whose mask is above it are kept.

    Attributes:
        bits: Bits of one entry of the mask in a task file.
    """

    bits = 1

    def __init__(self, weight: Tensor, *, start: float, threshold: float) -> None:
        super().__init__()
        self.start = start
        self.threshold = threshold
        self.mask = nn.Parameter(torch.full_like(weight, start, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        """Mask the weight [rows, ...]; the result has its dtype."""
        kept = (self.mask > self.threshold).to(self.mask.dtype)
        gradient = self.mask - self.mask.detach()  # 0, with a gradient of 1
        return weight * (kept + gradient).to(weight.dtype)

    def masked(self) -> int:
        """The number of masked weights."""
        return int((self.mask <= self.threshold).sum())

    def pack(self) -> Tensor:
        """The binary mask, eight weights to a byte: uint8 [⌈weights / 8⌉]."""
        kept = (self.mask > self.threshold).flatten().cpu().numpy()
        return torch.from_numpy(np.packbits(kept))

    @torch.no_grad()
    def unpack(self, packed: Tensor) -> None:
        """Load a packed mask; entries of kept weights become `start`, the others 0, or a `threshold` below 0."""
        bits = np.unpackbits(packed.cpu().numpy(), count=self.mask.numel()).astype(bool)
        kept = torch.from_numpy(bits).view_as(self.mask).to(self.mask.device)
        self.mask.fill_(min(0.0, self.threshold)).masked_fill_(kept, self.start)


def _layers(network: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    return [(path, layer) for path, layer in backbone_modules(network) if isinstance(layer, nn.Linear | nn.Conv2d)]
