"""Features of all images of a split, in their order, with Lightning's loop."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn

from recast_exp.data.datamodule import ImageDataModule
from recast_exp.data.loader import ImageLoader
from recast_exp.heads import Features
from recast_exp.models.features import tapped
from recast_exp.training.recipe import Recipe
from recast_exp.training.trainer import trainer_for


class _FeatureModule(L.LightningModule):
    """Computes features batch by batch."""

    def __init__(self, network: nn.Module, data: ImageDataModule) -> None:
        super().__init__()
        self.network = network
        self._data = data
        self.values: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Normalise the images."""
        return self._data.on_after_batch_transfer(batch, dataloader_idx)

    # Not predict_step: for it, Lightning would make the loader anew, with a batch sampler of its own
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Keep the features, float32 [B, D], and the labels, int64 [B], on the CPU."""
        with tapped(self.network) as tap:
            self.network(batch[0])
            self.values.append(tap.take().float().cpu())
        self.labels.append(batch[1].cpu())


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
    module = _FeatureModule(network, data)
    for loader in _loaders(data, split, views):
        with trainer_for(recipe, [], (), None, "features", alone=True) as trainer:
            trainer.test(module, dataloaders=loader, verbose=False)
    return Features(torch.cat(module.values), torch.cat(module.labels), len(data.image_set.classes))


def _loaders(data: ImageDataModule, split: str, views: int) -> Iterator[ImageLoader]:
    yield data.plain_dataloader(split)
    for view in range(views if split == "train" else 0):
        yield data.views_dataloader(view)
