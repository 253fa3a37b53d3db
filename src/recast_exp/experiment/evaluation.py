"""The procedure of `stage=evaluate`: put a task file onto its backbone and repeat the test."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from recast_exp.config.schema import Config
from recast_exp.display import console
from recast_exp.errors import UserError
from recast_exp.experiment.adaptation import versions
from recast_exp.experiment.card import write_card, write_predictions
from recast_exp.experiment.experiment import Experiment
from recast_exp.files import write_json
from recast_exp.models.bank_cache import bank_by_hash
from recast_exp.models.count import count
from recast_exp.models.label import run_title
from recast_exp.models.task_file import copy_into, read_task
from recast_exp.runs import layout
from recast_exp.runs.results import Metrics
from recast_exp.runs.task_header import TaskRecord
from recast_exp.system import is_main_process
from recast_exp.tracking.start import report_results, say_how_to_sync, tracked
from recast_exp.training.environment import device_name, own_rank
from recast_exp.training.loop import peak_memory_mb, test

log = logging.getLogger(__name__)


def run(settings: Config, run_dir: Path, group: str | None = None) -> Metrics:
    """Evaluate a task file; the settings already hold what the file says of itself.

    Raises:
        UserError: If backbone, bank or classes are not those that the task was trained with.
    """
    if settings.task is None:
        raise UserError("task: expected a task file (task=outputs/…/task.safetensors), got nothing")
    path = Path(settings.task).expanduser()
    tensors, record = read_task(path)
    if settings.dataset.eval_batch_size is None:  # repeats the test bit for bit
        dataset = dataclasses.replace(settings.dataset, eval_batch_size=int(record["eval_batch_size"]))
        settings = dataclasses.replace(settings, dataset=dataset)
    experiment = Experiment.open(settings)
    _check_same(path, record, experiment)
    given, cache = settings.bank, experiment.cache
    adapted = experiment.adapt(bank_by_hash(record["bank"], cache, given) if record["bank"] else None)
    copy_into(adapted, tensors)
    trainer, is_main = settings.trainer, is_main_process(settings.trainer.devices)
    with own_rank(trainer.devices), tracked(settings, run_dir, group) as trackers:
        data = experiment.data()
        tested = test(experiment.recipe, adapted, data, trackers)
        metrics: Metrics = {
            **tested.metrics,
            "peak_memory_mb": peak_memory_mb(),
            "device": device_name(trainer),
            **versions(),
        }
        parameters = count(adapted, path.stat().st_size)
        if is_main:
            write_json(run_dir / layout.PARAMETERS, parameters)
            write_card(run_dir, data)
            write_predictions(run_dir, data, tested.predictions)
            write_json(run_dir / layout.METRICS, metrics)
            report_results(trackers, run_dir)
    if is_main:
        console.show_evaluation(
            run_title(settings.model, settings.adapter, settings.dataset.name, settings.seed), path, metrics, parameters
        )
        say_how_to_sync(run_dir)
    return metrics


def _check_same(path: Path, record: TaskRecord, experiment: Experiment) -> None:
    """Refuse other weights and classes than those of a task file; warn of other test images."""
    fingerprint, classes = experiment.backbone.fingerprint, list(experiment.images.classes)
    if fingerprint != record["backbone"]["fingerprint"]:
        raise UserError(
            f"task: {path} was trained on {record['backbone']['name']} with the weights "
            f"{record['backbone']['fingerprint'][:16]}…, but this backbone has {fingerprint[:16]}…; pass the same file "
            "as model.weights"
        )
    if classes != record["classes"]:
        raise UserError(
            f"task: {path} has {len(record['classes'])} classes ({', '.join(record['classes'][:3])}, …), but "
            f"dataset={experiment.settings.dataset.name} has {len(classes)} ({', '.join(classes[:3])}, …)"
        )
    if record.get("test_images") not in (None, experiment.images.splits["test"].digest()):
        log.warning(
            "task: these are not the images that %s was tested with; some that it was trained with may be among them",
            path,
        )
