"""Batches of images, whose order and augmentation follow from (seed, epoch, index) alone.

So a run repeats bit for bit with any number of worker processes, and continues at any epoch as if it had never
stopped. The sampler yields (epoch, index) keys: that way the epoch reaches workers that outlive it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from recast_exp.data.store import Store
from recast_exp.data.transforms import Augmentation
from recast_exp.errors import RecastError

Key = tuple[int, int]
Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
Assembled = TypeVar("Assembled")


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """The samples of one split, in batches of backbone inputs.

    Args:
        store: The resized images.
        labels: Class numbers [N].
        augmentation: Crops and alters the images.
        seed: Seed of the augmentation.
        views: Number of epochs after which the alterations repeat; None for never.
        alter: Whether the images are altered here. Otherwise the amounts (`Augmentation.amounts`) are part of the
            batch, and the images are altered once the batch is on the device.
    """

    def __init__(
        self,
        store: Store,
        labels: NDArray[np.int64],
        augmentation: Augmentation,
        seed: int,
        *,
        views: int | None = None,
        alter: bool = True,
    ) -> None:
        self.store = store
        self.labels = torch.from_numpy(labels)
        self.augmentation = augmentation
        self.seed = seed
        self.views = views
        self.alter = alter

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """Return the image, uint8 [3, S, S], and the label of (epoch, index).

        Raises:
            UserError: If the image cannot be read. One line that names the file.
        """
        images, labels = self.batch([key], alter=True)[:2]
        return images[0], int(labels[0])

    def __getitems__(self, keys: list[Key]) -> Batch | RecastError:
        """Return a batch, or the error of one of its images: see `ImageLoader`."""
        try:
            return self.batch(keys, alter=self.alter)
        except RecastError as error:
            return error

    def batch(self, keys: list[Key], *, alter: bool) -> Batch:
        """Return images, uint8 [B, 3, S, S], and labels, int64 [B].

        Args:
            keys: Epochs and indices of the images.
            alter: Whether to alter the images. Otherwise their amounts, float32 [B, A], come third.

        Raises:
            UserError: If an image cannot be read. One line that names the file.
        """
        size = self.augmentation.spec.size
        images = torch.empty((len(keys), 3, size, size), dtype=torch.uint8)
        # Workers compute on one thread. With more, a sum over an image may differ in its last bit, so the main process
        # uses one too.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            uniform = self._sample(keys)
            for image, row, (_, index) in zip(images, uniform.tolist(), keys, strict=True):
                image.copy_(self.augmentation.crop(self.store[index], row))
            labels = self.labels[[index for _, index in keys]]
            amounts = self.augmentation.amounts(uniform)
            if not alter and self.augmentation.draws:
                return images, labels, amounts
            return self.augmentation(images, amounts), labels
        finally:
            torch.set_num_threads(threads)

    def _sample(self, keys: list[Key]) -> Tensor:
        """Sample uniform numbers [B, draws], which for an image are the same in any batch and process."""
        uniform = torch.empty(len(keys), self.augmentation.draws)
        if self.augmentation.draws:
            generator = torch.Generator()
            for row, (epoch, index) in zip(uniform, keys, strict=True):
                view = epoch % self.views if self.views else epoch
                generator.manual_seed(derive_seed(self.seed, view, index))
                torch.rand(len(row), generator=generator, out=row)
        return uniform


class ActivationDataset(Dataset[tuple[Tensor, int]]):
    """What goes into a block of a model, in place of the images of a split.

    Args:
        activations: [V, N, ...], of V views of N images; epoch e takes view e mod V.
        labels: int64 [N].
    """

    def __init__(self, activations: Tensor, labels: Tensor) -> None:
        self.activations = activations
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """Return those of (epoch, index), and the label."""
        activations, labels = self.__getitems__([key])
        return activations[0], int(labels[0])

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        """Return a batch [B, ...] and its labels [B]."""
        views = [epoch % len(self.activations) for epoch, _ in keys]
        rows = [index for _, index in keys]
        return self.activations[views, rows], self.labels[rows]


class EpochSampler(Sampler[Key]):
    """Yields the (epoch, index) keys of all samples, each once; Lightning sets the epoch.

    Args:
        size: Number of samples.
        seed: With a seed, each epoch has its own order; without one, samples come in their order.
        only: The epoch of all keys, whatever Lightning sets; None for what it sets.
    """

    def __init__(self, size: int, seed: int | None, only: int | None = None) -> None:
        self.size = size
        self.seed = seed
        self.only = only
        self.epoch = only or 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the keys to come."""
        self.epoch = epoch if self.only is None else self.only

    def __iter__(self) -> Iterator[Key]:
        if self.seed is None:
            order = torch.arange(self.size)
        else:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, "order"))
            order = torch.randperm(self.size, generator=generator)
        for index in order.tolist():
            yield self.epoch, index

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Share:
    """The share of one of several processes in a global batch.

    Attributes:
        start: Position of the batch's first sample in the order of the epoch.
        total: Samples of the batch, over all processes.
        local: Samples of this process. They are the first of its batch; any others are stand-ins.
    """

    start: int
    total: int
    local: int


