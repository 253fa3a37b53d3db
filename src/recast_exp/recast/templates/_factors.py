"""Singular directions of weights, for the kinds of templates that consist of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def most(shape: Sequence[int], num_layers: int) -> int:
    """The number of singular directions."""
    return min(shape[0] * num_layers, math.prod(shape[1:]))


def usual(shape: Sequence[int], num_layers: int, mixing: str) -> int:
    """All directions for a scale each, four for a matrix between them."""
    return most(shape, num_layers) if mixing == "scales" else min(4, most(shape, num_layers))


def directions_of(weights: Tensor, rank: int) -> Tensor:
    """The leading right singular directions V of stacked weights, and each weight's part in them, U[l] = V W[l]ᵀ.

    For a single weight, U holds its left singular directions times their singular values. The largest entry of each v
    is positive: the sign of a direction is arbitrary otherwise.

    Args:
        weights: [L, rows, ...].
        rank: Number r of directions.

    Returns:
        [r, L · rows + columns], float32.
    """
    stacked = weights.reshape(weights.shape[0] * weights.shape[1], -1).double()
    right = torch.linalg.svd(stacked, full_matrices=False).Vh[:rank]
    largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
    right = right * largest.sign()
    return torch.cat([right @ stacked.T, right], dim=1).float()
