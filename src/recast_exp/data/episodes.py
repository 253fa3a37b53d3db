"""Episodes: batches with the same number of images of each of some classes, sampled anew for every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from recast_exp.data.loader import EpochSampler, Key, Share, derive_seed


@dataclass(frozen=True)
class Episodes:
    """How the training images are divided into steps.

    Attributes:
        images: Images of a step at most, and of two classes at least. A training set of no more is taken whole.
        classes: Classes of an episode at most.
        per_class: Images of each class in an episode; None takes as many as there is room for.
    """

    images: int
    classes: int
    per_class: int | None = None


class EpisodeSampler(Sampler[list[Key]]):
    """Yields the keys of one episode after the other; where the set is small, of the whole set.

    What an episode holds follows from (seed, epoch, number of the episode). In an epoch, there are as many episodes as
    it takes to see as many images as the set has.

    Args:
        sampler: The keys of an epoch. Lightning finds it by this name, to set its epoch.
        labels: int64 [N], classes of the training images.
        episodes: The size of an episode.
        seed: Seed of the choices.
    """

    def __init__(self, sampler: EpochSampler, labels: Tensor, episodes: Episodes, seed: int) -> None:
        self.sampler = sampler
        self._seed = seed
        order = labels.argsort(stable=True)
        rows = torch.split(order, torch.unique(labels, return_counts=True)[1].tolist())
        self._whole = len(labels) <= episodes.images
        # A class of one image has none left to ask for; where the set is taken whole, it is still one to choose
        self._rows = [row for row in rows if self._whole or len(row) > 1]
        room = episodes.images // (episodes.per_class or 2)
        self._classes = min(len(self._rows), episodes.classes, max(2, room))
        self._per_class = episodes.per_class or max(2, episodes.images // self._classes)

    def share(self, batch: int) -> Share:
        """The images of an episode; there is one process."""
        size = len(self._choose(batch)) if not self._whole else len(self.sampler)
        return Share(0, size, size)

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in range(len(self)):
            rows = list(range(len(self.sampler))) if self._whole else self._choose(batch).tolist()
            yield [(self.sampler.epoch, row) for row in rows]

    def __len__(self) -> int:
        if self._whole:
            return 1
        return -(-len(self.sampler) // (self._classes * self._per_class))

    def _choose(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, self.sampler.epoch, batch, "episode"))
        chosen = torch.randperm(len(self._rows), generator=generator)[: self._classes].tolist()
        parts = []
        for number in chosen:
            rows = self._rows[number]
            parts.append(rows[torch.randperm(len(rows), generator=generator)[: self._per_class]])
        return torch.cat(parts)
