"""The procedure of `stage=compare`: every method that fits one backbone, next to each other, over several seeds."""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import functools
import io
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType

from recast_exp import adapters, heads, schemas
from recast_exp.config import grammar, keys, recipes, rules
from recast_exp.config.fields import Role
from recast_exp.config.rules import trains_only_head, value_of
from recast_exp.config.schema import Config, ModelConfig, with_values
from recast_exp.config.variants import Variants
from recast_exp.display import console, plots
from recast_exp.display.numbers import mean_and_spread
from recast_exp.errors import UserError
from recast_exp.experiment import subruns
from recast_exp.experiment.adaptation import adapt, validate
from recast_exp.experiment.check import check_experiment
from recast_exp.files import write_json, write_text
from recast_exp.models.create import blueprint
from recast_exp.models.label import run_title
from recast_exp.runs import layout
from recast_exp.runs import record as job_record
from recast_exp.runs.results import Compared, Metrics, Results
from recast_exp.tracking.start import say_how_to_sync

log = logging.getLogger(__name__)

PROBE, FULL = "linear probe", "full fine-tuning"
NOT_OF_A_HEAD = "optimizer.lr_scale", "trainer.head_first_epochs"  # of a recipe, without effect on a linear probe


@dataclass(frozen=True)
class Tuning:
    """How the recipe of each method is chosen.

    Attributes:
        choices: Key → the values to try; nothing is chosen where it is empty.
        repeats: How many of the repeats each value is tried with; their means are compared.
        by: What is compared on the validation images, "accuracy" or "loss".
    """

    choices: Mapping[str, list[object]]
    repeats: int
    by: str


@dataclass(frozen=True)
class Repeats:
    """What each method is run with: several seeds, or several draws of the training images.

    Attributes:
        key: "seed" or "dataset.split_seed".
        values: Its values.
    """

    key: str
    values: Sequence[int]

    @property
    def word(self) -> str:
        """What one of them is called."""
        return "seed" if self.key == "seed" else "draw"


def run(
    settings: Config,
    run_dir: Path,
    group: str | None,
    methods: Mapping[str, Config],
    *,
    chosen: Sequence[str] | None,
    repeats: Repeats,
    tuning: Tuning,
) -> Metrics:
    """Run every method with every seed or draw, and set the results next to each other.

    Where there are recipes to try, each method's is chosen first, on the validation images: the values of one key after
    another, the best of the earlier ones kept. The test images are looked at once for each seed or draw, with the
    chosen recipe.

    A run that is finished in the folder already, with the same configuration, is not repeated: the same command with
    the same hydra.run.dir goes on where it was stopped.

    Args:
        settings: The settings of the command.
        run_dir: Folder of the comparison.
        group: Folder of the sweep that it belongs to.
        methods: Label → settings of each method.
        chosen: Those of them to run, by name or glob pattern; None for all.
        repeats: The seeds or draws that each is run with.
        tuning: How recipes are chosen.

    Returns:
        `LABEL/test/accuracy` → mean over the seeds or draws.

    Raises:
        UserError: If a pattern matches no method.
    """
    rows = select(chosen, methods)
    results: dict[str, list[Results]] = {}
    tried: dict[str, recipes.Search] = {}
    for name, method in rows.items():
        folder, recipe = layout.compared(run_dir, name), {}
        if tuning.choices:
            tried[name] = _tune(tuning, repeats, method, folder)
            recipe = tried[name].recipe
            if trials := _trials(tried):  # a linear probe alone may have had nothing to try
                write_text(run_dir / layout.RECIPES, _as_csv(trials))
        results[name] = []
        for value in repeats.values:
            place = _place(method, repeats, value, recipe, folder)
            results[name].append(_run(*place, name, group or str(run_dir), f"{repeats.word} {value}"))
            _write(run_dir, results)
        plots.comparison(_compared(rows, summarize(results)), layout.plot(run_dir, "comparison"))
    summary = summarize(results)
    console.show_comparison(run_title(settings.model, settings.adapter, settings.dataset.name), summary, repeats.word)
    log.info("Results: %s", run_dir)
    say_how_to_sync(run_dir)
    return {f"{name}/test/accuracy": row["test/accuracy"] for name, row in summary.items()}


