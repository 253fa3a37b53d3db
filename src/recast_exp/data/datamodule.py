"""The LightningDataModule: batches of uint8 images, normalised on the device."""

from __future__ import annotations

import os
from typing import Any

import lightning
import torch
from torch import Tensor

from recast_exp.data.base import SPLITS, ImageSet, Samples
from recast_exp.data.loader import EpochBatchSampler, EpochSampler, ImageDataset, ImageLoader
from recast_exp.data.transforms import ImageTransform, InputSpec, eval_transform, train_transform
from recast_exp.errors import UserError

_KEEP_BYTES = 64 * 2**20
_MAX_WORKERS = 4


class ImageDataModule(lightning.LightningDataModule):
    """Loads the splits of an `ImageSet` as a backbone wants them.

    A batch is (images, labels): float32 [B, 3, S, S], normalised, and int64 [B]. It leaves the loader as uint8 and is
    normalised by `on_after_batch_transfer`. Order and augmentation follow from (seed, epoch, index) alone. The
    trainer needs `use_distributed_sampler=False`: each rank takes its share by itself.

    Args:
        image_set: Classes and splits.
        spec: What the backbone wants.
        transform: Name of the training augmentation.
        batch_size: Images per optimisation step, over all devices. The last batch of an epoch may be smaller, or, to
            avoid a batch of a single image, larger by one.
        eval_batch_size: Images per evaluation batch, on each device.
        num_workers: Loader processes; None chooses none for small images in memory, else up to four.
        seed: Seed of order and augmentation.
    """

    def __init__(
        self,
        image_set: ImageSet,
        spec: InputSpec,
        transform: str,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.image_set = image_set
        self.spec = spec
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        # With more devices than images in a split, some have nothing to evaluate
        self.allow_zero_length_dataloader_with_multiple_devices = True
        small = all(_is_small(image_set.splits[split], spec) for split in SPLITS)
        self.num_workers = num_workers if num_workers is not None else _choose_workers(small)

        def dataset(split: str, transform: ImageTransform) -> ImageDataset:
            return ImageDataset(image_set.splits[split], transform, seed, keep=small)

        self.datasets = {
            "train": dataset("train", train_transform(transform, spec)),
            "val": dataset("val", eval_transform(spec)),
            "test": dataset("test", eval_transform(spec)),
        }
        self._mean = torch.tensor(spec.mean).view(-1, 1, 1)
        self._std = torch.tensor(spec.std).view(-1, 1, 1)

    def train_dataloader(self) -> ImageLoader:
        """This rank's share of the training images, in the order of the trainer's epoch.

        Raises:
            UserError: If the batch cannot be divided among the devices.
        """
        rank, world_size = self._place()
        if self.batch_size % world_size:
            raise UserError(f"dataset.batch_size: got {self.batch_size}, takes a multiple of the {world_size} devices")
        dataset = self.datasets["train"]
        sampler = EpochSampler(len(dataset), self.seed, rank, world_size)
        batches = EpochBatchSampler(sampler, self.batch_size // world_size, allow_single=False)
        return self._loader(dataset, batches)

    def val_dataloader(self) -> ImageLoader:
        """This rank's share of the validation images; no image is dropped or comes twice."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> ImageLoader:
        """This rank's share of the test images; no image is dropped or comes twice."""
        return self._eval_dataloader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Normalise the images of a batch, on the device where they are."""
        images, labels = batch
        return self.normalize(images), labels

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 pixels [B, 3, S, S] to float32 with the backbone's mean and deviation."""
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return images.float().div_(255).sub_(self._mean).div_(self._std)

    def _eval_dataloader(self, split: str) -> ImageLoader:
        dataset = self.datasets[split]
        sampler = EpochSampler(len(dataset), None, *self._place())
        batches = EpochBatchSampler(sampler, self.eval_batch_size, allow_single=True)
        return self._loader(dataset, batches)

    def _loader(self, dataset: ImageDataset, batches: EpochBatchSampler) -> ImageLoader:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return ImageLoader(dataset, batches, self.num_workers, pin_memory=on_cuda)

    def _place(self) -> tuple[int, int]:
        """This process's rank, and the number of processes; outside of a trainer there is one."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _is_small(samples: Samples, spec: InputSpec) -> bool:
    """Whether the images are in memory, and prepared for the backbone still take little of it."""
    return not isinstance(samples.images, tuple) and len(samples) * 3 * spec.size**2 <= _KEEP_BYTES


def _choose_workers(small: bool) -> int:
    """Loading small kept images takes less than handing them over from another process."""
    if small:
        return 0
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MAX_WORKERS)
