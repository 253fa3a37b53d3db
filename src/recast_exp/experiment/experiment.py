"""One experiment's parts, built in order: images, backbone, template banks, adapted model, loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast_exp import heads
from recast_exp.adapters import Adapter, from_config
from recast_exp.config import keys
from recast_exp.config.rules import trains_only_head
from recast_exp.config.schema import Config
from recast_exp.data import load_dataset
from recast_exp.data.datamodule import PLAIN, ImageDataModule, requests
from recast_exp.data.protocol import prepared_as
from recast_exp.data.store import Store, open_stores
from recast_exp.data.types import ImageSet
from recast_exp.experiment.pretrain import EVAL_BATCH_SIZE, pretrained_weights
from recast_exp.files import cache_folder
from recast_exp.heads import Head
from recast_exp.models.adapted import AdaptedModel, assemble
from recast_exp.models.backbones import Backbone, create_backbone, is_embedded
from recast_exp.models.bank_cache import Material, bank_for
from recast_exp.models.create import backbone_name
from recast_exp.models.task_file import input_record, make_record
from recast_exp.recast import Banks
from recast_exp.recast.solvers import needs_images
from recast_exp.tasks.differences import differences_of
from recast_exp.training import objectives
from recast_exp.training.objectives import Objective
from recast_exp.training.objectives.joint import Joint
from recast_exp.training.recipe import Recipe


@dataclass
class Experiment:
    """Everything that a stage works with.

    Attributes:
        settings: The settings of the run.
        adapter: The second method on the backbone, or `NoAdapter()`.
        cache: Folder for banks, probes and embedded backbones.
        images: Classes and splits.
        backbone: The pretrained backbone; its network is changed in place by `adapt`.
        _stores: The resized images, once they are open.
        _kept: Whether those are kept as `dataset.cache` says.
    """

    settings: Config
    adapter: Adapter
    cache: Path
    images: ImageSet
    backbone: Backbone
    _stores: dict[str, Store] = field(default_factory=dict)
    _kept: bool = False

    @classmethod
    def open(cls, settings: Config) -> Experiment:
        """Open the images (first: it is cheap and fails early) and create the backbone.

        Raises:
            UserError: If an option of the adapter, the images or a file of weights is wrong.
            MissingInputError: If images or weights are not there.
        """
        cache, model = cache_folder(settings.cache_dir), settings.model
        adapter = from_config(settings.adapter)
        images = load_dataset(settings.dataset, settings.data_dir)
        embedded = pretrained_weights(backbone_name(model), cache) if is_embedded(model) else None
        backbone = create_backbone(model, embedded)
        backbone.input = prepared_as(backbone.input, settings.dataset)
        return cls(settings, adapter, cache, images, backbone)

    @property
    def recipe(self) -> Recipe:
        """How the model is trained."""
        settings = self.settings
        return Recipe(
            settings.optimizer, settings.scheduler, settings.trainer, settings.seed, settings.select, self.objective
        )

    @property
    def objective(self) -> Objective:
        """What a training step minimises. Where only a head trains, there is nothing to train through it."""
        return Joint() if trains_only_head(self.settings) else objectives.from_config(self.settings.training)

    @property
    def head(self) -> Head:
        """The head: trained with the rest, or solved."""
        return heads.from_config(self.settings.head)

    @property
    def eval_batch_size(self) -> int:
        """Images per evaluation batch. Another number changes the last bits of a result.

        As set; else 256, fewer of images larger than 224 × 224, and no more than twice those of a training step, which
        takes more memory than that.
        """
        if (size := self.settings.dataset.eval_batch_size) is not None:
            return size
        fitting = int(EVAL_BATCH_SIZE * min(1.0, (224 / self.backbone.input.size) ** 2))
        return max(1, min(fitting, 2 * self.settings.dataset.batch_size))

    @property
    def needs_features(self) -> bool:
        """Whether training or its end takes features of the training images, unaltered."""
        return self.head.solved or self.objective.needs_features or self.adapter.needs_images

    def data(self, *, keep: bool = False, plain: bool = False) -> ImageDataModule:
        """Loaders of the images, as the backbone wants them.

        Args:
            plain: Whether the training images are needed as evaluation sees them, too.
            keep: Whether to keep resized images as `dataset.cache` says. Otherwise those that are kept already are
                used, and others are decoded when they are read: right for whoever reads each image once.
        """
        dataset = self.settings.dataset
        if not self._stores or (keep and not self._kept) or (plain and PLAIN not in self._stores):
            wanted = requests(
                self.images,
                self.backbone.input,
                dataset.transform,
                build=keep,
                plain=plain,
                max_pixels=dataset.max_pixels,
            )
            self._stores = open_stores(wanted, dataset.cache, self.cache, self.images.name)
            self._kept = keep
        return ImageDataModule(
            self.images,
            self.backbone.input,
            transform=dataset.transform,
            batch_size=dataset.batch_size,
            eval_batch_size=self.eval_batch_size,
            seed=self.settings.seed,
            stores=self._stores,
            num_workers=dataset.num_workers,
            prefetch_factor=dataset.prefetch_factor,
            pin_memory=dataset.pin_memory,
            views=dataset.views,
            episodes=self.objective.episodes(),
        )

    def banks(self) -> tuple[Banks | None, Path | None]:
        """Template banks and their file, for models that have any."""
        settings = self.settings
        if settings.model.method != "recast":
            return None, None
        recast, mimicry = settings.recast, settings.mimicry
        return bank_for(self.backbone, recast, mimicry, self.cache, settings.bank, self._material())

    def _material(self) -> Material:
        recast, mimicry = self.settings.recast, self.settings.mimicry
        if recast.templates == "tasks":
            return Material(differences=differences_of(self.backbone.network, recast.tasks, self.cache))
        if recast.templates == "layers" and needs_images(mimicry.name) and not self.settings.bank:
            return Material(images=self.plain_images("train", mimicry.images))
        return Material()

    def plain_images(self, split: str, count: int) -> Tensor:
        """The first images of a split as evaluation sees them, normalised: [count, 3, S, S] or fewer."""
        data = self.data(plain=split == "train")
        found: list[Tensor] = []
        for batch in data.plain_dataloader(split):
            found.append(data.on_after_batch_transfer((batch[0], batch[1]), 0)[0].float())
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    def adapt(self, banks: Banks | None) -> AdaptedModel:
        """Put a new head, the templates and the adapter into the backbone, in place."""
        settings, classes = self.settings, len(self.images.classes)
        adapted = assemble(self.backbone.network, settings.model, self.adapter, banks, classes, settings.seed)
        adapted.backbone = self.backbone.fingerprint
        return adapted

    def record(self, adapted: AdaptedModel, measured: Mapping[str, Any]) -> dict[str, object]:
        """What a task file of this experiment says of itself.

        Args:
            adapted: The model.
            measured: What was measured of it; the accuracies are recorded, with four digits.
        """
        settings = dataclasses.replace(self.settings, adapter=self.settings.adapter | adapted.adapter.found())
        return make_record(
            adapted,
            keys.recorded(settings),
            backbone={"name": self.backbone.name, "fingerprint": self.backbone.fingerprint},
            classes=list(self.images.classes),
            test_images=self.images.splits["test"].digest(),
            input=input_record(self.backbone.input),
            eval_batch_size=self.eval_batch_size,
            metrics={name: round(measured[name], 4) for name in ("val/accuracy", "test/accuracy") if name in measured},
        )
