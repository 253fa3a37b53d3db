"""The linear probe that every result is compared with: with the same backbone, images, recipe and seed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
from pathlib import Path

from recast_exp import __version__
from recast_exp.adapters import NoAdapter
from recast_exp.config import keys
from recast_exp.data.types import SPLITS, ImageSet
from recast_exp.experiment.experiment import Experiment
from recast_exp.files import alone_at, json_hash, write_json
from recast_exp.models.adapted import assemble
from recast_exp.system import is_main_process
from recast_exp.training.loop import fit, test

log = logging.getLogger(__name__)


def probe(experiment: Experiment) -> dict[str, float]:
    """Metrics of the linear probe, trained once per backbone, data, settings and seed, and cached.

    The experiment's backbone must be as it was created; it is copied, not changed.

    Returns:
        `val/…` and `test/…` as for any run, without the per-class ones.
    """
    path = experiment.cache / "probes" / f"{_key(experiment)}.json"
    # The ranks of one run train it together: the first one has the lock, and starts the others while it has it.
    with alone_at(path) if is_main_process(experiment.settings.trainer.devices) else contextlib.nullcontext():
        metrics = _read(path)
        if metrics is None:
            metrics = _train(experiment)
            write_json(path, metrics)
    return metrics


def _read(path: Path) -> dict[str, float] | None:
    if path.is_file():
        try:
            metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
            return metrics
        except json.JSONDecodeError:
            log.warning("The cached linear probe %s is damaged; it is trained again", path)
    return None


def _train(experiment: Experiment) -> dict[str, float]:
    network = copy.deepcopy(experiment.backbone.network)
    model = dataclasses.replace(experiment.settings.model, method="frozen", batchnorm_statistics="frozen")
    adapted = assemble(network, model, NoAdapter(), None, len(experiment.images.classes), experiment.settings.seed)
    data = experiment.data(keep=True)
    metrics = fit(experiment.recipe, adapted, data, description="linear probe").metrics
    metrics |= test(experiment.recipe, adapted, data).metrics
    return {name: value for name, value in metrics.items() if "/" in name and "per_class" not in name}


def _key(experiment: Experiment) -> str:
    """All that the probe's result depends on."""
    settings = experiment.settings
    optimizer, trainer = dataclasses.asdict(settings.optimizer), dataclasses.asdict(settings.trainer)
    dataset = dataclasses.asdict(settings.dataset)
    without = ("coef", "adapter", "backbone")  # what only other kinds of parameters have
    return json_hash(
        {
            "version": __version__,
            "fingerprint": experiment.backbone.fingerprint,
            "input": str(experiment.backbone.input),
            "images": images_digest(experiment.images),
            "seed": settings.seed,
            "select": settings.select,
            "optimizer": {name: value for name, value in optimizer.items() if not name.startswith(without)},
            "trainer": {name: value for name, value in trainer.items() if name != "head_first_epochs"},
            "dataset": {name: value for name, value in dataset.items() if keys.decides(f"dataset.{name}")},
            "scheduler": dataclasses.asdict(settings.scheduler),
        },
        32,
    )


def images_digest(images: ImageSet) -> str:
    """Hash of the classes and of the images of all splits."""
    return json_hash([images.classes, *(images.splits[split].digest() for split in SPLITS)], 64)