def methods(settings: Config, variants: Variants, more: Mapping[str, str] = MappingProxyType({})) -> dict[str, Config]:
    """Label → settings of every method that fits the backbone.

    The linear probe, the RECAST model of `settings` and its siblings (the other RECAST options of `model=` for its
    family), each adapter on the frozen backbone and on the RECAST model, with its preset, full fine-tuning, and those
    that the user adds.

    Args:
        settings: The settings of the command.
        variants: What composes the command with other options.
        more: Label → overrides, separated by spaces, of further methods on the same backbone.

    Raises:
        UserError: If one of those cannot be made, or has the label of another.
    """
    common = {"probe": False, "label": "", "stage": {"name": "adapt"}}
    recast = settings.model.method == "recast"
    base = with_values(settings, {**common, "adapter": {"name": "none"}})
    frozen = {"model.method": "frozen", "model.label": PROBE}
    rows = {PROBE: with_values(base, frozen)}
    taken = {PROBE, FULL, *(adapters.load(name).label for name in adapters.names())}
    if recast and settings.model.label in taken:
        raise UserError(
            f"model.label: expected one of its own with stage=compare, got {settings.model.label!r}, which is that of "
            "another method"
        )
    if recast:
        rows |= {each.model.label: each for each in (base, *_siblings(base, variants, common))}
    for name in adapters.fitting(functools.partial(blueprint, settings.model)):
        if name != "none":
            try:
                adapted = with_values(variants.compose(f"adapter={name}"), common)
                adapters.from_config(adapted.adapter)
            except UserError as error:
                raise UserError(
                    f"stage: compare takes every adapter that fits, also adapter={name}: {error}; leave out what sets "
                    "options of another adapter, such as experiment="
                ) from error
            label = adapters.from_config(adapted.adapter).label
            rows[label] = with_values(adapted, frozen)
            if recast:
                rows[f"{settings.model.label} + {label}"] = adapted
    backbone_lr = 1e-4 if settings.optimizer.backbone_lr is None else settings.optimizer.backbone_lr
    full = {"method": "full", "label": FULL, "batchnorm_statistics": "update"}
    model = {f"model.{name}": value for name, value in full.items()}
    rows[FULL] = with_values(base, {**model, "optimizer.backbone_lr": backbone_lr})
    for label, overrides in more.items():
        if layout.slug(label) in map(layout.slug, rows):
            raise UserError(f"stage.more: expected labels of their own, got {label!r}, which is that of another method")
        try:
            own = shlex.split(overrides)
        except ValueError as error:
            raise UserError(f"stage.more: {label}: expected overrides with spaces in between ({error})") from error
        rows[label] = _added(base.model, label, own, variants, common)
    return rows


_SHARED = frozenset(
    {"stage", "label", "seed", "probe", "data_dir", "dataset", "model.backbone", "model.weights", "model.img_size"}
)


def _is_shared(key: str) -> bool:
    """Whether a key must not differ between the methods of a comparison: the task and the backbone."""
    of_images = key.startswith("dataset.") and key != "dataset.transform"
    return key in _SHARED or (of_images and keys.role_of(key) is not Role.TRAINING)


def _added(
    backbone: ModelConfig, label: str, overrides: Sequence[str], variants: Variants, common: Mapping[str, object]
) -> Config:
    """A method of the user's on the backbone of the others; checked, as hours may pass before it is run."""
    adapter = [] if any(text.startswith("adapter=") for text in overrides) else ["adapter=none"]
    if shared := [text for text in overrides if _is_shared(grammar.key(text))]:
        raise UserError(
            f"stage.more: {label}: expected what sets this method apart, got {shared[0]}, which all methods of a "
            "comparison share; set it for the whole command"
        )
    try:
        composed = variants.compose(*adapter, *overrides)
        model = composed.model
        same = dataclasses.replace(
            backbone,
            name=model.name,
            label=label,
            method=model.method,
            batchnorm_statistics=model.batchnorm_statistics,
        )
        settings = dataclasses.replace(with_values(composed, {**common, "label": label}), model=same)
        if problems := list(rules.problems(settings)):
            raise UserError(*problems)
        check_experiment(settings)
    except UserError as error:
        raise UserError(f"stage.more: {label}: {error}") from error
    return settings


def summarize(results: Mapping[str, list[Results]]) -> dict[str, Compared]:
    """For each method that has results: mean and spread over its seeds or draws, and what a task takes."""
    return {name: _summary(runs) for name, runs in results.items() if runs}


def _summary(runs: Sequence[Results]) -> Compared:
    (val, val_spread), (test, test_spread), (seconds, seconds_spread) = (
        mean_and_spread([float(run.metrics[metric]) for run in runs])
        for metric in ("val/accuracy", "test/accuracy", "seconds")
    )
    counts = runs[0].parameters
    return {
        "runs": len(runs),
        "task_specific": counts["task_specific"],
        "task_bits": counts["task_bits"],
        "head": counts["head"],
        "val/accuracy": val,
        "val/accuracy/spread": val_spread,
        "test/accuracy": test,
        "test/accuracy/spread": test_spread,
        "seconds": seconds,
        "seconds/spread": seconds_spread,
    }


def _compared(methods: Mapping[str, Config], summary: Mapping[str, Compared]) -> list[plots.Compared]:
    """The methods that have results, for their plot."""
    return [
        plots.Compared(
            label=name,
            model=methods[name].model.method,
            adapter=adapters.from_config(methods[name].adapter).label,
            parameters=row["task_specific"],
            bits=row["task_bits"],
            accuracy=row["test/accuracy"],
            spread=row["test/accuracy/spread"],
        )
        for name, row in summary.items()
    ]


