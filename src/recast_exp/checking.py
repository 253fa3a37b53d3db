"""Everything that is wrong with a command line, at once, before anything heavy is imported and any folder is made."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from recast_exp import composition, config, keys, overrides, saved
from recast_exp.data import check_dataset
from recast_exp.errors import MissingInputError, UserError

_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What the user typed: overrides, and the flags that matter to the configuration."""

    overrides: tuple[str, ...] = ()
    multirun: bool = False
    config_dir: str | None = None
    config_path: str | None = None
    config_name: str = composition.CONFIG_NAME
    inputs: bool = True
    """Whether to look for data, weights and files: not where the configuration is only printed."""


@dataclasses.dataclass
class Findings:
    """What a check found."""

    overrides: list[str]
    """The overrides as Hydra takes them."""
    wrong: list[str] = dataclasses.field(default_factory=list)
    """One line for each problem of the request (exit code 2)."""
    missing: list[str] = dataclasses.field(default_factory=list)
    """One line for each input that is not there (exit code 3)."""
    jobs: list[DictConfig] = dataclasses.field(default_factory=list)
    """The configuration of each job that could be composed, as `recast_exp.stages.run` will get it."""

    @property
    def exit_code(self) -> int:
        """0 if all is well, else that of the graver kind."""
        return UserError.exit_code if self.wrong else MissingInputError.exit_code if self.missing else 0


@dataclasses.dataclass(frozen=True)
class _Job:
    """One job: its overrides, one value each, and those of them that differ between the jobs."""

    overrides: tuple[str, ...]
    swept: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Composed:
    """What Hydra made of the groups: our configuration, and what it says about the sweep."""

    cfg: DictConfig
    choices: dict[str, str | None]
    mode: RunMode | None
    sweep_parameters: dict[str, Any]


