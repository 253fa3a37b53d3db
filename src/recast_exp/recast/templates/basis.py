"""`basis`: directions that a group shares, and a small mixer for each layer under a SiLU.

After CRISP (Tasnim, Prabhumoye and Plummer, CVPR 2026, arXiv 2603.27383): weights are factorised into a basis shared by
layers and small mixers. Its code was not at hand. Here the basis V is that of the leading right singular directions of
the group's stacked weights, U[l] = V W[l]ᵀ is what layer l has in it, and the mixer is square; the rest of the weight,
which CRISP leaves out where it compresses, stays. `matrix` leaves out the SiLU, `scales` all of the mixer but its
diagonal.
"""

from __future__ import annotations

from torch import Tensor

from recast_exp.recast.templates._factors import directions_of, most, usual

__all__ = ["ADDED", "MIXINGS", "PER_LAYER", "make", "most", "usual"]

ADDED = True
PER_LAYER = False
MIXINGS = ("gated", "matrix", "scales")


def make(weights: Tensor, rank: int, mixing: str, *, seed: int) -> Tensor:
    """Factors [r, L · rows + columns] of the weights [L, rows, ...] of a group; the seed changes nothing."""
    return directions_of(weights, rank)
