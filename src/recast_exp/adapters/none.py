"""No adapter: RECAST, a linear probe or full fine-tuning alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

LABEL = ""
FITS = "every model"


@dataclass
class Options:
    """It has none."""


def inject(network: nn.Module, options: Options) -> dict[str, str]:
    """Leave the network as it is."""
    return {}