def check(line: CommandLine) -> Findings:
    """Compose every job of a command line and gather all that is wrong with it.

    Args:
        line: The command line.

    Returns:
        The problems, each in one line, and the overrides to hand to Hydra when there are none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hydra says the same when it runs
        checker = _Checker(line)
        findings = checker.run()
        if checker.is_sweep and not line.multirun:  # an experiment may say hydra.mode: MULTIRUN
            return _Checker(dataclasses.replace(line, multirun=True)).run()
        return findings


class _Checker:
    """The state of one check."""

    def __init__(self, line: CommandLine) -> None:
        self.line = line
        self.is_sweep = line.multirun or "hydra.mode=MULTIRUN" in line.overrides
        self.resumed: Path | None = None
        self.findings = Findings(overrides.rewrite(line.overrides, multirun=self.is_sweep))
        self.bad: set[str] = set()  # keys and groups that were reported
        self.verdicts: dict[str, list[str]] = {}
        self.composed: dict[tuple[str, ...], _Composed | None] = {}
        self.loader = composition.open_loader(line.config_path, self._config_dir())
        self.groups = self._list_groups()

    def run(self) -> Findings:
        """Check, in the order in which a user would read it: single overrides, then jobs."""
        self._resume()
        parsed = self._parsed()
        self.hydra_overrides = [
            text for text, override in parsed if override.is_hydra_override() and self._is_good(text)
        ]
        jobs = self._jobs([override for _, override in parsed if not override.is_hydra_override()])
        self._check_jobs(jobs)
        if self.resumed:
            # The last of two values counts, so this folder wins over any other.
            run_dir = f"hydra.run.dir={overrides.quote(str(self.resumed))}"
            self.findings.overrides += [run_dir, "hydra.output_subdir=null"]
        return self.findings

    def _wrong(self, line: str, key: str = "") -> None:
        self.bad.add(key or line.partition(":")[0])
        if line not in self.findings.wrong:
            self.findings.wrong.append(line)

    def _failed(self, error: UserError) -> None:
        """Note an error that was raised, by its kind."""
        lines = self.findings.missing if isinstance(error, MissingInputError) else self.findings.wrong
        if str(error) not in lines:
            lines.append(str(error))

    # What can be composed

    def _config_dir(self) -> str | None:
        folder = self.line.config_dir
        if folder is not None and not Path(folder).is_dir():
            self._wrong(f"--config-dir: {folder} is not there; takes a folder with your own options")
            return None
        return folder

    def _list_groups(self) -> dict[str, list[str]]:
        search_path = [text for text in self.line.overrides if text.startswith("hydra.searchpath=")]
        try:
            groups = composition.list_groups(self.loader, self.line.config_name, search_path)
        except _COMPOSITION_ERRORS as error:
            self._wrong(_composition_line(error))
            groups = composition.list_groups(self.loader, None, [])
        groups.setdefault("experiment", [])
        return groups

    def _resume(self) -> None:
        """Put the overrides of the run to be resumed below those that were typed."""
        typed = self.findings.overrides
        given = [
            override for text in typed if (override := overrides.parse(text)) and override.key_or_group == "resume"
        ]
        if self.is_sweep or not given or not isinstance(folder := given[-1].value(), str) or not folder:
            return
        try:
            self.findings.overrides = saved.merged(saved.resumed_overrides(Path(folder)), typed)
            self.resumed = Path(folder)
        except UserError as error:
            self._failed(error)

    def _parsed(self) -> list[tuple[str, Override]]:
        parsed = []
        for text in self.findings.overrides:
            override = overrides.parse(text)
            if override is None:
                self._wrong(self._unparsable(text))
            else:
                parsed.append((text, override))
        return parsed

    def _unparsable(self, text: str) -> str:
        if "=" in text:
            return f"{text}: cannot be read; takes key=value or group=option"
        groups = [group for group, options in self.groups.items() if text in options and "/" not in group]
        hint = f"did you mean {groups[0]}={text}?" if groups else "takes key=value or group=option"
        return f"{text}: has no value; {hint}"

    # Jobs

    def _jobs(self, given: list[Override]) -> list[_Job]:
        """Expand a sweep as Hydra's own sweeper does; a single run is one job."""
        last = self._sweep_parameters(given) | {override.get_key_element(): override for override in given}
        choices = []
        for override in last.values():
            if values := self._values(override):
                choices.append([text for text in values if self._is_good(text)] or [""])
        count = math.prod(len(texts) for texts in choices)
        if count > overrides.MAX_JOBS:
            self._wrong(f"a sweep of {count} jobs, takes at most {overrides.MAX_JOBS}; split it", "-m")
            return []
        swept = {text: text.partition("=")[0] for texts in choices if len(texts) > 1 for text in texts}
        return [
            _Job(tuple(filter(None, job)), {swept[text]: text for text in job if text in swept})
            for job in itertools.product(*choices)
        ]

    def _sweep_parameters(self, given: list[Override]) -> dict[str, Override]:
        """What hydra.sweeper.params adds to a sweep; its seeds are rewritten as typed ones are."""
        groups = tuple(
            text
            for override in given
            if not override.is_sweep_override() and override.key_or_group in self.groups
            for text in self._values(override)
            if self._is_good(text)
        )
        composed = self._compose(groups)
        if composed is None or composed.mode == RunMode.MULTIRUN:
            self.is_sweep = self.is_sweep or composed is not None
        if composed is None or not self.is_sweep:
            return {}
        parameters = {}
        for key, value in composed.sweep_parameters.items():
            [text] = overrides.rewrite([f"{key}={value}"], multirun=True)
            override = overrides.parse(text)
            if override is None:
                self._wrong(f"hydra.sweeper.params.{key}: got {value!r}, cannot be read; takes comma-separated values")
                continue
            parameters[override.get_key_element()] = override
            if key == "seed":
                self.findings.overrides.append(f"hydra.sweeper.params.seed={overrides.quote(text.partition('=')[2])}")
        return parameters

    def _values(self, override: Override) -> list[str]:
        """The overrides, one for each value, that a sweep stands for; empty if it is not one that can run."""
        key, text = override.get_key_element(), override.input_line or ""
        if not override.is_sweep_override():
            return [text]
        typed = text.partition("=")[2].replace('"', "") if key == "seed" else text.partition("=")[2]
        if not self.is_sweep:
            field = keys.field_of(key)
            hint = f", or write [{typed}] for a list" if field and "list[" in str(field.type) else ""
            self._wrong(f"{key}: got {typed}, which is a sweep; add -m to run one job for each value{hint}")
            return []
        if override.is_interval_sweep() and not any("hydra/sweeper=" in given for given in self.findings.overrides):
            self._wrong(f"{key}: got {typed}, takes values (a,b,c) or range(start,stop,step) with Hydra's own sweeper")
            return []
        try:
            values = overrides.sweep_values(override, self.groups)
        except HydraException as error:
            self._wrong(f"{key}: got {typed}: {_first_line(error)}")
            return []
        if not values:
            self._wrong(f"{key}: got {typed}, which is empty; takes at least one value")
        return [f"{key}={value}" for value in values]

    # One override

    def _is_good(self, text: str) -> bool:
        """Report what is wrong with one override, the first time that it is met."""
        if text not in self.verdicts:
            override = overrides.parse(text)
            assert override is not None, text
            self.verdicts[text] = list(self._override_problems(text, override))
            for line in self.verdicts[text]:
                self._wrong(line, override.key_or_group)
        return not self.verdicts[text]

    def _override_problems(self, text: str, override: Override) -> Iterator[str]:
        key, value = override.key_or_group, override.value()
        options = self.groups.get(key)
        known = options is not None or key in keys.SECTIONS or keys.field_of(key) is not None
        if override.is_hydra_override():
            if options and isinstance(value, str) and value not in options:
                yield keys.unknown_option(key, value, options)
        elif not known:
            yield keys.unknown(key, (group for group in self.groups if "/" not in group))
        elif override.is_delete():
            yield f"~{key}: cannot be deleted; set it to another value instead: {key}=..."
        elif text.endswith("=") or (value == "" and key in overrides.PATH_KEYS):
            field = keys.field_of(key)
            takes = config.accepted(field) if field else f"one of {', '.join(options or ())}"
            yield f"{key}: got nothing, takes {takes}"
        elif options is not None and not isinstance(value, dict):
            yield from self._option_problems(override, options)
        elif (override.is_add() or override.is_force_add()) and not keys.is_entry(key):
            yield f"{text.partition('=')[0]}: the key exists; write {key}=... without the +"
        else:
            yield from keys.value_problems(key, value)

    def _option_problems(self, override: Override, options: list[str]) -> Iterator[str]:
        group, value = override.key_or_group, override.value()
        if group == "seed" and isinstance(value, str) and composition.store_seed(value, options):
            options.append(value)
        if override.is_force_add() or (override.is_add() and group in composition.DEFAULT_GROUPS):
            yield f"{override.get_key_element()}: the group is there already; write {group}=... without the +"
        elif isinstance(value, list):
            names = ",".join(map(str, value))
            yield f"{group}: got {names} as a list, takes one option; for a sweep write -m {group}={names}"
        elif value not in options and not (value is None and group == "experiment"):
            yield keys.unknown_option(group, "null" if value is None else str(value), options)

    # One job

    def _check_jobs(self, jobs: list[_Job]) -> None:
        found: dict[tuple[bool, str], list[_Job]] = {}
        for job in jobs:
            for is_missing, line in dict.fromkeys(self._job_problems(job)):
                found.setdefault((is_missing, line), []).append(job)
        for (is_missing, line), failing in found.items():
            full = line + _cause(failing, jobs)
            lines = self.findings.missing if is_missing else self.findings.wrong
            if full not in lines:
                lines.append(full)

    def _job_problems(self, job: _Job) -> Iterator[tuple[bool, str]]:
        """Yield whether an input is missing, and the line."""
        composed = self._compose(tuple(text for text in job.overrides if self._is_group(text)))
        if composed is None:
            return
        cfg = copy.deepcopy(composed.cfg)
        unusable = [*self._apply(cfg, job), *_unresolvable(cfg)]
        yield from ((False, line) for line in unusable)
        if unusable:
            return
        errors: list[UserError] = []
        if self.resumed:
            yield from (
                (False, line) for line in _attempt(lambda: list(saved.differences(cfg, self.resumed)), errors) or ()
            )
        if cfg.stage.name == "evaluate" and cfg.task:
            lines = _attempt(lambda: list(self._contradictions(cfg, job, composed)), errors)
            yield from ((False, line) for line in lines or ())
            if lines is not None:
                cfg = _attempt(lambda: saved.adopt(cfg), errors) or cfg
        for line in config.problems(_without_hydra(cfg), multirun=self.is_sweep):
            if not any(re.search(rf"(?<![\w.]){re.escape(key)}(?![\w])", line) for key in self.bad if key):
                yield False, line
        if self.line.inputs:
            errors += _missing_inputs(cfg)
        yield from ((isinstance(error, MissingInputError), str(error)) for error in errors)
        self.findings.jobs.append(cfg)

    def _is_group(self, text: str) -> bool:
        override = overrides.parse(text)
        return override is not None and override.key_or_group in self.groups and not isinstance(override.value(), dict)

    def _apply(self, cfg: DictConfig, job: _Job) -> Iterator[str]:
        for text in job.overrides:
            override = overrides.parse(text)
            if override is None or self._is_group(text):
                continue
            key = override.key_or_group
            try:
                OmegaConf.update(cfg, key, override.value(), merge=True, force_add=keys.is_entry(key))
            except OmegaConfBaseException as error:
                yield f"{key}: {_first_line(error)}"

    def _contradictions(self, cfg: DictConfig, job: _Job, composed: _Composed) -> Iterator[str]:
        default = self._compose(())
        assert default is not None
        typed = [override.key_or_group for text in job.overrides if (override := overrides.parse(text))]
        groups = {
            group: option
            for group, option in composed.choices.items()
            if option is not None
            and not group.startswith("hydra/")
            and (group in typed or default.choices.get(group) != option)
        }
        chosen = {
            group: (option, composition.option_content(self.loader, group, option)) for group, option in groups.items()
        }
        yield from saved.contradictions(cfg, [key for key in typed if key not in groups], chosen)

    def _compose(self, groups: tuple[str, ...]) -> _Composed | None:
        """Compose the options of the groups, each set of them once; None, and the reason reported, if that fails."""
        if groups not in self.composed:
            try:
                self.composed[groups] = self._load([*self.hydra_overrides, *groups])
            except _COMPOSITION_ERRORS as error:
                self._wrong(_composition_line(error))
                self.composed[groups] = None
        return self.composed[groups]

    def _load(self, texts: list[str]) -> _Composed:
        while True:
            try:
                cfg = self.loader.load_configuration(self.line.config_name, texts, RunMode.RUN)
                break
            except MissingConfigException as error:  # a user's file may choose a seed without a preset
                group, _, name = (error.missing_cfg_file or "").rpartition("/")
                if group != "seed" or not composition.store_seed(name, self.groups["seed"]):
                    raise
                self.groups["seed"].append(name)
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        parameters = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
        assert isinstance(choices, dict)
        composed = _Composed(cfg, {str(key): value for key, value in choices.items()}, cfg.hydra.mode, dict(parameters))
        with open_dict(cfg):
            del cfg["hydra"]
        return composed


