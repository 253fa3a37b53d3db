"""Batches of images in an order, and with augmentations, that follow from (seed, epoch, index) alone.

So a run repeats to the bit with any number of worker processes, and continues at any epoch as if it had never
stopped. The sampler yields (epoch, index) keys: that way the epoch reaches workers that outlive it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from recast_exp.data.store import Store
from recast_exp.data.transforms import Augmentation
from recast_exp.errors import UserError

Key = tuple[int, int]
Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class ImageDataset(Dataset[Any]):
    """The samples of one split, in batches of what the backbone sees.

    Args:
        store: The resized images.
        labels: Class numbers [N].
        augmentation: What is done with them.
        seed: Seed of the augmentation's numbers.
        alter: Whether the augmentation is completed here. Otherwise its numbers are part of the batch, and it is left
            to whoever has the batch on a device.
    """

    def __init__(
        self, store: Store, labels: NDArray[Any], augmentation: Augmentation, seed: int, *, alter: bool = True
    ) -> None:
        self.store = store
        self.labels = torch.from_numpy(labels)
        self.augmentation = augmentation
        self.seed = seed
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

    def __getitems__(self, keys: list[Key]) -> Batch | UserError:
        """Return a batch, or the error that an image of it met: see `ImageLoader`."""
        try:
            return self.batch(keys, alter=self.alter)
        except UserError as error:
            return error

    def batch(self, keys: list[Key], *, alter: bool) -> Batch:
        """Return images, uint8 [B, 3, S, S], and labels, int64 [B].

        Args:
            keys: Which images.
            alter: Whether to complete the augmentation. Otherwise the numbers for it, float32 [B, draws], come third.

        Raises:
            UserError: If an image cannot be read. One line that names the file.
        """
        size = self.augmentation.spec.size
        images = torch.empty((len(keys), 3, size, size), dtype=torch.uint8)
        # Workers compute on one thread. A sum over an image may differ in its last bit with more, so do not use more
        # in the main process either.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            numbers = self._draw(keys)
            rows = numbers.tolist()
            for place, row, (_, index) in zip(images, rows, keys, strict=True):
                place.copy_(self.augmentation.crop(self.store[index], row))
            labels = self.labels[[index for _, index in keys]]
            if not alter and self.augmentation.draws:
                return images, labels, numbers
            return self.augmentation(images, numbers), labels
        finally:
            torch.set_num_threads(threads)

    def _draw(self, keys: list[Key]) -> Tensor:
        """Uniform numbers for each image, whichever batch and process it is in."""
        numbers = torch.empty(len(keys), self.augmentation.draws)
        if self.augmentation.draws:
            generator = torch.Generator()
            for row, (epoch, index) in zip(numbers, keys, strict=True):
                generator.manual_seed(derive_seed(self.seed, epoch, index))
                torch.rand(len(row), generator=generator, out=row)
        return numbers


class EpochSampler(Sampler[Key]):
    """Yields this rank's (epoch, index) keys; Lightning sets the epoch.

    Args:
        size: Number of samples.
        seed: With a seed, each epoch has its own order and every rank gets equally many samples (the first ones of the
            order fill up the last turn): ranks that train together must take equally many steps. Without one, samples
            come in their order and none twice: what evaluation sums up over the ranks is exact.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, size: int, seed: int | None, rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the keys to come."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Key]:
        if self.seed is None:
            order = torch.arange(self.size)
        else:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, "order"))
            order = torch.randperm(self.size, generator=generator)
            # A stride that wraps around as often as it has to, should there be more ranks than samples
            order = order[torch.arange(len(self) * self.world_size) % self.size]
        for index in order[self.rank :: self.world_size].tolist():
            yield self.epoch, index

    def __len__(self) -> int:
        own = self.size if self.seed is not None else self.size - self.rank
        return max(0, -(-own // self.world_size))


class EpochBatchSampler(Sampler[list[Key]]):
    """Batches of the keys of `sampler`; none is dropped, the last batch takes what is left.

    Args:
        sampler: Where the keys come from. Lightning finds it by this name, to set its epoch.
        batch_size: Keys in a batch.
        allow_single: Whether a last batch of one sample may stand alone. Otherwise it joins the batch before it: in
            training, BatchNorm has no variance to take from a single image.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, *, allow_single: bool) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.allow_single = allow_single

    def __iter__(self) -> Iterator[list[Key]]:
        keys = list(self.sampler)
        last = len(self) - 1
        for batch in range(len(self)):
            start = batch * self.batch_size
            yield keys[start:] if batch == last else keys[start : start + self.batch_size]

    def __len__(self) -> int:
        full, left = divmod(len(self.sampler), self.batch_size)
        joins = left == 1 and full > 0 and not self.allow_single
        return full + (left > 0 and not joins)


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises a worker's `UserError` as it is.

    A plain one raises it with the worker's traceback as its message. So the dataset returns such an error in place of
    a batch, and it is raised here.

    Args:
        dataset: The samples.
        batch_sampler: The order of their keys.
        num_workers: Loader processes; they live as long as the loader.
        pin_memory: Whether the batches are to be copied to a CUDA device.
        prefetch_factor: Batches that each process prepares ahead.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_sampler: EpochBatchSampler,
        num_workers: int,
        *,
        pin_memory: bool = False,
        prefetch_factor: int = 2,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # otherwise each start takes a number from the caller's generator
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches, as `ImageDataset.batch` makes them.

        Raises:
            UserError: If an image cannot be read.
        """
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                break
            yield batch
        else:
            return
        # Stop persistent workers now: found in a reference cycle later, which an error and the frames that it passed
        # may well be part of, they would take five seconds to stop.
        self._iterator = None
        raise batch


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` to a seed of 63 bits."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _as_it_is(batch: Any) -> Any:
    """The dataset makes whole batches."""
    return batch
