"""The features of a frozen backbone, computed once for each backbone, its preprocessing and a split's images."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recast_exp.data.store import content_hash
from recast_exp.data.types import Samples
from recast_exp.errors import UserError
from recast_exp.experiment.experiment import Experiment
from recast_exp.files import alone_at, json_hash, replacing
from recast_exp.heads import Features
from recast_exp.training.environment import device_name, thread_count
from recast_exp.training.features import extract

log = logging.getLogger(__name__)

FORMAT = 2


def frozen_features(experiment: Experiment, split: str, views: int = 0) -> Features:
    """The features of a split's images: from the cache, or computed and kept there.

    Args:
        experiment: Its backbone must compute what it did when it was created; another classifier makes no difference.
        split: "train", "val" or "test".
        views: Number of altered views of each training image, which follow the images themselves.

    Raises:
        UserError: If an image cannot be read, or a feature is not finite.
    """
    views = views if split == "train" else 0
    path = experiment.cache / "features" / f"{features_key(experiment, split, views)}.safetensors"
    classes = len(experiment.images.classes)
    if (found := _read(path, classes)) is not None:
        return found
    with alone_at(path):
        found = _read(path, classes)
        if found is None:
            # Without the altered views, each image is read once
            data = experiment.data(keep=views > 0, plain=True)
            found = extract(experiment.recipe, experiment.backbone.network, data, split, views)
            with replacing(path) as temporary:
                save_file({"values": found.values.contiguous(), "labels": found.labels}, temporary)
    return found


def features_key(experiment: Experiment, split: str, views: int = 0) -> str:
    """All that the features depend on, down to what changes their last bits."""
    settings, dataset = experiment.settings, experiment.settings.dataset
    return json_hash(
        {
            "format": FORMAT,
            "backbone": experiment.backbone.computation,
            "input": dataclasses.asdict(experiment.backbone.input),
            "images": _images(experiment.images.splits[split], experiment.cache),
            "batch": experiment.eval_batch_size,
            "precision": settings.trainer.precision,
            "device": device_name(settings.trainer),
            "threads": thread_count(settings.trainer),
            "views": [views, dataset.transform, settings.seed] if views else 0,
        },
        32,
    )


def _images(samples: Samples, cache: Path) -> str:
    images = samples.images
    return samples.digest() + (content_hash(images, cache) if isinstance(images, tuple) else "")


def _read(path: Path, num_classes: int) -> Features | None:
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        return Features(tensors["values"], tensors["labels"], num_classes)
    except (SafetensorError, OSError, KeyError, UserError) as error:
        log.warning("The cached features %s are damaged (%s); they are computed again", path, error)
        return None
