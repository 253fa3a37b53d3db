"""One job, composed and checked as a whole: its settings, what contradicts them, and what it needs and lacks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp import stages
from recast_exp.config import grammar, keys, rules
from recast_exp.config.compose import Composed, Composer
from recast_exp.config.fields import accepted
from recast_exp.config.schema import Config, DatasetConfig, typed
from recast_exp.data import check_dataset
from recast_exp.errors import MissingInputError, RecastError, UnfitError, UserError, first_line, section
from recast_exp.files import user_path
from recast_exp.report.reading import has_jobs
from recast_exp.runs import adopt
from recast_exp.runs.plan import Asked
from recast_exp.runs.task_header import task_files

COMMAND_LINE = "command line"
"""The source of a value that was typed."""


@dataclasses.dataclass
class Checked:
    """What came of checking one job."""

    errors: list[RecastError]
    content: dict[str, object] = dataclasses.field(default_factory=dict)
    """Its composed configuration, with what its task file brings; interpolations as they stand."""
    settings: Config | None = None
    """The same, typed and resolved; None if it cannot be composed."""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)


class JobChecker:
    """Checks the jobs of one command; those that differ in their seed alone are composed once.

    Args:
        composer: What composes them.
        multirun: Whether they are jobs of a sweep.
        resumed: Folder of the run that the job continues.
        inputs: Whether to look for data, weights and files.
    """

    def __init__(self, composer: Composer, *, multirun: bool, resumed: Path | None, inputs: bool) -> None:
        self._composer = composer
        self._multirun = multirun
        self._resumed = resumed
        self._inputs = inputs
        self._known: dict[tuple[tuple[str, ...], ...], Checked] = {}
        self._datasets: dict[str, RecastError | None] = {}

    def check(self, job: Asked) -> Checked:
        """Compose a job, each of whose overrides is sound by itself, and gather what is wrong with it."""
        seeds = [text for text in job.values if text.startswith("seed=")]
        others = tuple(text for text in job.values if not text.startswith("seed="))
        known = self._known.get((job.options, others))
        if len(seeds) == 1 and known is not None and known.settings is not None:
            seed = int(str(grammar.value(seeds[0])))
            return dataclasses.replace(
                known,
                content=known.content | {"seed": seed},
                settings=dataclasses.replace(known.settings, seed=seed),
            )
        checked = self._check(job)
        if checked.settings is not None and "${seed" not in str(checked.content) and not self._resumed:
            self._known[job.options, others] = checked
        return checked

    def _check(self, job: Asked) -> Checked:
        errors: list[RecastError] = []
        try:
            composed = self._composer.compose(job.options)
            cfg = copy.deepcopy(composed.cfg)
            errors += _apply(cfg, job)
            errors += _method_problems(job)
            for group in ("adapter", "head", "training"):
                errors += _unknown_options(group, cfg, composed.cfg)
            content = plain(cfg)
            if self._resumed and not errors:
                errors += map(UserError, adopt.differences(content, self._resumed))
            if unresolvable := list(_unresolvable(cfg)):
                return Checked([*errors, *unresolvable])
            settings = typed(cfg)
            if of_another_kind := rules.kind_problems(settings):
                return Checked([*errors, *map(UserError, of_another_kind)])
            stage = stages.from_config(settings.stage)
        except RecastError as error:
            return Checked([*errors, error])
        if settings.task and "task" in stage.requires:
            try:
                files = task_files(settings.task)
                if len(files) > 1 and not stage.several_tasks:
                    name = settings.stage["name"]
                    raise UserError(f"task: expected one task file with stage={name}, got {len(files)}")
                task = str(next(iter(files), settings.task))  # those after it are of the same model
                other = not stage.needs_images or _asks_for_other_images(task, settings, job)
                errors += map(UserError, self._contradictions(task, settings, job, composed, other))
                content = adopt.adopt(content, task, other_images=other)
                settings = _adopted(content, task)
                errors += _without_dataset(task, settings, job) if stage.needs_images else ()
            except RecastError as error:
                errors.append(error)
        errors += map(UserError, rules.problems(settings, multirun=self._multirun))
        try:
            errors += map(UserError, stages.problems(stage, settings, multirun=self._multirun))
        except RecastError as error:
            errors.append(error)
        if unfit := rules.unfit(settings):
            errors.append(UnfitError(unfit))
        if self._inputs:
            errors += self._missing_inputs(settings, stage)
        sources = composed.sources | dict.fromkeys((grammar.key(text) for text in job.values), COMMAND_LINE)
        return Checked(errors, content, settings, sources)

    def _contradictions(
        self, task: str, settings: Config, job: Asked, composed: Composed, other_images: bool
    ) -> Iterator[str]:
        """Compare with the task file what was typed, and what was chosen on the command line or by an experiment."""
        chosen = {text.partition("=")[0] for text in job.options}
        defaults = self._composer.compose().choices
        content = {
            group: (option, self._composer.option_content(group, option))
            for group, option in composed.choices.items()
            if option and not group.startswith("hydra/") and (group in chosen or option != defaults.get(group))
        }
        asked = dict(keys.leaves(dataclasses.asdict(settings)))
        typed_keys = map(grammar.key, job.values)
        return adopt.contradictions(asked, task, typed_keys, content, other_images=other_images)

    def _missing_inputs(self, settings: Config, stage: stages.Stage) -> Iterator[RecastError]:
        if not stage.needs_model:
            if settings.path:
                yield from _without_jobs(settings.path)
            return
        tasks = [("recast.tasks", path) for path in settings.recast.tasks if not path.startswith("hf://")]
        for key, path in (("model.weights", settings.model.weights), ("bank", settings.bank), *tasks):
            try:
                with section(f"{key}: "):
                    missing = path and not user_path(path).is_file()
            except RecastError as wrong:
                yield wrong
            except OSError as closed:
                yield _closed(key, closed)
            else:
                if missing:
                    yield MissingInputError(f"{key}: expected a file, got {path}, which is not there")
        if stage.needs_images and (error := self._dataset_problem(settings.dataset, settings.data_dir)):
            yield error

    def _dataset_problem(self, dataset: DatasetConfig, data_dir: str) -> RecastError | None:
        known = f"{dataset} {data_dir}"
        if known not in self._datasets:
            try:
                check_dataset(dataset, data_dir)
                self._datasets[known] = None
            except RecastError as error:
                self._datasets[known] = error
            except OSError as error:
                self._datasets[known] = _closed(f"dataset {dataset.name}", error)
        return self._datasets[known]


def plain(cfg: DictConfig) -> dict[str, object]:
    """A configuration as nested mappings, interpolations as they stand."""
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items()}


def _without_jobs(path: str) -> Iterator[RecastError]:
    try:
        if not has_jobs(user_path(path)):
            yield MissingInputError(
                f"path: expected the folder of a sweep, got {path}, which holds no job.json or sweep.json"
            )
    except OSError as error:
        yield _closed("path", error)


def _closed(key: str, error: OSError) -> MissingInputError:
    return MissingInputError(f"{key}: {error.filename} cannot be opened ({error.strerror})")


def _asks_for_other_images(task: str, settings: Config, job: Asked) -> bool:
    """Whether a dataset was typed that is not the one that the task file was trained on."""
    return _types_dataset(job) and adopt.dataset_of(task) != settings.dataset.name


def _without_dataset(task: str, settings: Config, job: Asked) -> Iterator[RecastError]:
    """A task file of the library says nothing of images, and the default dataset is none of its own."""
    if adopt.dataset_of(task) is None and not _types_dataset(job):
        yield UserError(
            f"dataset: expected one with stage={settings.stage['name']}, as {task} was saved by the library "
            "and names none, got nothing; pass dataset=NAME, such as dataset=folder dataset.path=FOLDER"
        )


def _types_dataset(job: Asked) -> bool:
    return any(text.startswith("dataset=") for text in job.options)


def _adopted(content: dict[str, object], task: str) -> Config:
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), content)
        assert isinstance(merged, DictConfig)
        return typed(merged)
    except OmegaConfBaseException as error:
        for key, value in adopt.recorded(task).items():
            if any(keys.value_problems(key, value)):
                raise UserError(f"task: {task} holds {key}={value!r}, which this version does not accept") from None
        raise UserError(f"task: {task} holds a value that this version does not accept ({first_line(error)})") from None


def _apply(cfg: DictConfig, job: Asked) -> Iterator[RecastError]:
    for text in job.values:
        override = grammar.parse(text)
        assert override is not None, text
        key = override.key_or_group
        try:
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=keys.is_open(key))
        except OmegaConfBaseException as error:
            yield UserError(f"{key}: {first_line(error)}")


def _method_problems(job: Asked) -> Iterator[RecastError]:
    """A method chooses its model and its adapter; others, under its name, would be another row of the table."""
    chosen = dict(text.split("=", 1) for text in job.options)
    if chosen.get("method", "null").strip('"') != "null":
        for group in ("model", "adapter"):
            if group in chosen:
                both = f"{chosen['method']} with {group}={chosen[group]}"
                yield UserError(
                    f"method: expected no {group}, which a method chooses, got {both}; leave one of them out"
                )


def _unknown_options(group: str, cfg: DictConfig, preset: DictConfig) -> Iterator[RecastError]:
    """Options that the preset of a plug-in does not have; their types and ranges are checked with the model."""
    takes = [str(name) for name in preset[group] if name != "name"]
    for name in cfg[group]:
        if name not in preset[group]:
            near = keys.nearest(str(name), takes)
            hint = f"; did you mean {group}.{near[0]}?" if near else ""
            listed = ", ".join(takes) or "no options"
            yield UserError(f"{group}.{name}: unknown option, {group}={preset[group].name} takes {listed}{hint}")


def _unresolvable(cfg: DictConfig) -> Iterator[RecastError]:
    """Report the interpolations that lead nowhere, and replace those that only the running Hydra can answer."""
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    for key, value in keys.leaves({str(name): value for name, value in content.items()}):
        if "${" not in str(value):
            continue
        try:
            if "${hydra:" in str(value):
                OmegaConf.update(cfg, key, OmegaConf.select(OmegaConf.structured(Config), key))
            OmegaConf.select(cfg, key)
        except OmegaConfBaseException as error:
            field = keys.field_of(key)
            expected = f"expected {accepted(field)}, " if field else ""
            yield UserError(f"{key}: {expected}got {value}, but {first_line(error)}")