def _attempt(action: Callable[[], Any], errors: list[UserError]) -> Any:
    """Run an action; None, and the error noted, if the request is at fault."""
    try:
        return action()
    except UserError as error:
        errors.append(error)
        return None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _composition_line(error: BaseException) -> str:
    """Say in one line why Hydra could not compose: the key and the file where it names them, else its own first line."""
    cause = error.__cause__
    text = f"{error}\n{cause}" if cause else str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}: line {mark.line + 1}: {error.problem}"
    file = re.match(r"In '([^']*)'", text)
    place = f" (in {file[1]}.yaml)" if file else ""
    if full_key := re.search(r"full_key: (\S+)", text):
        key = full_key[1]
        field = keys.field_of(key)
        value = re.search(r"Value '(.*?)'", text)
        if field is None:
            return keys.unknown(key, ()) + place
        if value:
            return f"{key}: got {value[1]!r}, takes {config.accepted(field)}{place}"
        return f"{key}: takes {config.accepted(field)}{place}"
    line = _first_line(Exception(text))
    if isinstance(error, MissingConfigException) and error.options:
        line += f"; takes one of {', '.join(sorted(error.options))}"
    return line


def _unresolvable(cfg: DictConfig) -> Iterator[str]:
    for name in keys.FIELDS:
        if _asks_hydra(cfg, name):
            continue
        try:
            OmegaConf.select(cfg, name)
        except OmegaConfBaseException as error:
            yield f"{name}: {_first_line(error)}"


