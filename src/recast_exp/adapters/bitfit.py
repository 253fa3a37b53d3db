"""BitFit: train the biases (Ben Zaken, Goldberg and Ravfogel, ACL 2022, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recast_exp.adapters._base import Adapter, own_parameters


@dataclass
class BitFit(Adapter):
    """Trains the biases (Ben Zaken et al., arXiv 2106.10199); it has no options."""

    fits = "biases, as in nearly all of timm's models"

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Name the biases of the backbone's linear layers, convolutions and normalisation layers."""
        return own_parameters(network, names=("bias",))
