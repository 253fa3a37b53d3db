"""`random`: fixed random directions from a seed, added to the frozen weight.

Combinations of random directions as in NOLA (Koohpayegani et al., ICLR 2024, arXiv 2310.02556), whose directions are
products of two small random matrices, where these are whole. They show what it is worth to take templates from
pretrained weights (`layers`): all else is the same.

    W'[l] = W[l] + Σ_i c[l, i] T[i],   ‖T[i]‖ = the mean of ‖W[l]‖ over the group
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ADDED = True
PER_LAYER = False
MIXINGS = ("sum",)


def most(shape: Sequence[int], num_layers: int) -> int:
    """As many as 64: each has the size of a weight."""
    return 64


def usual(shape: Sequence[int], num_layers: int, mixing: str) -> int:
    """As many as `layers` has."""
    return num_layers


def make(weights: Tensor, rank: int, mixing: str, *, seed: int) -> Tensor:
    """Directions [n, rows, ...] as long as the weights [L, rows, ...] are on average."""
    directions = torch.randn((rank, *weights.shape[1:]), generator=torch.Generator().manual_seed(seed))
    length = weights.flatten(1).norm(dim=1).mean()
    norms = directions.flatten(1).norm(dim=1)
    scaled: Tensor = directions * (length / norms).reshape(-1, *[1] * (directions.dim() - 1))
    return scaled
