"""Check that what was asked for can be made: model, adapter, head and training objective fit together."""

from __future__ import annotations

from recast_exp import heads
from recast_exp.config.rules import trains_only_head
from recast_exp.config.schema import Config
from recast_exp.errors import UserError
from recast_exp.models.check import check_classifier, check_model
from recast_exp.training import objectives


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