class EpochBatchSampler(Sampler[list[Key]]):
    """This rank's shares of the batches of all keys; none is dropped, the last batch may be smaller.

    The global batches are the same for any number of ranks, and every rank has as many batches as the others, because
    ranks synchronise at every batch. Rank r takes every world_size-th sample of a batch, starting at r. If these are
    fewer than a batch must have, stand-ins are added, which are ignored (`share`).

    Args:
        sampler: The source of the keys. Lightning finds it by this name, to set its epoch.
        batch_size: Keys in a batch, over all ranks.
        rank: Number of this process.
        world_size: Number of processes.
        allow_single: Whether the last batch may have a single sample. Otherwise that sample joins the batch before it:
            in training, BatchNorm cannot compute a variance from a single image.
    """

    def __init__(
        self, sampler: EpochSampler, batch_size: int, rank: int = 0, world_size: int = 1, *, allow_single: bool
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.allow_single = allow_single

    def share(self, batch: int) -> Share:
        """This rank's share of a batch, by the number of the batch in the epoch."""
        start = batch * self.batch_size
        total = len(self.sampler) - start if batch == len(self) - 1 else self.batch_size
        return Share(start, total, max(0, -(-(total - self.rank) // self.world_size)))

    def __iter__(self) -> Iterator[list[Key]]:
        keys = list(self.sampler)
        for batch in range(len(self)):
            share = self.share(batch)
            whole = keys[share.start : share.start + share.total]
            least = 1 if self.allow_single else min(2, share.total)
            missing = 0 if self.world_size == 1 else max(0, least - share.local)
            yield whole[self.rank :: self.world_size] + whole[:missing]

    def __len__(self) -> int:
        full, left = divmod(len(self.sampler), self.batch_size)
        joins = left == 1 and full > 0 and not self.allow_single
        return full + (left > 0 and not joins)


class Batches(Protocol):
    """The batches of an epoch, as lists of keys."""

    def share(self, batch: int) -> Share:
        """This process's share of a batch, by the number of the batch in the epoch."""
        ...

    def __iter__(self) -> Iterator[list[Key]]: ...

    def __len__(self) -> int: ...


class ImageLoader(DataLoader[tuple[Tensor, int]]):
    """A DataLoader that raises a worker's `RecastError` unchanged.

    A plain one raises it with the worker's traceback as its message. So the dataset returns such an error in place of
    a batch, and it is raised here.

    Args:
        dataset: The samples.
        batch_sampler: The order of their keys.
        num_workers: Loader processes; they live as long as the loader.
        pin_memory: Whether the batches are to be copied to a CUDA device.
        prefetch_factor: Batches that each process prepares ahead.
    """

    batch_sampler: Batches

    def __init__(
        self,
        dataset: ImageDataset | ActivationDataset,
        batch_sampler: Batches,
        num_workers: int,
        *,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
            multiprocessing_context=_start_method() if num_workers else None,
            generator=torch.Generator(),  # otherwise each start samples a number from the caller's generator
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield batches, as `ImageDataset.batch` makes them.

        Raises:
            UserError: If an image cannot be read.
        """
        for batch in super().__iter__():
            if isinstance(batch, RecastError):
                break
            yield batch
        else:
            return
        # Stop persistent workers now. If they were stopped later, by the collection of a reference cycle (an error and
        # the frames that it passed often form one), that would take five seconds.
        self._iterator = None
        raise batch


def _start_method() -> str | None:
    """Python's own way to start processes where a library has set one of its own; None leaves the choice to Python.

    The processes of `launcher=joblib` start others by "loky", which knows only processes of its own.
    """
    known = multiprocessing.get_all_start_methods()
    return None if multiprocessing.get_start_method() in known else known[0]


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` to a seed of 63 bits."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _unchanged(batch: Assembled) -> Assembled:
    """Return the batch: the dataset has assembled it."""
    return batch
