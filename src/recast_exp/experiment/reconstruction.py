"""The procedure of `stage=reconstruct`: Neural Mimicry alone, and how close it comes."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from recast_exp.config.schema import Config
from recast_exp.display import console, plots
from recast_exp.experiment.experiment import Experiment
from recast_exp.files import write_json
from recast_exp.models.count import count
from recast_exp.recast.formulas import cosine_similarity
from recast_exp.recast.weights import weight_report
from recast_exp.runs import layout
from recast_exp.runs.results import Metrics, Reconstruction
from recast_exp.system import is_main_process

log = logging.getLogger(__name__)

FEATURE_IMAGES = 32  # the batch on which features are compared


def run(settings: Config, run_dir: Path, group: str | None = None) -> Metrics:
    """Build and keep the bank, and report every layer's errors and similarities."""
    experiment = Experiment.open(settings)
    original = copy.deepcopy(experiment.backbone.network)
    started = time.perf_counter()
    banks, path = experiment.banks()
    seconds = time.perf_counter() - started
    assert banks is not None
    weights = weight_report(original, banks)
    adapted = experiment.adapt(banks)
    images = _batch(experiment)
    features = feature_similarity(original, adapted.network, list(weights), images)
    layers = {layer: {**report, "feature_similarity": features[layer]} for layer, report in weights.items()}
    parameters = count(adapted, 0)
    summary: Reconstruction = {
        "bank": str(path),
        "hash": banks.hash,
        "seconds": seconds,
        "settings": banks.settings,
        "relative_error": max(report["relative_error"] for report in weights.values()),
        "max_error": max(report["max_error"] for report in weights.values()),
        "cosine_similarity": min(report["cosine_similarity"] for report in weights.values()),
        "feature_similarity": min(features.values()),
        "layers": layers,
    }
    if is_main_process(settings.trainer.devices):
        write_json(run_dir / layout.PARAMETERS, parameters)
        plots.reconstruction(layers, layout.plot(run_dir, "reconstruction"))
        write_json(run_dir / "reconstruction.json", summary)
        console.show_reconstruction(
            f"Neural Mimicry ({settings.mimicry.name}) of {settings.model.backbone}", summary, parameters
        )
        log.info("Bank: %s", path)
        log.info("Results: %s", run_dir)
    return {name: value for name, value in summary.items() if isinstance(value, float)}


@torch.no_grad()
def outputs_of(model: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """What layers of a model give for images [N, 3, S, S], in evaluation mode: layer → its output."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: found.__setitem__(name, output)

    hooks = [model.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return found


def feature_similarity(original: nn.Module, rebuilt: nn.Module, layers: list[str], images: Tensor) -> dict[str, float]:
    """Per layer: cosine similarity of its output in the two models, averaged over the images [N, 3, S, S]."""
    first, second = (outputs_of(model, layers, images) for model in (original, rebuilt))
    count = len(images)  # window attention folds windows into the batch: unfold them
    return {
        layer: cosine_similarity(first[layer].reshape(count, -1), second[layer].reshape(count, -1)).mean().item()
        for layer in layers
    }


def _batch(experiment: Experiment) -> Tensor:
    """The first validation images, normalised."""
    data = experiment.data()
    images, labels = next(iter(data.val_dataloader()))[:2]
    normalised, _ = data.on_after_batch_transfer((images[:FEATURE_IMAGES], labels[:FEATURE_IMAGES]), 0)
    return normalised
