"""Features of all images of a split, in their order, with Lightning's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn

from recast_exp.data.datamodule import ImageDataModule
from recast_exp.data.loader import ImageLoader
from recast_exp.heads import Features
from recast_exp.models.features import tapped
from recast_exp.training.recipe import Recipe
from recast_exp.training.trainer import trainer_for


class _Collector(L.LightningModule):
    """Computes something of all images, batch by batch, and keeps it on the CPU."""

    def __init__(self, network: nn.Module, compute: Callable[[Tensor], Tensor], data: ImageDataModule) -> None:
        super().__init__()
        self.network = network  # for Lightning: it sets its mode and its device
        self._compute = compute
        self._data = data
        self.values: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Alter and normalise the images."""
        return self._data.on_after_batch_transfer(batch, dataloader_idx)

    # Not predict_step: for it, Lightning would make the loader anew, with a batch sampler of its own
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Keep what is computed, [B, ...], and the labels, int64 [B]."""
        self.values.append(self._compute(batch[0]).cpu())
        self.labels.append(batch[1].cpu())


def collect(
    recipe: Recipe,
    network: nn.Module,
    compute: Callable[[Tensor], Tensor],
    data: ImageDataModule,
    loader: ImageLoader,
    what: str,
) -> tuple[Tensor, Tensor]:
    """Compute something of each image, in evaluation mode and without gradients.

    Args:
        recipe: The device and the precision.
        network: The model. Its mode and device stay as they are.
        compute: Normalised images [B, 3, S, S], on the device of the recipe → [B, ...].
        data: What normalises the images.
        loader: Loads them.
        what: Title of the progress bar.

    Returns:
        [N, ...] and the labels, int64 [N], on the CPU.
    """
    module = _Collector(network, compute, data)
    with trainer_for(recipe, [], (), None, what, alone=True) as trainer:
        trainer.test(module, dataloaders=loader, verbose=False)
    return torch.cat(module.values), torch.cat(module.labels)


def extract(recipe: Recipe, network: nn.Module, data: ImageDataModule, split: str, views: int = 0) -> Features:
    """The features of the images of a split, as evaluation sees them, and of altered views of them.

    Args:
        recipe: The device and the precision.
        network: A timm model with one linear classifier, or without classes. Its mode and device stay as they are.
        data: The images.
        split: "train", "val" or "test".
        views: Number of altered views of each training image, which follow the images themselves.

    Returns:
        Features of N·(1 + views) images.

    Raises:
        UserError: If an image cannot be read, or a feature is not finite.
    """
    with tapped(network) as tap:

        def features(images: Tensor) -> Tensor:
            network(images)
            return tap.take().float()

        parts = [
            collect(recipe, network, features, data, loader, "features") for loader in _loaders(data, split, views)
        ]
    values, labels = zip(*parts, strict=True)
    return Features(torch.cat(values), torch.cat(labels), len(data.image_set.classes))


def _loaders(data: ImageDataModule, split: str, views: int) -> Iterator[ImageLoader]:
    yield data.plain_dataloader(split)
    for view in range(views if split == "train" else 0):
        yield data.views_dataloader(view)
