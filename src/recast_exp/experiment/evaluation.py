"""The procedure of `stage=evaluate`: put a task file onto its backbone and repeat the test."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from recast_exp.config.schema import Config
from recast_exp.data.types import ImageSet
from recast_exp.display import console
from recast_exp.errors import UserError
from recast_exp.experiment.adaptation import versions
from recast_exp.experiment.card import write_card, write_predictions
from recast_exp.experiment.experiment import Experiment
from recast_exp.files import write_json
from recast_exp.models.count import count
from recast_exp.models.label import run_title
from recast_exp.models.loading import Task, load_task, restore
from recast_exp.runs import layout
from recast_exp.runs.results import Metrics
from recast_exp.system import is_main_process
from recast_exp.tracking.start import report_results, say_how_to_sync, tracked
from recast_exp.training.environment import device_name, own_rank
from recast_exp.training.loop import memory, test

log = logging.getLogger(__name__)


def run(settings: Config, run_dir: Path, group: str | None = None) -> Metrics:
    """Evaluate a task file; the settings already hold what the file says of itself.

    Raises:
        UserError: If backbone, bank or classes are not those that the task was trained with.
    """
    if settings.task is None:
        raise UserError("task: expected a task file (task=outputs/…/task.safetensors), got nothing")
    task = load_task(settings.task)
    if settings.dataset.eval_batch_size is None:  # repeats the test bit for bit
        dataset = dataclasses.replace(settings.dataset, eval_batch_size=task.record["eval_batch_size"])
        settings = dataclasses.replace(settings, dataset=dataset)
    experiment = Experiment.open(settings)
    experiment.images = _with_classes_of(task, experiment)
    adapted = restore(experiment.backbone.network, task, banks=settings.bank, cache=experiment.cache)
    trainer, is_main = settings.trainer, is_main_process(settings.trainer.devices)
    with own_rank(trainer.devices), tracked(settings, run_dir, group) as trackers:
        data = experiment.data()
        tested = test(experiment.recipe, adapted, data, trackers)
        metrics: Metrics = {
            **tested.metrics,
            **memory(),
            "device": device_name(trainer),
            **versions(),
        }
        parameters = count(adapted, task.path.stat().st_size)
        if is_main:
            write_json(run_dir / layout.PARAMETERS, parameters)
            write_card(run_dir, data)
            write_predictions(run_dir, data, tested.predictions)
            write_json(run_dir / layout.METRICS, metrics)
            report_results(trackers, run_dir)
    if is_main:
        console.show_evaluation(
            run_title(settings.model, settings.adapter, settings.dataset.name, settings.seed),
            task.path,
            metrics,
            parameters,
            {split: len(samples) for split, samples in experiment.images.splits.items()},
        )
        say_how_to_sync(run_dir)
    return metrics


def _with_classes_of(task: Task, experiment: Experiment) -> ImageSet:
    """The images, their labels in the order of a task's classes; warns of other test images than the task's.

    Raises:
        UserError: If they have classes that the task does not have.
    """
    images = experiment.images
    known = {name: number for number, name in enumerate(task.classes)}
    if unknown := [name for name in images.classes if name not in known]:
        raise UserError(
            f"task: expected images of the classes of {task.path} ({len(known)}: {', '.join(task.classes[:3])}, …), "
            f"got {len(unknown)} others in dataset={images.name}: {', '.join(unknown[:3])}"
        )
    if task.record.get("test_images") not in (None, images.splits["test"].digest()):
        log.warning(
            "task: these are not the images that %s was tested with; some that it was trained with may be among them",
            task.path,
        )
    return images if images.classes == task.classes else images.relabelled(task.classes)