def _siblings(base: Config, variants: Variants, common: Mapping[str, object]) -> Sequence[Config]:
    """The other RECAST models that there are for the family of a model, on its very backbone.

    Those with templates of another kind are for `stage.more`.
    """
    if base.model.family == "any":
        return []
    found = []
    for option in variants.options("model"):
        other = variants.compose(f"model={option}", "adapter=none")
        model = other.model
        is_other = model.family == base.model.family and model.name != base.model.name
        if model.method == "recast" and is_other and other.recast.templates == "layers":
            same = dataclasses.replace(base.model, name=model.name, label=model.label)
            found.append(dataclasses.replace(with_values(other, common), model=same))
    return found


def select(patterns: Sequence[str] | None, rows: Mapping[str, Config]) -> Mapping[str, Config]:
    """The rows with names that patterns name; all for None.

    Raises:
        UserError: If a pattern names none.
    """
    if patterns is None:
        return rows
    for pattern in patterns:
        if not fnmatch.filter(rows, pattern):
            raise UserError(f"stage.methods: expected names or patterns of {', '.join(rows)}, got {pattern!r}")
    return {name: rows[name] for pattern in patterns for name in rows if fnmatch.fnmatchcase(name, pattern)}


def _tune(tuning: Tuning, repeats: Repeats, settings: Config, folder: Path) -> recipes.Search:
    """Try recipes of one method. Where only a head trains, what the rest does is not tried."""
    choices = dict(tuning.choices)
    if trains_only_head(settings):
        if heads.from_config(settings.head).solved:
            choices.clear()
        choices = {key: values for key, values in choices.items() if key not in NOT_OF_A_HEAD}
    values = repeats.values[: tuning.repeats]

    def validated(recipe: Mapping[str, object]) -> tuple[float, float]:
        measured = [_validated(*_place(settings, repeats, value, recipe, folder), folder.name) for value in values]
        accuracy, loss = (fmean(metrics[f"val/{what}"] for metrics in measured) for what in ("accuracy", "loss"))
        over = f" over {len(values)} {repeats.word}s" if len(values) > 1 else ""
        log.info(
            "%s, %s: validation accuracy %.1f %%, loss %.3f%s",
            folder.name,
            describe(recipe),
            100 * accuracy,
            loss,
            over,
        )
        return accuracy, loss

    found = recipes.search({key: value_of(settings, key) for key in choices}, choices, validated, tuning.by)
    for trial in found.trials:
        if trial is not found.best:  # of a recipe that lost, the metrics are kept, not the weights
            for value in values:
                layout.checkpoint(_place(settings, repeats, value, trial.recipe, folder)[1]).unlink(missing_ok=True)
    return found


def _validated(settings: Config, run_dir: Path, name: str) -> dict[str, float]:
    """What one training gives on the validation images; trained, continued, or read where it is there already."""
    path = run_dir / layout.VALIDATION
    if subruns.claim(settings, run_dir) and path.is_file():
        subruns.check_same_images(settings, run_dir)
    else:
        job_record.begin(run_dir, settings, label=name, overrides=[])
        job_record.update(run_dir, stage="tune")
        with job_record.ending(run_dir):
            write_json(path, validate(settings, run_dir))
    return schemas.read_json(path, dict[str, float], "the validation metrics of a run")


def describe(recipe: Mapping[str, object]) -> str:
    """A recipe in one line: `lr_scale=0.3 head_first_epochs=5`."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in recipe.items()) or "as configured"


def _place(
    settings: Config, repeats: Repeats, value: int, recipe: Mapping[str, object], folder: Path
) -> tuple[Config, Path]:
    """The settings and the folder of one run of a method."""
    job = with_values(settings, {repeats.key: value, **recipe})
    name = str(value) if repeats.key == "seed" else f"draw {value}"
    return job, folder / " ".join([name, *([describe(recipe)] if recipe else [])])


def _run(settings: Config, run_dir: Path, name: str, group: str | None, repeat: str) -> Results:
    """The results of one method with one seed or draw; trained, continued, or read where they are there already."""
    started = time.perf_counter()
    results = subruns.done(settings, run_dir, name, lambda: adapt(settings, run_dir, group))
    seconds = time.perf_counter() - started
    accuracy = 100 * float(results.metrics["test/accuracy"])
    log.info("%s, %s: test accuracy %.1f %% (%.0f s)", name, repeat, accuracy, seconds)
    return results


def _write(run_dir: Path, results: Mapping[str, list[Results]]) -> None:
    """Write what there is so far: `comparison.json` and `comparison.csv`."""
    rows = summarize(results)
    write_json(run_dir / layout.COMPARISON, rows)
    write_text(run_dir / layout.COMPARISON_TABLE, _as_csv([{"method": name, **row} for name, row in rows.items()]))


def _trials(tried: Mapping[str, recipes.Search]) -> list[dict[str, object]]:
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


def _as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
