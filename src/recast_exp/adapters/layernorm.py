"""LayerNorm tuning: train the scale and the shift of the normalisation layers.

Basu et al., AAAI 2024, arXiv 2304.01917; for BatchNorm: Frankle, Schwab and Morcos, ICLR 2021, arXiv 2003.00152.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recast_exp.adapters._base import NORMS, Adapter, own_parameters


@dataclass
class LayerNormTuning(Adapter):
    """Trains the scale and the shift of the normalisation layers (Basu et al., arXiv 2304.01917); it has no options."""

    fits = "normalisation layers with a scale and a shift"
    label = "LayerNorm"

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Name the scales and the shifts of the backbone's normalisation layers."""
        return own_parameters(network, names=("weight", "bias"), kinds=NORMS)
