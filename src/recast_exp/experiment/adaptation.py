"""The procedure of `stage=adapt`: mimic, inject, train, test, and write everything down."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import lightning
import timm
import torch
import torchvision
from lightning.pytorch.callbacks import Callback

from recast_exp import __version__
from recast_exp.config.schema import Config, TrainerConfig
from recast_exp.data.datamodule import ImageDataModule
from recast_exp.display import console, plots
from recast_exp.errors import RecastError, UserError
from recast_exp.experiment.card import check_images, write_card, write_images, write_predictions
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.features import frozen_features
from recast_exp.experiment.heads import finish_head
from recast_exp.experiment.probe import Measured, probe
from recast_exp.files import write_json
from recast_exp.heads import Features
from recast_exp.models.adapted import KINDS, AdaptedModel
from recast_exp.models.count import count
from recast_exp.models.features import set_head
from recast_exp.models.label import run_title, short_name
from recast_exp.models.task_file import write_task
from recast_exp.recast import Banks
from recast_exp.recast.weights import weight_report
from recast_exp.runs import layout
from recast_exp.runs.record import read_results
from recast_exp.runs.results import Metrics
from recast_exp.search.pruning import Pruning
from recast_exp.system import is_main_process
from recast_exp.tracking.base import Tracker
from recast_exp.tracking.start import report_results, say_how_to_sync, tracked
from recast_exp.training.environment import device_name, own_rank
from recast_exp.training.features import collect
from recast_exp.training.loop import FitResult, fit, memory, test
from recast_exp.training.loop import validate as validate_model

log = logging.getLogger(__name__)

LOSSY = 1e-3  # relative error of a weight above which a user is warned


def run(settings: Config, run_dir: Path, group: str | None = None) -> Metrics:
    """Adapt a backbone to a dataset; a finished run that is resumed is only shown again."""
    metrics = _known(run_dir) if settings.resume else None
    if metrics is not None:
        log.info("%s is finished; nothing is left to do", run_dir)
    else:
        try:
            metrics = adapt(settings, run_dir, group)
        except KeyboardInterrupt:
            if group is None:  # a sweep says how to go on as a whole
                log.warning("Interrupted; continue with: python -m recast_exp resume=%s", shlex.quote(str(run_dir)))
            raise
    if is_main_process(settings.trainer.devices) and group is None:  # a sweep has a table of its own
        console.show_adaptation(
            run_title(settings.model, settings.adapter, settings.dataset.name, settings.seed),
            short_name(settings.model, settings.adapter),
            settings.select,
            *read_results(run_dir),
        )
        log.info("Results: %s", run_dir)
        say_how_to_sync(run_dir)
    return metrics


def _known(run_dir: Path) -> Metrics | None:
    """The metrics of a run, where it has all its results, and they can be read."""
    try:
        return read_results(run_dir)[0]
    except RecastError:
        return None


def adapt(
    settings: Config,
    run_dir: Path,
    group: str | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
    begin: Mapping[str, torch.Tensor] | None = None,
) -> Metrics:
    """Adapt a backbone to a dataset and write everything down; the metrics.

    Args:
        settings: The settings.
        run_dir: Folder of the run.
        group: Folder of the sweep that it belongs to.
        start: Layer → the relative form [B, L] of the coefficients that training starts from (`Banks.relative`); None
            for those that were mimicked.
        begin: `kind/public name` → coefficients or adapter's parameters that training starts from
            (`AdaptedModel.task_tensors`); None for the usual ones.

    Raises:
        Pruned: If the run is a trial that its search has given up; the test images have not been looked at.
    """
    with own_rank(settings.trainer.devices), tracked(settings, run_dir, group) as trackers:
        return _adapt(settings, run_dir, trackers, start, begin or {})


def _adapt(
    settings: Config,
    run_dir: Path,
    trackers: list[Tracker],
    start: Mapping[str, torch.Tensor] | None,
    begin: Mapping[str, torch.Tensor],
) -> Metrics:
    is_main = is_main_process(settings.trainer.devices)
    experiment = Experiment.open(settings)
    if layout.checkpoint(run_dir).exists():
        check_images(run_dir, experiment.images)
    banks, _ = experiment.banks()
    mimicry = {"mimicry/relative_error": _mimicry_error(experiment, banks)} if banks else {}
    wants_probe = settings.probe and settings.model.method != "frozen"
    probed = probe(experiment) if wants_probe else {}
    adapted = experiment.adapt(banks)
    if banks and start is not None:
        begin_from(adapted, banks.from_relative(start))
    for name, tensor in adapted.task_tensors().items():
        if name in begin:
            if tensor.shape != begin[name].shape:
                raise UserError(
                    f"stage.baselines: lae expects parameters of one shape in all tasks, got {list(tensor.shape)} and "
                    f"{list(begin[name].shape)} for {name}; leave out what gives layers ranks of their own"
                )
            tensor.copy_(begin[name])
    data = experiment.data(keep=True, plain=experiment.needs_features)
    if is_main:
        write_card(run_dir, data)
    recipe = experiment.recipe
    pruning = Pruning.of(settings.search)
    more = [pruning] if pruning else []
    result = _train(experiment, adapted, data, run_dir, trackers, more)
    if pruning:
        pruning.check(settings.trainer.max_epochs)
    if is_main:
        # Before the test: should that fail, the trained parameters are not lost.
        write_task(run_dir / layout.TASK, adapted, experiment.record(adapted, result.metrics))
        if result.history and (remark := adapted.adapter.remark(result.metrics, result.history[-1])):
            log.warning("%s", remark)
    tested = test(recipe, adapted, data, trackers)
    metrics = _metrics(settings.trainer, result, tested.metrics, probed) | mimicry
    if is_main:
        write_task(run_dir / layout.TASK, adapted, experiment.record(adapted, metrics))
        write_predictions(run_dir, data, tested.predictions)
        _write(run_dir, metrics, result, adapted)
        report_results(trackers, run_dir)
    return metrics


@torch.no_grad()
def begin_from(adapted: AdaptedModel, coefficients: Mapping[str, torch.Tensor]) -> None:
    """Give a model other coefficients than the mimicked ones before it is trained: layer → [K, B, n]."""
    for layer, parameter in adapted.parameters("coefficients"):
        parameter.copy_(coefficients[layer])


def validate(settings: Config, run_dir: Path) -> dict[str, float]:
    """Train and validate, without a look at the test images; `adapt` in the same folder goes on from there."""
    experiment = Experiment.open(settings)
    if layout.checkpoint(run_dir).exists():
        check_images(run_dir, experiment.images)
    write_images(run_dir, experiment.images)
    adapted = experiment.adapt(experiment.banks()[0])
    data = experiment.data(keep=True, plain=experiment.needs_features)
    return _train(experiment, adapted, data, run_dir).metrics


def _train(
    experiment: Experiment,
    adapted: AdaptedModel,
    data: ImageDataModule,
    run_dir: Path,
    trackers: Sequence[Tracker] = (),
    more: Sequence[Callback] = (),
) -> FitResult:
    """Train what trains by gradient descent, then solve or calibrate the head where it is to be; in place."""
    recipe, head = experiment.recipe, experiment.head
    only_head = not any(adapted.trainable.get(kind) for kind in KINDS if kind != "head")
    features: Callable[[str], Features] | None = None
    if head.solved and only_head and not adapted.updates_trunk:
        result = FitResult({"epoch": 0, "epochs": 0, "seconds": 0.0, "images_per_second": 0.0}, [])
        features = partial(frozen_features, experiment, views=head.views)
    else:
        name = experiment.settings.model.name
        if adapted.adapter.needs_images:
            adapted.adapter.initialise(adapted.network, partial(_run, experiment, adapted, data))
        result = fit(recipe, adapted, data, run_dir=run_dir, loggers=trackers, description=name, more=more)
        adapted.finish_adapter()
    finished = finish_head(recipe, adapted, data, head, features)
    if not finished.changed:
        return result
    measured = validate_model(recipe, adapted, data)
    measured["head/temperature"] = finished.temperature
    if finished.refitted is not None:
        set_head(adapted.network, finished.refitted)
    return FitResult(result.metrics | measured, result.history, {"head": finished.description})


def _run(experiment: Experiment, adapted: AdaptedModel, data: ImageDataModule) -> None:
    """Pass the training images through a model, as evaluation sees them."""
    collect(experiment.recipe, adapted.network, adapted.network, data, data.plain_dataloader("train"), "adapter")


def _mimicry_error(experiment: Experiment, banks: Banks) -> float:
    """The largest relative error of a rebuilt weight; warns where the backbone is no longer the pretrained one."""
    report = weight_report(experiment.backbone.network, banks)
    layer, worst = max(((layer, row["relative_error"]) for layer, row in report.items()), key=lambda pair: pair[1])
    if worst > LOSSY:
        log.warning(
            "Neural Mimicry is lossy: the weight of %s is off by %.1f %%; recast.num_templates=null is exact",
            layer,
            100 * worst,
        )
    return worst


def versions() -> dict[str, str]:
    """The versions that a result depends on, as flat keys."""
    found = {
        "recast_exp": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "lightning": lightning.__version__,
    }
    return {f"version/{name}": version for name, version in found.items()}


def _metrics(trainer: TrainerConfig, result: FitResult, tested: dict[str, float], probed: Measured) -> Metrics:
    return {
        **tested,
        **result.metrics,
        **result.facts,
        **{f"probe/{name}": value for name, value in probed.items()},
        **memory(),
        "device": device_name(trainer),
        **versions(),
    }


def _write(run_dir: Path, metrics: Metrics, result: FitResult, adapted: AdaptedModel) -> None:
    parameters = count(adapted, (run_dir / layout.TASK).stat().st_size)
    write_json(run_dir / layout.PARAMETERS, parameters)
    if result.history:
        plots.learning_curves(result.history, layout.plot(run_dir, "learning_curves"), reported=int(metrics["epoch"]))
    if adapted.banks:
        after = {layer: parameter.detach().cpu() for layer, parameter in adapted.parameters("coefficients")}
        path = layout.plot(run_dir, "coefficients")
        if adapted.banks.has_own_kind:
            start = adapted.start_coefficients()
            plots.added_coefficients({layer: value - start[layer] for layer, value in after.items()}, path)
        else:
            plots.coefficients(adapted.banks.relative(after), adapted.banks.groups, path)
    write_json(run_dir / layout.METRICS, metrics)  # last: its presence says that the run is finished
