"""Check that what was asked for can be made, and that what it needs can be read, before a folder is made for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from recast_exp import heads
from recast_exp.config.rules import trains_only_head
from recast_exp.config.schema import Config, DatasetConfig, ModelConfig, RecastConfig, SearchConfig
from recast_exp.data import read_official
from recast_exp.data.protocol import choose
from recast_exp.errors import MissingInputError, RecastError, UserError, section
from recast_exp.files import cache_folder, cache_place, user_path
from recast_exp.models.bank_cache import check_kind
from recast_exp.models.check import check_classifier, check_model, check_single_images, check_task
from recast_exp.models.elsewhere import local_folder
from recast_exp.models.loading import check_weights, load_task
from recast_exp.models.weights import create, fingerprint
from recast_exp.recast import Banks
from recast_exp.runs import hub, layout
from recast_exp.runs.task_header import FROZEN, UNGROUPED, task_files
from recast_exp.tracking import start as tracking
from recast_exp.training import objectives
from recast_exp.training.checkpoint import read_checkpoint
from recast_exp.training.environment import check_device


def check_experiment(settings: Config) -> None:
    """Refuse a model that cannot be made, and a head or an objective that does not fit it. No weights are loaded.

    Raises:
        UserError: One line.
        UnfitError: If the adapter does not fit the backbone.
    """
    check_model(settings.model, settings.recast, settings.mimicry, settings.adapter)
    head, objective = heads.from_config(settings.head), objectives.from_config(settings.training)
    name = settings.training["name"]
    if head.solved or (settings.probe and settings.model.method != "frozen"):
        check_classifier(settings.model)
    if trains_only_head(settings):
        return
    if objective.solves_head and not head.solved:
        raise UserError(
            f"head: expected one that is solved with training={name}, such as best, got {head.name}; choose one, or "
            "add training=joint"
        )
    for line in objective.problems(settings):
        raise UserError(line)
    if settings.dataset.batch_size < 2 * settings.trainer.devices and objective.episodes() is None:
        check_single_images(settings.model, settings.dataset.batch_size, settings.trainer.devices)


class Inputs:
    """Reads what the jobs of a command need, each thing once."""

    def __init__(self) -> None:
        self._known: dict[str, RecastError | None] = {}

    def check(self, settings: Config, *, images: bool) -> None:
        """Ask tracker and device, read weights, templates, datasets and searches, and make the cache folder.

        Args:
            settings: The settings of a job.
            images: Whether it needs its dataset.

        Raises:
            UserError: One line that names the key.
            MissingInputError: If a file is not there.
        """
        model, dataset = settings.model, settings.dataset
        self._once(f"{settings.logger}", lambda: tracking.check(settings.logger))
        self._once(f"{settings.trainer}", lambda: check_device(settings.trainer))
        self._once(f"{settings.search}", lambda: _check_trial(settings.search))
        if model.weights or local_folder(model.backbone or ""):
            self._once(f"{model.weights} {model.backbone} {model.img_size}", lambda: create(model))
        if settings.resume and (checkpoint := layout.checkpoint(user_path(settings.resume))).exists():
            read_checkpoint(checkpoint)
        cache = None if settings.bank else cache_place(settings.cache_dir)
        for task in task_files(settings.task or ""):
            self._once(f"task {task} {cache}", partial(check_task, task, cache))
            if model.weights:
                self._once(f"weights of {task} {model}", partial(_check_weights_of, task, model))
        for name in settings.recast.tasks if model.method == "recast" else ():
            self._once(f"task of templates {name}", partial(_check_task_of_templates, name, settings.cache_dir))
        if settings.bank:
            own = None if settings.task else settings.recast  # a task file says which bank it wants
            self._once(f"bank {settings.bank} {own}", lambda: _check_bank(str(settings.bank), own))
        # What is to be loaded is not there yet; to leave damaged images out, all would have to be decoded
        if images and not dataset.download and dataset.bad_images == "error":
            objective = None if trains_only_head(settings) else objectives.from_config(settings.training)
            look = partial(_check_images, dataset, settings.data_dir, objective)
            self._once(f"{dataset} {settings.data_dir} {objective}", look)
        # Last, as this makes a folder
        self._once(f"cache {settings.cache_dir}", lambda: cache_folder(settings.cache_dir))

    def check_choice(self, settings: Config) -> None:
        """See whether images can be chosen from an index, of which some may be missing.

        Raises:
            UserError: One line that names the key.
            MissingInputError: If the index is not there.
        """
        dataset = settings.dataset
        if dataset.download or dataset.bad_images != "error":
            return
        official = read_official(dataset, settings.data_dir)
        with _quiet(), suppress(MissingInputError):
            choose(dataset, official)

    def _once(self, what: str, look: Callable[[], object]) -> None:
        if what not in self._known:
            try:
                look()
                self._known[what] = None
            except RecastError as error:
                self._known[what] = error
        if (known := self._known[what]) is not None:
            raise known


def _check_trial(search: SearchConfig) -> None:
    if search.storage is not None and search.trial is not None:
        from recast_exp.search.study import load_trial  # an extra, which other runs do without

        load_trial(search.storage, search.trial)


def _check_task_of_templates(name: str, cache_dir: str | None) -> None:
    with section("recast.tasks: "):
        check_task(hub.local(name), cache_place(cache_dir))


def _check_images(dataset: DatasetConfig, data_dir: str, objective: objectives.Objective | None) -> None:
    with _quiet():
        images = choose(dataset, read_official(dataset, data_dir))
        if objective is not None:
            objective.check_images(np.bincount(images.splits["train"].labels))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about images, which the job gives, too."""
    logger = logging.getLogger("recast_exp.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_bank(path: str, recast: RecastConfig | None) -> None:
    with section("bank: "):
        banks = Banks.load(path)
    if recast is not None:
        check_kind(banks, path, recast)


def _check_weights_of(path: Path, model: ModelConfig) -> None:
    task = load_task(path)
    if not task.fingerprint.startswith((FROZEN, UNGROUPED)):  # those are known with the templates
        check_weights(task, fingerprint(create(model)))