def _asks_hydra(cfg: DictConfig, key: str) -> bool:
    """Whether a value comes from the running Hydra (`${hydra:...}`), which there is none of yet."""
    section, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, section) if section else cfg
    return "${hydra:" in str(node._get_node(name))


def _without_hydra(cfg: DictConfig) -> DictConfig:
    """The configuration with the schema's value wherever only the running Hydra knows the value."""
    asking = [key for key in keys.FIELDS if _asks_hydra(cfg, key)]
    if not asking:
        return cfg
    cfg = copy.deepcopy(cfg)
    schema = OmegaConf.structured(config.Config)
    for key in asking:
        OmegaConf.update(cfg, key, OmegaConf.select(schema, key))
    return cfg


def _missing_inputs(cfg: DictConfig) -> Iterator[UserError]:
    cfg = _without_hydra(cfg)
    for key, path in (("model.weights", cfg.model.weights), ("bank", cfg.bank)):
        if path and not Path(path).is_file():
            yield MissingInputError(f"{key}: {path} is not there; takes a file")
    try:
        check_dataset(cfg.dataset, cfg.data_dir)
    except UserError as error:
        yield error


def _cause(failing: list[_Job], jobs: list[_Job]) -> str:
    """Name the swept values that the failing jobs of a sweep share, where other jobs are well."""
    if len(failing) == len(jobs):
        return ""
    shared = set.intersection(*(set(job.swept.values()) for job in failing))
    named = [text for text in failing[0].swept.values() if text in shared]
    what = named or failing[0].swept.values()
    more = f", and {len(failing) - 1} more" if not named and len(failing) > 1 else ""
    return f" (job {' '.join(what)}{more})".replace('"', "")
