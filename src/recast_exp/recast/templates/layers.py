"""`layers`: the pretrained weights of a group's layers, mixed by Neural Mimicry (RECAST, arXiv 2411.16870).

    W'[l] = Σ_i c[l, i] T[i],   with W[l] at first

The weights are rewritten, not added to. `recast.solvers` find templates and coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence

ADDED = False
PER_LAYER = False
MIXINGS = ("sum",)


def most(shape: Sequence[int], num_layers: int) -> int:
    """As many templates as layers, with which the weights are rebuilt exactly."""
    return num_layers


def usual(shape: Sequence[int], num_layers: int, mixing: str) -> int:
    """As many templates as layers."""
    return num_layers
