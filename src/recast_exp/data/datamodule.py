"""The LightningDataModule: batches of uint8 images, altered and normalised on the device."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import lightning
import torch
from torch import Tensor

from recast_exp.config.schema import MAX_PIXELS
from recast_exp.data.episodes import Episodes, EpisodeSampler
from recast_exp.data.loader import ActivationDataset, Batch, EpochBatchSampler, EpochSampler, ImageDataset, ImageLoader
from recast_exp.data.pixels import normalize
from recast_exp.data.preprocessing import InputSpec
from recast_exp.data.store import PixelStore, Request, Store, open_stores
from recast_exp.data.transforms import Augmentation, augmentation
from recast_exp.data.types import SPLITS, ImageSet
from recast_exp.system import shared_memory, usable_cores

log = logging.getLogger(__name__)

PLAIN = "plain"  # the training images as evaluation sees them

_DECODING_WORKERS = {"cpu": 4, "cuda": 16}
_READING_WORKERS = {"cpu": 0, "cuda": 4}
_MOST_PER_CORE = 16  # loader processes, whoever asks for more: starting them would take minutes, and all the memory


class ImageDataModule(lightning.LightningDataModule):
    """Loads the splits of an `ImageSet` as a backbone expects them.

    A batch is (images, labels): float32 [B, 3, S, S], normalised, and int64 [B]. It leaves the loader as uint8 and is
    normalised by `on_after_batch_transfer`, which on a CUDA device also does the altering part of the augmentation.
    Order and augmentation follow from (seed, epoch, index) alone. The trainer needs `use_distributed_sampler=False`:
    each rank takes its share of each batch by itself (`EpochBatchSampler.share`).

    Args:
        image_set: Classes and splits.
        spec: The input that the backbone expects.
        transform: Name of the training augmentation.
        batch_size: Images per optimisation step, over all devices. The last batch of an epoch may be smaller, or, to
            avoid a batch of a single image, larger by one.
        eval_batch_size: Images per evaluation batch, on each device.
        seed: Seed of order and augmentation.
        stores: The resized images of each split, and of the plain training images where they are needed, which
            `open_stores` makes from `requests`; None decodes files each time.
        num_workers: Loader processes of each device; None chooses by the device, and by whether files are decoded.
        prefetch_factor: Batches that each of them prepares ahead; None chooses by the device.
        pin_memory: Whether batches are page-locked; None does so for CUDA.
        views: Number of epochs after which the alterations of the training images repeat; None for never.
        episodes: Training steps that take the same number of images of some classes; None takes batches of all.
    """

    def __init__(
        self,
        image_set: ImageSet,
        spec: InputSpec,
        transform: str,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        *,
        stores: Mapping[str, Store] | None = None,
        num_workers: int | None = None,
        prefetch_factor: int | None = None,
        pin_memory: bool | None = None,
        views: int | None = None,
        episodes: Episodes | None = None,
    ) -> None:
        super().__init__()
        self.image_set = image_set
        self.spec = spec
        self.transform = transform
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.pin_memory = pin_memory
        self.episodes = episodes
        self._said = False
        if stores is None:
            stores = open_stores(
                requests(image_set, spec, transform, build=False, plain=True), "off", Path(), image_set.name
            )
        self.views = views
        self.activations: dict[str, ActivationDataset] = {}
        self.datasets = {
            name: ImageDataset(stores[name], image_set.splits[split].labels, augment, seed, views=views)
            for name, (split, augment) in _augmentations(spec, transform).items()
            if name in stores
        }
        self._mean, self._std = spec.constants()

    @property
    def distinct_views(self) -> int | None:
        """How many different pictures training makes of an image; None where each epoch makes another."""
        return self.views if self.datasets["train"].augmentation.draws else 1

    @contextlib.contextmanager
    def replaced(self, activations: Mapping[str, Tensor]) -> Iterator[None]:
        """Load activations in place of images, within the block.

        Args:
            activations: "train" [V, N, ...], `PLAIN` and "val" [1, N, ...], on the CPU.
        """
        self.activations = {
            name: ActivationDataset(each, self.datasets[name].labels) for name, each in activations.items()
        }
        try:
            yield
        finally:
            self.activations = {}

    def train_dataloader(self) -> ImageLoader:
        """This rank's share of the training images, in the order of the trainer's epoch."""
        dataset = self.datasets["train"]
        # On MPS too: it lacks some operations of the augmentations, such as grid_sample with borders before torch 2.13
        dataset.alter = self._device() != "cuda"
        sampler = EpochSampler(len(dataset), self.seed)
        if self.episodes:
            return self._loader("train", EpisodeSampler(sampler, dataset.labels, self.episodes, self.seed))
        batches = EpochBatchSampler(sampler, self.batch_size, *self._place(), allow_single=False)
        return self._loader("train", batches)

    def plain_dataloader(self, split: str) -> ImageLoader:
        """All images of a split in their order, as evaluation sees them, whatever the rank of this process."""
        name = PLAIN if split == "train" else split
        dataset = self.datasets[name]
        batches = EpochBatchSampler(EpochSampler(len(dataset), None), self.eval_batch_size, allow_single=True)
        return self._loader(name, batches)

    def views_dataloader(self, view: int) -> ImageLoader:
        """All training images in their order, altered as in an epoch of this number, whatever the rank."""
        dataset = self.datasets["train"]
        dataset.alter = True
        sampler = EpochSampler(len(dataset), None, only=view)
        return self._loader("train", EpochBatchSampler(sampler, self.eval_batch_size, allow_single=True))

    def val_dataloader(self) -> ImageLoader:
        """This rank's share of the validation images; each counts once."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> ImageLoader:
        """This rank's share of the test images; each counts once."""
        return self._eval_dataloader("test")

    def example(self, count: int) -> tuple[Tensor, Tensor]:
        """The first training images of the first epoch: uint8 [count, 3, S, S], not normalised, and labels [count].

        Raises:
            UserError: If an image cannot be read.
        """
        dataset = self.datasets["train"]
        keys = list(EpochSampler(len(dataset), self.seed))[:count]
        images, labels = dataset.batch(keys, alter=True)[:2]
        return images, labels

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Alter the images of a batch, if the loader has not done so, and normalise them, on the device.

        Activations stay as they are.
        """
        images, labels, *amounts = batch
        if amounts:
            images = self.datasets["train"].augmentation(images, *amounts)
        return self.normalize(images), labels

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 pixels [B, 3, S, S] to float32 with the backbone's mean and standard deviation.

        Activations, which are loaded in place of images, stay as they are.
        """
        if self.activations:
            return images
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return normalize(images, self._mean, self._std)

    def _eval_dataloader(self, split: str) -> ImageLoader:
        dataset = self.datasets[split]
        rank, world_size = self._place()
        sampler = EpochSampler(len(dataset), None)
        batches = EpochBatchSampler(sampler, self.eval_batch_size * world_size, rank, world_size, allow_single=True)
        return self._loader(split, batches)

    def _loader(self, name: str, batches: EpochBatchSampler | EpisodeSampler) -> ImageLoader:
        if name in self.activations:
            return ImageLoader(self.activations[name], batches, 0)
        device, dataset = self._device(), self.datasets[name]
        workers = self.num_workers
        if workers is None:
            limits = _READING_WORKERS if isinstance(dataset.store, PixelStore) else _DECODING_WORKERS
            workers = min(limits.get(device, limits["cuda"]), max(1, usable_cores() // self._place()[1]))
        prefetch = self.prefetch_factor or (2 if device == "cpu" else 4)
        return ImageLoader(
            dataset,
            batches,
            self._fitting(workers, prefetch, max(self.batch_size, self.eval_batch_size)),
            pin_memory=device == "cuda" if self.pin_memory is None else self.pin_memory and torch.cuda.is_available(),
            prefetch_factor=prefetch,
        )

    def _fitting(self, workers: int, prefetch: int, batch_size: int) -> int:
        """As many loader processes as the machine takes: with too little shared memory, they would wait for ever."""
        size = batch_size * 3 * self.spec.size**2
        limits = {f"there are {usable_cores()} cores": _MOST_PER_CORE * usable_cores()}
        if (free := shared_memory()) is not None:
            little = (
                f"there are {free / 1e6:.0f} MB of shared memory for batches of {size / 1e6:.0f} MB; give the "
                "container more (docker run --shm-size=1g)"
            )
            limits[little] = free // (size * (prefetch + 1))
        reason = min(limits, key=lambda each: limits[each])
        if limits[reason] >= workers:
            return workers
        if not self._said:
            self._said = True
            log.warning(
                "dataset.num_workers: %d instead of %d loader processes, as %s", limits[reason], workers, reason
            )
        return limits[reason]

    def _device(self) -> str:
        """The type of the device that batches go to; the CPU outside a trainer."""
        return str(self.trainer.strategy.root_device.type) if self.trainer is not None else "cpu"

    def _place(self) -> tuple[int, int]:
        """The rank of this process, and the number of processes; (0, 1) outside a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def requests(
    image_set: ImageSet,
    spec: InputSpec,
    transform: str,
    *,
    build: bool,
    plain: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Request]:
    """The stores that a data module needs, as arguments of `open_stores`.

    Args:
        image_set: Classes and splits.
        spec: The input that the backbone expects.
        transform: Name of the training augmentation.
        build: Whether to decode images that are not in the cache yet.
        plain: Whether the training images are needed as evaluation sees them, too.
        max_pixels: Larger image files are refused.
    """
    return {
        name: Request(image_set.splits[split], augment.geometry.limited(max_pixels), build)
        for name, (split, augment) in _augmentations(spec, transform).items()
        if plain or name != PLAIN
    }


def _augmentations(spec: InputSpec, transform: str) -> dict[str, tuple[str, Augmentation]]:
    """Split and augmentation of each dataset; the training images are there as evaluation sees them, too."""
    found = {split: (split, augmentation(transform if split == "train" else "none", spec)) for split in SPLITS}
    return found | {PLAIN: ("train", augmentation("none", spec))}
