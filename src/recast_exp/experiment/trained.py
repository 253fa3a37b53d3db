"""A trained task as a model: what stages start from that use a task file and need no dataset."""

from __future__ import annotations

from dataclasses import dataclass

from recast_exp.config.schema import Config
from recast_exp.errors import UserError
from recast_exp.experiment.pretrain import pretrained_weights
from recast_exp.files import cache_folder
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.backbones import Backbone, create_backbone, is_embedded
from recast_exp.models.create import backbone_name
from recast_exp.models.library import Task, load_task, restore


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
    if settings.task is None:
        raise UserError("task: expected a task file (task=outputs/…/task.safetensors), got nothing")
    task, cache, model = load_task(settings.task), cache_folder(settings.cache_dir), settings.model
    embedded = pretrained_weights(backbone_name(model), cache) if is_embedded(model) else None
    backbone = create_backbone(model, embedded)
    adapted = restore(backbone.network, task, banks=settings.bank, cache=cache)
    adapted.network.eval()
    return Trained(task, adapted, backbone)
