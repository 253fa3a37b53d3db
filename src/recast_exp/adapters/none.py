"""No adapter: RECAST, a linear probe or full fine-tuning on its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recast_exp.adapters._base import Adapter


@dataclass
class NoAdapter(Adapter):
    """No adapter: leaves the network as it is; it has no options."""

    fits = "any model"
    label = ""

    def inject(self, network: nn.Module) -> dict[str, str]:
        """Change nothing."""
        return {}
