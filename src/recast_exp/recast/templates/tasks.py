"""`tasks`: what earlier tasks have changed in each layer's weight, from their task files.

Task vectors with a coefficient for each block (aTLAS: Zhang et al., NeurIPS 2024, arXiv 2407.02880): what one task has
learnt becomes a template for the next.

    W'[l] = W[l] + Σ_t c[l, t] (W[l] of the task t - W[l])
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

ADDED = True
PER_LAYER = True
MIXINGS = ("sum",)


def most(shape: Sequence[int], num_layers: int) -> int:
    """A thousand tasks."""
    return 1000


def usual(shape: Sequence[int], num_layers: int, mixing: str) -> int:
    """One; the number of task files decides."""
    return 1


def make(weights: Tensor, rank: int, mixing: str, *, differences: Tensor) -> Tensor:
    """The differences [n, rows, ...] that n tasks have made in the weight [1, rows, ...] of one layer."""
    return differences
