"""No adapter: RECAST, a linear probe or full fine-tuning alone."""

from __future__ import annotations

from omegaconf import DictConfig
from torch import nn


def inject(network: nn.Module, cfg: DictConfig) -> dict[str, str]:
    """Leave the network as it is."""
    return {}
