"""Pretraining of the embedded backbones, here, on digits 0-4, the first time that one is used."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from recast_exp.config.schema import DatasetConfig, OptimizerConfig, SchedulerConfig, TrainerConfig
from recast_exp.data import load_dataset
from recast_exp.data.datamodule import ImageDataModule
from recast_exp.data.preprocessing import InputSpec
from recast_exp.files import alone_at, json_hash, replacing
from recast_exp.models.adapted import assemble_full
from recast_exp.models.digits import PRETRAINED_CFG, RECIPES, SIZE, Pretraining, digits_resnet, digits_vit
from recast_exp.models.timm_model import timm_model
from recast_exp.models.weights import content_hash
from recast_exp.torch_state import seeded
from recast_exp.training.loop import fit
from recast_exp.training.recipe import Recipe
from recast_exp.training.trainer import quiet

log = logging.getLogger(__name__)

EVAL_BATCH_SIZE = 256

_CHECKSUM = "checksum"
"""Where the metadata of a file holds `content_hash` of its tensors."""


def pretrained_weights(name: str, cache: Path) -> Path:
    """The file with an embedded backbone's weights; trained first, with a progress bar, where the cache lacks it.

    Args:
        name: One of `models.digits.EMBEDDED`.
        cache: The folder of the cache.
    """
    recipe = RECIPES[name]
    path = cache / "backbones" / f"{name}-{json_hash(recipe)}.safetensors"
    if _is_whole(path):
        return path
    with alone_at(path):
        if not _is_whole(path):
            log.info("Pretraining %s on digits 0-4, once (kept in %s)", name, path.parent)
            network = _pretrain(name, recipe)
            weights = {key: value.contiguous() for key, value in network.state_dict().items()}
            with replacing(path) as temporary:
                save_file(weights, temporary, {_CHECKSUM: content_hash(weights)})
    return path


def _is_whole(path: Path) -> bool:
    """Whether a file of weights is as it was written; one that is damaged is made again."""
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(_CHECKSUM)  # earlier files have none
            return bool(file.keys()) and written in (None, content_hash(load_file(path)))
    except (OSError, SafetensorError):
        return False


def _pretrain(name: str, options: Pretraining) -> nn.Module:
    """Train all weights on the source digits with the project's own training loop."""
    dataset = DatasetConfig(name="digits", part="source", transform="shift", batch_size=options["batch_size"])
    recipe = Recipe(
        OptimizerConfig(lr=options["lr"], weight_decay=0.05, backbone_lr=options["lr"]),
        SchedulerConfig(name="cosine", warmup_epochs=3),
        TrainerConfig(accelerator="cpu", num_threads=1, max_epochs=options["epochs"]),
        seed=options["seed"],
    )
    images = load_dataset(dataset, "data")
    with seeded(recipe.seed):
        network: nn.Module = digits_vit(num_classes=0) if name == "digits_vit" else digits_resnet(num_classes=0)
        adapted = assemble_full(network, num_classes=len(images.classes), update_batchnorm=True)
    spec = InputSpec(SIZE, PRETRAINED_CFG["mean"], PRETRAINED_CFG["std"], 1.0, "bilinear")  # type: ignore[arg-type]
    data = ImageDataModule(
        images,
        spec,
        transform=dataset.transform,
        batch_size=dataset.batch_size,
        eval_batch_size=EVAL_BATCH_SIZE,
        seed=recipe.seed,
    )
    with quiet():
        result = fit(recipe, adapted, data, description=f"pretraining {name}")
    log.info("%s: validation accuracy %.1f %% on its own digits", name, 100 * result.metrics["val/accuracy"])
    timm_model(network).reset_classifier(0)
    network.eval()
    return network
