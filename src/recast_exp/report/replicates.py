"""Replicates: runs of one method on one dataset, told apart by seed and draw of the training images; and their words.

A solved head hardly depends on the seed. Its replicates are other training and validation images, drawn by
`dataset.split_seed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Replicate(NamedTuple):
    """The numbers in which two runs of one method on one dataset differ.

    Attributes:
        seed: The run's seed.
        draw: Its `dataset.split_seed`.
    """

    seed: int
    draw: int


class Words(NamedTuple):
    """What a report calls its replicates.

    Attributes:
        one: A single one.
        many: Several; in "2 of 3 seeds", for example.
        vary: The numbers that vary between them.
        same: What the two runs of a pair have in common.
        listed: The attributes of a job that tell it from its replicates.
    """

    one: str
    many: str
    vary: str
    same: str
    listed: tuple[str, ...]


SEEDS = Words("seed", "seeds", "seeds", "dataset and seed", ("seed",))
DRAWS = Words("draw", "draws", "draws of the training images", "dataset and draw", ("seed", "draw"))
RUNS = Words("run", "runs", "seeds and draws of the training images", "dataset, seed and draw", ("seed", "draw"))


def words(replicates: Iterable[Replicate]) -> Words:
    """Seeds, unless draws differ; then draws, or runs if seeds differ as well."""
    found = set(replicates)
    if len({replicate.draw for replicate in found}) < 2:
        return SEEDS
    return DRAWS if len({replicate.seed for replicate in found}) < 2 else RUNS
