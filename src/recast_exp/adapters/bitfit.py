"""BitFit: train the biases (Ben Zaken, Goldberg and Ravfogel, ACL 2022, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recast_exp.adapters._base import own_parameters

LABEL = "BitFit"
FITS = "biases, as nearly all of timm's models have"


@dataclass
class Options:
    """It has none."""


def inject(network: nn.Module, options: Options) -> dict[str, str]:
    """Name the biases of the backbone: of linear layers, convolutions and norms."""
    return own_parameters(network, names=("bias",))
