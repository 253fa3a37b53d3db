"""One job, composed and checked as a whole: its configuration, what contradicts it, and what it needs and lacks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp.config import grammar as overrides
from recast_exp.config import keys
from recast_exp.config import schema as config
from recast_exp.config.compose import Composed, Composer, first_line
from recast_exp.data import check_dataset
from recast_exp.errors import MissingInputError, RecastError, UnfitError, UserError
from recast_exp.report.reading import has_jobs
from recast_exp.runs import adopt as saved
from recast_exp.search import recipes


@dataclasses.dataclass(frozen=True)
class Job:
    """The overrides of one job, one value each."""

    options: tuple[str, ...]
    """Options of groups (`model=vit_mlp`)."""
    values: tuple[str, ...]
    """Values of keys (`optimizer.lr=0.1`)."""
    swept: Mapping[str, str]
    """By key, those of both that differ between the jobs of a sweep."""


@dataclasses.dataclass
class Planned:
    """A job that will run."""

    number: int
    job: Job
    cfg: DictConfig
    """Its configuration, with what its task file brings."""
    unfit: str | None = None
    """Why a sweep leaves it out: its adapter does not fit its model."""

    @property
    def overrides(self) -> list[str]:
        """What makes it this job."""
        return [*self.job.options, *self.job.values]


def check_job(
    job: Job, composer: Composer, *, multirun: bool, resumed: Path | None, inputs: bool
) -> tuple[DictConfig | None, list[RecastError]]:
    """Compose a job and gather what is wrong with it.

    Args:
        job: The job; each of its overrides is sound by itself.
        composer: What composes it.
        multirun: Whether it is one job of a sweep.
        resumed: The folder of the run that it continues.
        inputs: Whether to look for data, weights and files.

    Returns:
        Its configuration (None if it cannot be composed), with what its task file brings, and the problems.
    """
    errors: list[RecastError] = []
    try:
        composed = composer.compose(job.options)
        cfg = copy.deepcopy(composed.cfg)
        errors += _apply(cfg, job)
        errors += _method_problems(job)
        errors += _unknown_adapter_options(cfg, composed.cfg)
        if resumed and not errors:
            errors += map(UserError, saved.differences(cfg, resumed))
        if unresolvable := list(_unresolvable(cfg)):
            return None, [*errors, *unresolvable]
    except RecastError as error:
        return None, [*errors, error]
    try:
        if cfg.stage.name == "evaluate" and cfg.task:
            errors += map(UserError, _contradictions(cfg, job, composer, composed))
            cfg = saved.adopt(cfg)
    except RecastError as error:
        errors.append(error)
    errors += map(UserError, config.problems(cfg, multirun=multirun))
    if unfit := config.unfit(cfg):
        errors.append(UnfitError(unfit))
    errors += _recipe_problems(cfg, multirun)
    if inputs:
        errors += _missing_inputs(cfg)
    return cfg, errors


def _apply(cfg: DictConfig, job: Job) -> Iterator[RecastError]:
    for text in job.values:
        override = overrides.parse(text)
        assert override is not None, text
        key = override.key_or_group
        try:
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=keys.is_open(key))
        except OmegaConfBaseException as error:
            yield UserError(f"{key}: {first_line(error)}")


def _method_problems(job: Job) -> Iterator[RecastError]:
    """A method chooses its model and its adapter; others, under its name, would be another row of the table."""
    chosen = dict(text.split("=", 1) for text in job.options)
    if chosen.get("method", "null").strip('"') != "null":
        for group in ("model", "adapter"):
            if group in chosen:
                both = f"{chosen['method']} with {group}={chosen[group]}"
                yield UserError(f"method: got {both}, but a method chooses its {group}; leave one of them out")


def _unknown_adapter_options(cfg: DictConfig, preset: DictConfig) -> Iterator[RecastError]:
    """Options that the adapter's preset does not have; their types and ranges are checked with the model."""
    takes = [str(name) for name in preset.adapter if name != "name"]
    for name in cfg.adapter:
        if name not in preset.adapter:
            near = ", ".join([*keys.nearest(str(name), takes), *takes][:1]) if takes else ""
            hint = f"; did you mean adapter.{near}?" if near else ""
            listed = ", ".join(takes) or "no options"
            yield UserError(f"adapter.{name}: unknown option, adapter={preset.adapter.name} takes {listed}{hint}")


def _unresolvable(cfg: DictConfig) -> Iterator[RecastError]:
    """Report the interpolations that lead nowhere, and replace those that only the running Hydra can answer."""
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    for key, value in keys.leaves({str(name): value for name, value in content.items()}):
        if "${" not in str(value):
            continue
        try:
            if "${hydra:" in str(value):
                OmegaConf.update(cfg, key, OmegaConf.select(OmegaConf.structured(config.Config), key))
            OmegaConf.select(cfg, key)
        except OmegaConfBaseException as error:
            field = keys.field_of(key)
            takes = f"; takes {config.accepted(field)}" if field else ""
            yield UserError(f"{key}: got {value}, but {first_line(error)}{takes}")


def _contradictions(cfg: DictConfig, job: Job, composer: Composer, composed: Composed) -> Iterator[str]:
    """Compare with the task file what was typed, and what was chosen on the command line or by an experiment."""
    chosen = {text.partition("=")[0] for text in job.options}
    defaults = composer.compose().choices
    content = {
        group: (option, composer.option_content(group, option))
        for group, option in composed.choices.items()
        if option and not group.startswith("hydra/") and (group in chosen or option != defaults.get(group))
    }
    typed = [text.partition("=")[0].lstrip("+") for text in job.values]
    return saved.contradictions(cfg, typed, content)


def _recipe_problems(cfg: DictConfig, multirun: bool) -> Iterator[RecastError]:
    """What is wrong with the recipes that `stage.tune` lists, each value by itself on the configuration."""
    try:
        choices = recipes.parse(cfg.stage.tune)
    except RecastError as error:
        yield error
        return
    own = set(config.problems(cfg, multirun=multirun))
    for key, values in choices.items():
        for value in values:
            tried = copy.deepcopy(cfg)
            OmegaConf.update(tried, key, value)
            yield from (
                UserError(f"stage.tune: {problem}")
                for problem in config.problems(tried, multirun=multirun)
                if problem not in own
            )


def _missing_inputs(cfg: DictConfig) -> Iterator[RecastError]:
    if cfg.stage.name in config.WITHOUT_MODEL:
        if cfg.path and not has_jobs(Path(cfg.path).expanduser()):
            yield MissingInputError(f"path: {cfg.path} holds no job.json or sweep.json, takes the folder of a sweep")
        return
    for key, path in (("model.weights", cfg.model.weights), ("bank", cfg.bank)):
        if path and not Path(path).is_file():
            yield MissingInputError(f"{key}: {path} is not there, takes a file")
    try:
        check_dataset(cfg.dataset, cfg.data_dir)
    except RecastError as error:
        yield error


def cause(line: str, failing: list[Job], jobs: list[Job]) -> str:
    """Name the swept values that the failing jobs of a sweep share, where other jobs are well and `line` does not."""
    if len(failing) == len(jobs):
        return ""
    shared = set.intersection(*(set(job.swept.values()) for job in failing))
    named = [text for text in failing[0].swept.values() if text in shared]
    what = [text.replace('"', "") for text in named or failing[0].swept.values()]
    if all(text in line for text in what):
        return ""
    more = f", and {len(failing) - 1} more" if not named and len(failing) > 1 else ""
    return f" (where {' '.join(what)}{more})"
