"""`stage=compare`: every method that fits one backbone, beside each other, over several seeds."""

from __future__ import annotations

import csv
import fnmatch
import functools
import io
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recast_exp import adapters
from recast_exp.config.compose import conf_dir
from recast_exp.config.schema import typed
from recast_exp.display import console, plots
from recast_exp.errors import UserError
from recast_exp.files import write_json, write_text
from recast_exp.models.create import blueprint
from recast_exp.runs import record as job_record
from recast_exp.runs.record import read_results
from recast_exp.runs.sweep import mean_and_spread
from recast_exp.search import recipes
from recast_exp.stages.adapt import adapt, validate
from recast_exp.tracking.start import say_how_to_sync
from recast_exp.training.loop import LAST

log = logging.getLogger(__name__)

PROBE, FULL = "linear probe", "full fine-tuning"
NOT_OF_A_HEAD = "optimizer.lr_scale", "trainer.head_first_epochs"  # of a recipe, without effect on a linear probe
SPLIT = "recast.targets", "recast.num_groups", "recast.num_templates"  # what one RECAST model has unlike another


def run(cfg: DictConfig, run_dir: Path, group: str | None = None) -> dict[str, Any]:
    """Run every method with every seed, and set the results beside each other.

    With `stage.tune`, each method's recipe is chosen before, on the validation images and with the first
    `stage.tune_seeds` seeds: the values of one key after another, the best of the earlier ones kept. The test images
    are looked at once for each seed, with the chosen recipe.

    A run that is finished in `run_dir` already, with the same configuration, is not repeated: the same command with the
    same hydra.run.dir goes on where it was stopped.

    Raises:
        UserError: If `stage.methods` names no method that fits, or a recipe is none.
    """
    rows = _chosen(cfg, methods(cfg))
    results: dict[str, list[dict[str, Any]]] = {}
    tried: dict[str, recipes.Search] = {}
    for name, each in rows.items():
        folder, recipe = run_dir / "runs" / slug(name), {}
        if cfg.stage.tune:
            tried[name] = _tune(each, folder)
            recipe = tried[name].recipe
            if trials := _trials(tried):  # a linear probe alone may have had nothing to try
                write_text(run_dir / "recipes.csv", _as_csv(trials))
        results[name] = []
        for seed in cfg.stage.seeds:
            results[name].append(_run(*_place(each, seed, recipe, folder), name, group or str(run_dir)))
            _write(run_dir, results)
        plots.comparison(summarize(results), run_dir / "plots" / "comparison.png")
    summary = summarize(results)
    console.show_comparison(cfg, summary)
    log.info("Results: %s", run_dir)
    say_how_to_sync(run_dir)
    return {f"{name}/test/accuracy": row["test/accuracy"] for name, row in summary.items()}


def methods(cfg: DictConfig) -> dict[str, DictConfig]:
    """Label → configuration of every method that fits the backbone.

    The linear probe, the RECAST model of `cfg` and its siblings (of the same family, in `conf/model`), each adapter on
    the frozen backbone and on the RECAST model of `cfg`, with the values of its preset, and full fine-tuning.
    """
    base = with_values(cfg, adapter={"name": "none"}, probe=False, label="", stage__name="adapt")
    frozen = with_values(base, model__method="frozen", model__label=PROBE)
    rows = {PROBE: frozen}
    if cfg.model.method == "recast":
        rows |= {each.model.label: each for each in (base, *_siblings(base))}
    for name in adapters.fitting(functools.partial(blueprint, cfg.model)):
        if name != "none":
            preset = OmegaConf.load(conf_dir() / "adapter" / f"{name}.yaml")
            assert isinstance(preset, DictConfig)
            optimizer = {f"optimizer__{key}": value for key, value in preset.get("optimizer", {}).items()}
            label = adapters.from_config(preset.adapter).label
            rows[label] = with_values(frozen, adapter=preset.adapter, **optimizer)
            if cfg.model.method == "recast":
                rows[f"{cfg.model.label} + {label}"] = with_values(base, adapter=preset.adapter, **optimizer)
    backbone_lr = 1e-4 if cfg.optimizer.backbone_lr is None else cfg.optimizer.backbone_lr
    rows[FULL] = with_values(
        base, model__method="full", model__label=FULL, model__batchnorm_statistics="update",
        optimizer__backbone_lr=backbone_lr,
    )  # fmt: skip
    return rows


def slug(name: str) -> str:
    """A method's label as the name of a folder."""
    return name.replace(" ", "_")


