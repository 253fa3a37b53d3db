"""The procedure of `stage=reconstruct stage.sweep=true`: what banks cost that are smaller than their weights."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from recast_exp.config.schema import Config, with_values
from recast_exp.display import console, plots
from recast_exp.errors import UserError, section
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.reconstruction import feature_similarity, outputs_of
from recast_exp.files import write_json, write_text
from recast_exp.heads import Features, choose
from recast_exp.heads.best import Best
from recast_exp.models.bank_cache import groups_of
from recast_exp.models.check import smallest_group
from recast_exp.recast import Banks, inject
from recast_exp.recast.formulas import cosine_similarity
from recast_exp.recast.grouping import layer_module
from recast_exp.runs import layout
from recast_exp.runs.results import BankSize, Metrics
from recast_exp.training.features import extract

log = logging.getLogger(__name__)

IMAGES = 64  # on which the outputs of layers are compared


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        sizes: Numbers of templates of each group; None for all.
        solvers: Solvers.
        dtypes: Dtypes of the templates.
    """

    sizes: Sequence[int] | None
    solvers: Sequence[str]
    dtypes: Sequence[str]


def check(settings: Config, sizes: Sequence[int]) -> None:
    """Refuse banks with more templates than a group has layers.

    Raises:
        UserError: One line.
    """
    smallest = smallest_group(settings.model, dataclasses.replace(settings.recast, num_templates=None))
    if smallest is not None and (largest := max(sizes)) > (most := len(smallest.layers)):
        raise UserError(f"stage.sizes: expected at most {most} (the layers of {smallest.name}), got {largest}")


def run(settings: Config, run_dir: Path, grid: Grid) -> Metrics:
    """Compare banks by their size: errors, features, and a head that is solved on their features.

    The head is chosen and measured on the validation images; the test images are not looked at.

    Args:
        settings: The settings; how layers are grouped is theirs.
        run_dir: Folder of the run.
        grid: The banks.

    Returns:
        The accuracy of the head with the pretrained weights, and with each bank.
    """
    experiment = Experiment.open(settings)
    original = copy.deepcopy(experiment.backbone.network).eval()
    reference = _features(experiment, original)
    pretrained = _accuracy(reference)
    rows: list[BankSize] = []
    for number, solver, dtype in _points(experiment, grid):
        log.info("%d templates a group, %s, %s", number, solver, dtype)
        keys = {"recast.num_templates": number, "recast.template_dtype": dtype, "mimicry.name": solver}
        banks, _ = dataclasses.replace(experiment, settings=with_values(settings, keys)).banks()
        assert banks is not None
        network = copy.deepcopy(original)
        inject(network, banks)
        measured = _measured(experiment, original, network.requires_grad_(False), banks, reference)
        rows.append({"num_templates": number, "solver": solver, "dtype": dtype, **measured})  # type: ignore[typeddict-item]
    write_json(run_dir / layout.BANK_SIZES, {"pretrained": pretrained, "banks": rows})
    write_text(run_dir / layout.BANK_SIZES_TABLE, _csv(rows))
    plots.bank_sizes(rows, pretrained, layout.plot(run_dir, "bank_sizes"))
    console.show_bank_sizes(f"Banks of {settings.model.name} on {experiment.backbone.name}", rows, pretrained)
    log.info("Results: %s", run_dir)
    metrics: Metrics = {"val/accuracy": pretrained}
    for row in rows:
        metrics[f"{row['solver']}/{row['dtype']}/{row['num_templates']}/val/accuracy"] = row["head_accuracy"]
    return metrics


def _points(experiment: Experiment, grid: Grid) -> Iterator[tuple[int, str, str]]:
    recast = dataclasses.replace(experiment.settings.recast, num_templates=None)
    with section("recast."):
        smallest = min(len(group.layers) for group in groups_of(experiment.backbone.network, recast))
    for number in grid.sizes or range(1, smallest + 1):
        for solver in grid.solvers:
            for dtype in grid.dtypes:
                yield number, solver, dtype


def _measured(
    experiment: Experiment, original: nn.Module, network: nn.Module, banks: Banks, reference: dict[str, Features]
) -> dict[str, float]:
    """What a bank costs, by the names of `BankSize`."""
    layers = list(banks.coefficients)
    features = _features(experiment, network)
    weights = sum(layer_module(original, layer).weight.numel() for layer in layers)
    images = experiment.plain_images("val", IMAGES)
    errors = output_errors(original, network, layers, images)
    similarities = feature_similarity(original, network, layers, images)
    return {
        "share": banks.template_bits / (32 * weights),
        "output_error": sum(errors) / len(errors),
        "layer_similarity": sum(similarities.values()) / len(similarities),
        "feature_similarity": cosine_similarity(features["val"].values, reference["val"].values).mean().item(),
        "head_accuracy": _accuracy(features),
    }


def output_errors(original: nn.Module, changed: nn.Module, layers: Sequence[str], images: Tensor) -> list[float]:
    """For each layer, ‖W x - Ŵ x̂‖ / ‖W x‖ over images [N, 3, S, S]: its outputs in the one model and in the other."""
    before, after = (outputs_of(model, layers, images) for model in (original, changed))
    return [((after[layer] - before[layer]).norm() / before[layer].norm()).item() for layer in layers]


def _features(experiment: Experiment, network: nn.Module) -> dict[str, Features]:
    data = experiment.data(plain=True)
    return {split: extract(experiment.recipe, network, data, split) for split in ("train", "val")}


def _accuracy(features: dict[str, Features]) -> float:
    """Of the best solved head, on the validation images."""
    return choose(Best(), features["train"], features["val"]).trial.accuracy


def _csv(rows: Sequence[BankSize]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
