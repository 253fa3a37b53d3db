"""The linear probe that every result is compared with: the best solved head on the features of the frozen backbone."""

from __future__ import annotations

import logging
from pathlib import Path

from recast_exp import __version__, schemas
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.features import features_key, frozen_features
from recast_exp.files import alone_at, json_hash, write_json
from recast_exp.heads import choose, describe
from recast_exp.heads.best import Best
from recast_exp.training.metrics import measure

log = logging.getLogger(__name__)

Measured = dict[str, float | str]


def probe(experiment: Experiment) -> Measured:
    """Metrics of the linear probe, solved once for the features of a backbone and the images, and cached.

    The experiment's backbone must be as it was created. All heads with their strengths are compared on the validation
    images; the best one is tested once.

    Returns:
        `val/…` and `test/…` as for any run, without the per-class ones, and `head`: the chosen head in words.
    """
    key = json_hash([__version__, *(features_key(experiment, split) for split in ("train", "val", "test"))], 32)
    path = experiment.cache / "probes" / f"{key}.json"
    if (metrics := _read(path)) is not None:
        return metrics
    with alone_at(path):
        metrics = _read(path)
        if metrics is None:
            metrics = _solve(experiment)
            write_json(path, metrics)
    return metrics


def _read(path: Path) -> Measured | None:
    if path.is_file():
        try:
            return schemas.decode(path, Measured)
        except ValueError:
            log.warning("The cached linear probe %s is damaged; it is solved again", path)
    return None


def _solve(experiment: Experiment) -> Measured:
    features = {split: frozen_features(experiment, split) for split in ("train", "val", "test")}
    chosen = choose(Best(), features["train"], features["val"])
    metrics: Measured = {"head": describe(chosen.solution.setting)}
    for split in ("val", "test"):
        measured = measure(chosen.solution.scores(features[split]), features[split].num_classes)
        metrics |= {f"{split}/{name}": value for name, value in measured.items()}
    return metrics
