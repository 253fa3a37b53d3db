"""A trained task as a model: what stages start from that use a task file and need no dataset."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

from recast_exp.config.schema import Config
from recast_exp.errors import UserError
from recast_exp.experiment.pretrain import pretrained_weights
from recast_exp.files import cache_folder
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.backbones import Backbone, create_backbone, is_embedded
from recast_exp.models.create import backbone_name
from recast_exp.models.loading import Task, load_task, restore
from recast_exp.runs.task_header import task_files
from recast_exp.tasks.merging import names_of


@dataclass(frozen=True)
class Trained:
    """A task on its backbone.

    Attributes:
        task: What its file says.
        adapted: The model, in evaluation mode: images [N, 3, S, S], normalised → logits [N, C].
        backbone: The facts about its backbone, whose network is that of the model.
    """

    task: Task
    adapted: AdaptedModel
    backbone: Backbone


def open_task(settings: Config) -> Trained:
    """Create the backbone of a task file and build the model on it.

    Args:
        settings: The settings, which hold what the file says of its model.

    Raises:
        UserError: If the file is damaged, or does not belong to the weights.
        MissingInputError: If the file, the weights or the templates are not there.
    """
    return next(iter(open_tasks(settings).values()))


def open_tasks(settings: Config) -> dict[str, Trained]:
    """The same for several task files (`task=[a,b]`), each with a backbone of its own.

    Returns:
        Name → task. The name is that of the file, or of its folder where files of that name are in several.

    Raises:
        UserError: If the tasks have different backbones, besides what `open_task` raises.
        MissingInputError: As `open_task` does.
    """
    files = task_files(settings.task or "")
    if not files:
        raise UserError("task: expected a task file (task=outputs/…/task.safetensors), got nothing")
    cache = cache_folder(settings.cache_dir)
    tasks = [load_task(file) for file in files]
    for task in tasks[1:]:
        first = tasks[0]
        if task.settings.arguments != first.settings.arguments:
            raise UserError(
                f"task: expected tasks of one backbone, got model.arguments={task.settings.arguments} in {task.path}, "
                f"and {first.settings.arguments} in {first.path}"
            )
        if (task.backbone, task.input.size) != (first.backbone, first.input.size):
            raise UserError(
                f"task: expected tasks of one backbone, got {task.backbone} with {task.input.size} pixels in "
                f"{task.path}, and {first.backbone} with {first.input.size} in {first.path}"
            )
    pristine = pristine_backbone(settings)
    found = {}
    for name, task in zip(names_of([task.path for task in tasks]), tasks, strict=True):
        network = copy.deepcopy(pristine.network) if len(tasks) > 1 else pristine.network
        backbone = dataclasses.replace(pristine, network=network)
        adapted = restore(network, task, banks=settings.bank, cache=cache)
        adapted.network.eval()
        found[name] = Trained(task, adapted, backbone)
    return found


def pristine_backbone(settings: Config) -> Backbone:
    """The backbone with its pretrained weights, as no task has changed it."""
    cache, model = cache_folder(settings.cache_dir), settings.model
    embedded = pretrained_weights(backbone_name(model), cache) if is_embedded(model) else None
    return create_backbone(model, embedded)
