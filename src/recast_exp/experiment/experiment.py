"""One experiment's parts, built in order: images, backbone, template banks, adapted model, loaders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recast_exp.data import load_dataset
from recast_exp.data.datamodule import ImageDataModule, requests
from recast_exp.data.store import Store, open_stores
from recast_exp.data.types import ImageSet
from recast_exp.files import cache_folder
from recast_exp.models.adapted import AdaptedModel, assemble
from recast_exp.models.backbones import Backbone, create_backbone
from recast_exp.models.bank_cache import bank_for
from recast_exp.models.task_file import input_record, make_record
from recast_exp.recast import Banks

EVAL_BATCH_SIZE = 256


@dataclass
class Experiment:
    """Everything that a stage works with.

    Attributes:
        cfg: The whole configuration.
        cache: Folder for banks, probes and embedded backbones.
        images: Classes and splits.
        backbone: The pretrained backbone; its network is changed in place by `adapt`.
        _stores: The resized images, once they are open.
    """

    cfg: DictConfig
    cache: Path
    images: ImageSet
    backbone: Backbone
    _stores: dict[str, Store] = field(default_factory=dict)

    @classmethod
    def open(cls, cfg: DictConfig) -> Experiment:
        """Open the images (first: it is cheap and fails early) and create the backbone."""
        cache = cache_folder(cfg.cache_dir)
        images = load_dataset(cfg.dataset, Path(cfg.data_dir))
        return cls(cfg, cache, images, create_backbone(cfg, cache))

    @property
    def eval_batch_size(self) -> int:
        """Images per evaluation batch. Another number changes the last bits of a result."""
        return int(self.cfg.dataset.eval_batch_size or EVAL_BATCH_SIZE)

    def data(self, *, keep: bool = False) -> ImageDataModule:
        """Loaders of the images, as the backbone wants them.

        Args:
            keep: Whether to keep resized images as `dataset.cache` says. Otherwise those that are kept already are
                used, and others are decoded when they are read: right for whoever reads each image once.
        """
        dataset = self.cfg.dataset
        if not self._stores:
            wanted = requests(self.images, self.backbone.input, dataset.transform, build=keep)
            self._stores = open_stores(wanted, dataset.cache, self.cache, self.images.name)
        return ImageDataModule(
            self.images,
            self.backbone.input,
            transform=dataset.transform,
            batch_size=dataset.batch_size,
            eval_batch_size=self.eval_batch_size,
            seed=self.cfg.seed,
            stores=self._stores,
            num_workers=dataset.num_workers,
            prefetch_factor=dataset.prefetch_factor,
            pin_memory=dataset.pin_memory,
        )

    def banks(self) -> tuple[Banks | None, Path | None]:
        """Template banks and their file, for models that have any."""
        return bank_for(self.backbone, self.cfg, self.cache) if self.cfg.model.method == "recast" else (None, None)

    def adapt(self, banks: Banks | None) -> AdaptedModel:
        """Put a new head, the templates and the adapter into the backbone, in place."""
        adapted = assemble(self.backbone.network, self.cfg, banks, len(self.images.classes))
        adapted.backbone = self.backbone.fingerprint
        return adapted

    def record(self, adapted: AdaptedModel) -> dict[str, Any]:
        """What a task file of this experiment says of itself."""
        return make_record(
            self.cfg,
            adapted,
            backbone={"name": self.backbone.name, "fingerprint": self.backbone.fingerprint},
            classes=list(self.images.classes),
            test_images=self.images.splits["test"].digest(),
            input=input_record(self.backbone.input),
            eval_batch_size=self.eval_batch_size,
        )


def with_values(cfg: DictConfig, **changes: Any) -> DictConfig:
    """A copy of a configuration with other values, by dotted name (dots written as two underscores)."""
    copy = cfg.copy()
    for name, value in changes.items():
        OmegaConf.update(copy, name.replace("__", "."), value, merge=False)
    return copy
