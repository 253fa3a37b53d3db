"""`singular`: the leading singular directions of each layer's own weight.

With W = Σ_i σ[i] u[i] v[i]ᵀ, the factors are σ[i] u[i] and v[i]. `scales` trains a factor for each singular value,
1 + c[i] (SVF: Sun et al., NeurIPS 2022, arXiv 2206.06122; SVDiff: Han et al., ICCV 2023, arXiv 2303.11305), `matrix` a
small r × r matrix between the directions (LoRA-XS: Bałazy et al., arXiv 2405.17604).
"""

from __future__ import annotations

from torch import Tensor

from recast_exp.recast.templates._factors import directions_of, most, usual

__all__ = ["ADDED", "MIXINGS", "PER_LAYER", "make", "most", "usual"]

ADDED = True
PER_LAYER = True
MIXINGS = ("scales", "matrix", "gated")


def make(weights: Tensor, rank: int, mixing: str, *, seed: int) -> Tensor:
    """Factors [r, rows + columns] of the weight [1, rows, ...] of one layer; the seed changes nothing."""
    return directions_of(weights, rank)