def summarize(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each method that has results: mean and spread over its seeds, and what a task takes."""
    rows = {}
    for name, runs in results.items():
        if runs:
            row = {key: runs[0]["parameters"][key] for key in ("task_specific", "task_bits", "head")}
            for metric in ("val/accuracy", "test/accuracy", "seconds"):
                row[metric], row[f"{metric}/spread"] = mean_and_spread([each[metric] for each in runs])
            rows[name] = {"seeds": len(runs), **row}
    return rows


def _siblings(cfg: DictConfig) -> Iterator[DictConfig]:
    """The other RECAST models that there are for the family of a model."""
    for path in sorted((conf_dir() / "model").glob("*.yaml")) if cfg.model.family != "any" else ():
        preset = OmegaConf.load(path)
        assert isinstance(preset, DictConfig)
        model = preset.model
        if model.method == "recast" and model.family == cfg.model.family and model.name != cfg.model.name:
            split = {key.replace(".", "__"): OmegaConf.select(preset, key) for key in SPLIT}
            yield with_values(cfg, model__name=model.name, model__label=model.label, **split)


def _chosen(cfg: DictConfig, rows: dict[str, DictConfig]) -> dict[str, DictConfig]:
    patterns = cfg.stage.methods
    if patterns is None:
        return rows
    for pattern in patterns:
        if not fnmatch.filter(rows, pattern):
            raise UserError(f"stage.methods: got {pattern!r}, takes names or patterns of {', '.join(rows)}")
    return {name: each for name, each in rows.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def _tune(cfg: DictConfig, folder: Path) -> recipes.Search:
    """Try recipes of one method with the first seeds. Where only a head trains, what the rest does is not tried."""
    choices = recipes.parse(cfg.stage.tune)
    if cfg.model.method == "frozen" and cfg.adapter.name == "none":
        choices = {key: values for key, values in choices.items() if key not in NOT_OF_A_HEAD}
    seeds = cfg.stage.seeds[: cfg.stage.tune_seeds]

    def validated(recipe: dict[str, Any]) -> tuple[float, float]:
        measured = [_validated(*_place(cfg, seed, recipe, folder), folder.name) for seed in seeds]
        accuracy, loss = (fmean(metrics[f"val/{what}"] for metrics in measured) for what in ("accuracy", "loss"))
        over = f" over {len(seeds)} seeds" if len(seeds) > 1 else ""
        log.info(
            "%s, %s: validation accuracy %.1f %%, loss %.3f%s",
            folder.name,
            describe(recipe),
            100 * accuracy,
            loss,
            over,
        )
        return accuracy, loss

    found = recipes.search({key: OmegaConf.select(cfg, key) for key in choices}, choices, validated, cfg.stage.tune_by)
    for trial in found.trials:
        if trial is not found.best:  # of a recipe that lost, the numbers are kept, not the weights
            for seed in seeds:
                _checkpoint(_place(cfg, seed, trial.recipe, folder)[1]).unlink(missing_ok=True)
    return found


def _validated(cfg: DictConfig, run_dir: Path, name: str) -> dict[str, float]:
    """What one training gives on the validation images; trained, continued, or read where it is there already."""
    path = run_dir / "validation.json"
    if not (_claim(cfg, run_dir) and path.is_file()):
        job_record.begin(run_dir, cfg, label=name, overrides=[])
        job_record.update(run_dir, stage="tune")
        with job_record.ending(run_dir):
            write_json(path, validate(typed(cfg), run_dir))
    metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return metrics


def describe(recipe: Mapping[str, Any]) -> str:
    """A recipe in one line: `lr_scale=0.3 head_first_epochs=5`."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in recipe.items()) or "as configured"


def _place(cfg: DictConfig, seed: int, recipe: Mapping[str, Any], folder: Path) -> tuple[DictConfig, Path]:
    """The configuration and the folder of one run of a method."""
    values: dict[str, Any] = {key.replace(".", "__"): value for key, value in recipe.items()}
    values |= {"stage__tune": [], "stage__tune_by": "accuracy", "stage__tune_seeds": 1}
    values |= {"stage__seeds": [], "stage__methods": None}
    job = with_values(cfg, seed=seed, **values)
    return job, folder / " ".join([str(seed), *([describe(recipe)] if recipe else [])])


def _claim(cfg: DictConfig, run_dir: Path) -> bool:
    """Whether a run with this very configuration was begun in a folder; what another has left there is removed."""
    record = job_record.read(run_dir)
    known = record is not None and not list(job_record.differences(record, cfg))
    if not known:
        job_record.clear(run_dir)
    return known


def _run(cfg: DictConfig, run_dir: Path, name: str, group: str | None) -> dict[str, Any]:
    """The results of one method with one seed; trained, continued, or read where they are there already."""
    started = time.perf_counter()
    if not (_claim(cfg, run_dir) and job_record.is_finished(run_dir)):
        job_record.begin(run_dir, cfg, label=name, overrides=[])
        with job_record.ending(run_dir):
            adapt(typed(cfg), run_dir, group)
    _checkpoint(run_dir).unlink(missing_ok=True)  # for full fine-tuning hundreds of MB, and nothing is left to continue
    metrics, parameters = read_results(run_dir)
    seconds = time.perf_counter() - started
    log.info("%s, seed %d: test accuracy %.1f %% (%.0f s)", name, cfg.seed, 100 * metrics["test/accuracy"], seconds)
    return {**metrics, "parameters": parameters}


def _checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"{LAST}.ckpt"


def _write(run_dir: Path, results: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write what there is so far: `comparison.json` and `comparison.csv`."""
    rows = summarize(results)
    write_json(run_dir / "comparison.json", rows)
    write_text(run_dir / "comparison.csv", _as_csv([{"method": name, **row} for name, row in rows.items()]))


def _trials(tried: Mapping[str, recipes.Search]) -> list[dict[str, Any]]:
    return [
        {
            "method": name,
            "recipe": describe(trial.recipe),
            "val/accuracy": trial.accuracy,
            "val/loss": trial.loss,
            "chosen": trial is found.best,
        }
        for name, found in tried.items()
        for trial in found.trials
    ]


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def with_values(cfg: DictConfig, **changes: Any) -> DictConfig:
    """A copy of a configuration with other values, by dotted name (dots written as two underscores)."""
    copy = cfg.copy()
    for name, value in changes.items():
        OmegaConf.update(copy, name.replace("__", "."), value, merge=False)
    return copy
