"""The linear probe that every result is set beside: the same backbone, images, recipe and seed, but only the head."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recast_exp import __version__
from recast_exp.data.types import SPLITS, ImageSet
from recast_exp.experiment.experiment import Experiment, with_values
from recast_exp.files import alone_at, is_main_process, json_hash, write_json
from recast_exp.models.adapted import assemble
from recast_exp.training.loop import fit, test

log = logging.getLogger(__name__)

_WITHOUT_EFFECT = ("path", "download", "cache", "num_workers", "prefetch_factor", "pin_memory", "backbones")
"""Keys of `dataset` that no result depends on, beyond the images themselves."""


def probe(experiment: Experiment) -> dict[str, float]:
    """Metrics of the linear probe, trained once per backbone, data, settings and seed, and cached.

    The experiment's backbone must be as it was created; it is copied, not changed.

    Returns:
        `val/…` and `test/…` as for any run, without the per-class ones.
    """
    cfg = with_values(
        experiment.cfg, model__method="frozen", model__batchnorm_statistics="frozen", adapter={"name": "none"}
    )
    path = experiment.cache / "probes" / f"{_key(experiment, cfg)}.json"
    # The ranks of one run train it together: the first one has the lock, and starts the others while it has it.
    with alone_at(path) if is_main_process() else contextlib.nullcontext():
        metrics = _read(path)
        if metrics is None:
            metrics = _train(experiment, cfg)
            write_json(path, metrics)
    return metrics


def _read(path: Path) -> dict[str, float] | None:
    if path.is_file():
        try:
            metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
            return metrics
        except json.JSONDecodeError:
            log.warning("The cached linear probe %s is damaged; it is trained anew", path)
    return None


def _train(experiment: Experiment, cfg: DictConfig) -> dict[str, float]:
    network = copy.deepcopy(experiment.backbone.network)
    adapted = assemble(network, cfg, None, len(experiment.images.classes))
    data = experiment.data(keep=True)
    metrics = fit(cfg, adapted, data, description="linear probe").metrics
    metrics |= test(cfg, adapted, data).metrics
    return {name: value for name, value in metrics.items() if "/" in name and "per_class" not in name}


def _key(experiment: Experiment, cfg: DictConfig) -> str:
    """All that the probe's result depends on."""
    whole = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(whole, dict)
    optimizer = {
        name: value
        for name, value in whole["optimizer"].items()
        if not name.startswith(("coef", "adapter", "backbone"))
    }
    trainer = {name: value for name, value in whole["trainer"].items() if name != "head_first_epochs"}
    dataset = {name: value for name, value in whole["dataset"].items() if name not in _WITHOUT_EFFECT}
    return json_hash(
        {
            "version": __version__,
            "fingerprint": experiment.backbone.fingerprint,
            "input": str(experiment.backbone.input),
            "images": images_digest(experiment.images),
            "seed": whole["seed"],
            "select": whole["select"],
            "optimizer": optimizer,
            "trainer": trainer,
            "dataset": dataset,
            "scheduler": whole["scheduler"],
        },
        32,
    )


def images_digest(images: ImageSet) -> str:
    """Hash of the classes and of the images of all splits."""
    return json_hash([images.classes, *(images.splits[split].digest() for split in SPLITS)], 64)
