"""`stage=evaluate`: put a task file onto its backbone and repeat the test."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recast_exp.config.schema import typed
from recast_exp.display import console
from recast_exp.errors import UserError
from recast_exp.experiment.card import write_card, write_predictions
from recast_exp.experiment.experiment import Experiment, with_values
from recast_exp.files import write_json
from recast_exp.models.bank_cache import bank_by_hash
from recast_exp.models.task_file import apply_task, count, load_task
from recast_exp.stages.adapt import versions
from recast_exp.tracking.start import report_results, say_how_to_sync, tracked
from recast_exp.training.loop import device_name, peak_memory_mb, test

log = logging.getLogger(__name__)


def run(cfg: DictConfig, run_dir: Path, group: str | None = None) -> dict[str, Any]:
    """Evaluate a task file; the configuration already holds what the file says of itself.

    Raises:
        UserError: If backbone, bank or classes are not those that the task was trained with.
    """
    path = Path(cfg.task).expanduser()
    tensors, record = load_task(path)
    if cfg.dataset.eval_batch_size is None:  # repeats the test to the bit
        cfg = with_values(cfg, dataset__eval_batch_size=record["eval_batch_size"])
    experiment = Experiment.open(cfg)
    backbone = experiment.backbone
    if backbone.fingerprint != record["backbone"]["fingerprint"]:
        raise UserError(
            f"task: {path} was trained on {record['backbone']['name']} with the weights "
            f"{record['backbone']['fingerprint'][:16]}…, but this backbone has {backbone.fingerprint[:16]}…; pass the "
            "same file as model.weights"
        )
    if list(experiment.images.classes) != record["classes"]:
        raise UserError(
            f"task: {path} has {len(record['classes'])} classes ({', '.join(record['classes'][:3])}, …), but "
            f"dataset={cfg.dataset.name} has {len(experiment.images.classes)} "
            f"({', '.join(experiment.images.classes[:3])}, …)"
        )
    if record.get("test_images") not in (None, experiment.images.splits["test"].digest()):
        log.warning(
            "task: these are not the images that %s was tested with; some that it was trained with may be among them",
            path,
        )
    banks = bank_by_hash(record["bank"], cfg, experiment.cache) if record["bank"] else None
    adapted = experiment.adapt(banks)
    apply_task(adapted, tensors)
    with tracked(typed(cfg), run_dir, group) as trackers:
        data = experiment.data()
        tested = test(cfg, adapted, data, trackers)
        metrics = {**tested.metrics, "peak_memory_mb": peak_memory_mb(), "device": device_name(cfg), **versions()}
        parameters = count(adapted, path.stat().st_size)
        write_json(run_dir / "parameters.json", parameters)
        write_card(run_dir, data)
        write_predictions(run_dir, data, tested.predictions)
        write_json(run_dir / "metrics.json", metrics)
        report_results(trackers, run_dir)
    console.show_evaluation(typed(cfg), path, metrics, parameters)
    say_how_to_sync(run_dir)
    return metrics
