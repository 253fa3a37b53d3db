"""Train from activations that are computed once, where the first blocks of a model are frozen.

Without altered images, or with a fixed number of altered views of each (`dataset.views`), the same goes into the first
block that trains in every epoch. A step then runs only from there on.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recast_exp.data.datamodule import PLAIN, ImageDataModule
from recast_exp.data.loader import ImageLoader
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.resume import Resumable, find
from recast_exp.training.features import collect
from recast_exp.training.recipe import Recipe

log = logging.getLogger(__name__)


@contextlib.contextmanager
def kept(recipe: Recipe, adapted: AdaptedModel, data: ImageDataModule) -> Iterator[Resumable | None]:
    """Let a data module load activations in place of images, within the block, if that can be done.

    The results are those of training from images: bit for bit where an image's activations do not depend on the batch
    that it is in (ViTs, on CPUs whose matrix products treat rows alike), else to within rounding.

    Args:
        recipe: The settings of training.
        adapted: The model, whose parameters that train have `requires_grad`.
        data: The images.

    Yields:
        The model that starts at its first block that trains; None if there is nothing to gain, images are altered anew
        in each epoch, running statistics train, or the activations would take more than `trainer.activations_mb`.
    """
    found = _start(recipe, adapted, data)
    if found is None:
        yield None
        return
    views = range(data.distinct_views or 1)
    activations = {
        "train": torch.stack([_captured(recipe, found, data, data.views_dataloader(view)) for view in views]),
        "val": _captured(recipe, found, data, data.plain_dataloader("val"))[None],
    }
    if PLAIN in data.datasets:
        activations[PLAIN] = _captured(recipe, found, data, data.plain_dataloader("train"))[None]
    with data.replaced(activations):
        yield found


def _start(recipe: Recipe, adapted: AdaptedModel, data: ImageDataModule) -> Resumable | None:
    options = recipe.trainer
    views = data.distinct_views
    if not options.activations_mb or options.devices > 1 or options.compile or adapted.updates_trunk or views is None:
        return None
    found = find(adapted.network, data.spec.size)
    if found is None:
        return None
    one = found.before(torch.zeros(1, 3, data.spec.size, data.spec.size))
    images = views * len(data.datasets["train"]) + len(data.datasets["val"])
    images += len(data.datasets[PLAIN]) if PLAIN in data.datasets else 0
    size = images * one.numel() * one.element_size() / 1e6
    if size > options.activations_mb:
        log.info(
            "trainer.activations_mb: expected %d to keep the inputs of %s, got %d; they are computed in every step",
            *(math.ceil(size), found.block, options.activations_mb),
        )
        return None
    log.debug("Training starts at %s, from activations of %.1f MB", found.block, size)
    return found


def _captured(recipe: Recipe, found: Resumable, data: ImageDataModule, loader: ImageLoader) -> Tensor:
    return collect(recipe, found.network, found.before, data, loader, "activations")[0]
