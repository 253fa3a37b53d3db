"""Reading images in an order, and with augmentations, that follow from (seed, epoch, index) alone.

So a run repeats to the bit with any number of worker processes, and continues at any epoch as if it had never
stopped. The sampler yields (epoch, index) keys: that way the epoch reaches workers that outlive it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from recast_exp.data.base import Samples
from recast_exp.data.transforms import ImageTransform
from recast_exp.errors import UserError

Key = tuple[int, int]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """The samples of one split, transformed.

    Args:
        samples: Images and labels.
        transform: Makes the input of the backbone. Its random part sees a generator seeded by (seed, epoch, index);
            the caller's generator is left as it was.
        seed: Seed of the augmentation.
        keep: Keep the deterministic part's results in memory, so that it runs once per image and process.
    """

    def __init__(self, samples: Samples, transform: ImageTransform, seed: int, *, keep: bool) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self._kept: dict[int, Tensor] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """Return the image, uint8 [3, S, S], and the label of (epoch, index).

        Raises:
            UserError: If the image cannot be read. One line that names the file.
        """
        epoch, index = key
        image = self._prepared(index)
        if self.transform.augment is not None:
            generator = torch.default_generator
            state = generator.get_state()
            try:
                # torch.manual_seed would reach for the accelerators' generators too
                generator.manual_seed(derive_seed(self.seed, epoch, index))
                image = self.transform.augment(image)
            finally:
                generator.set_state(state)
        return image, int(self.samples.labels[index])

    def __getitems__(self, keys: list[Key]) -> list[tuple[Tensor, int]] | UserError:
        """Return the samples of a batch, or the error that one of them met: see `ImageLoader`."""
        # Workers compute on one thread. A sum over an image may differ in its last bit with more, so do not use more
        # in the main process either.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [self[key] for key in keys]
        except UserError as error:
            return error
        finally:
            torch.set_num_threads(threads)

    def _prepared(self, index: int) -> Tensor:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        image = read_image(self.samples, index)
        if self.transform.prepare is not None:
            image = self.transform.prepare(image)
        if self._kept is not None:
            self._kept[index] = image
        return image


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
    """

    def __init__(
        self, dataset: ImageDataset, batch_sampler: EpochBatchSampler, num_workers: int, *, pin_memory: bool = False
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # otherwise each start takes a number from the caller's generator
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches: images, uint8 [B, 3, S, S], and labels, int64 [B].

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


def read_image(samples: Samples, index: int) -> Tensor:
    """Return image `index` as a uint8 tensor [3, H, W].

    Raises:
        UserError: If its file cannot be read. One line that names the file.
    """
    images = samples.images
    if not isinstance(images, tuple):
        return torch.from_numpy(images[index]).permute(2, 0, 1)
    path: Path = images[index]
    try:
        with Image.open(path) as image:
            pixels: Tensor = v2.functional.pil_to_tensor(image.convert("RGB"))
    # PIL's readers raise SyntaxError, ValueError, EOFError, struct.error and more, besides OSError, on a damaged file
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace or remove the file") from error
    return pixels


def _collate(batch: list[tuple[Tensor, int]] | UserError) -> Any:
    return batch if isinstance(batch, UserError) else default_collate(batch)
