"""The head of a trained model: solved on its features, or calibrated as it was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from recast_exp.data.datamodule import ImageDataModule
from recast_exp.heads import Features, Head, Solution, choose, describe, temperature
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.features import head_of, set_head
from recast_exp.training.features import extract
from recast_exp.training.recipe import Recipe


@dataclass(frozen=True)
class Finished:
    """What has become of the head.

    Attributes:
        description: The head in words.
        temperature: What its logits were divided by.
        changed: Whether it is no longer what training has left.
        refitted: The head to set once the validation images are measured, which it was solved for, too; None if the
            model has its last head already.
    """

    description: str
    temperature: float
    changed: bool
    refitted: Solution | None = None


def finish_head(
    recipe: Recipe,
    adapted: AdaptedModel,
    data: ImageDataModule,
    head: Head,
    features: Callable[[str], Features] | None = None,
) -> Finished:
    """Solve the head for the features of the trained model, or calibrate the trained one, in place.

    Args:
        recipe: Device and precision.
        adapted: The model with its task parameters.
        data: The images.
        head: The head.
        features: Split → features, where they are known already.

    Raises:
        UserError: If the head does not fit the model, or a class has no training image.
    """

    def computed(split: str) -> Features:
        return extract(recipe, adapted.network, data, split, head.views)

    of = features or computed
    if head.solved:
        chosen = choose(head, of("train"), of("val"))
        set_head(adapted.network, chosen.validated or chosen.solution)
        return Finished(
            describe({"head": head.name, **chosen.solution.setting}),
            chosen.temperature,
            changed=True,
            refitted=chosen.solution if chosen.validated else None,
        )
    if head.calibrate:
        trained, val = head_of(adapted.network), of("val")
        heat = temperature(trained.logits(val.values), val.labels)
        set_head(adapted.network, trained.scaled(1 / heat))
        return Finished(head.name, heat, changed=True)
    return Finished(head.name, 1.0, changed=False)
