"""Everything that is wrong with a command line, at once, before anything heavy is imported and any folder is made."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp.cli import launchers
from recast_exp.cli.check_job import JobChecker
from recast_exp.cli.check_override import OverrideChecker
from recast_exp.config import compose, grammar, keys
from recast_exp.config.compose import Composer
from recast_exp.errors import MissingInputError, RecastError, UnfitError, UserError, first_line, section
from recast_exp.files import user_path
from recast_exp.runs import adopt, layout, record
from recast_exp.runs.plan import Asked, Planned, cause
from recast_exp.search import check as search
from recast_exp.search.space import Parameter

MANY = 50
"""Jobs of a sweep above which they are not composed, which takes long, where single overrides are wrong already."""


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What the user typed: overrides, and the flags that matter to the configuration."""

    overrides: tuple[str, ...] = ()
    multirun: bool = False
    config_dir: str | None = None
    config_path: str | None = None
    config_name: str = compose.CONFIG_NAME
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
    jobs: list[Planned] = dataclasses.field(default_factory=list)
    """Each job that could be composed."""
    sweep_dir: Path | None = None
    """The folder of the sweep, if it is one."""
    searched: list[str] = dataclasses.field(default_factory=list)
    """The keys and groups that a search draws values of."""
    is_grid: bool = False
    """Whether it is a sweep whose jobs are all known: Hydra's own sweeper, not one that searches."""
    composer: Composer | None = None
    """What has composed the jobs, and will run them."""

    @property
    def exit_code(self) -> int:
        """0 if all is well, else that of the graver kind."""
        return UserError.exit_code if self.wrong else MissingInputError.exit_code if self.missing else 0

    def add(self, error: RecastError) -> None:
        """Note a problem, each line once."""
        lines = self.missing if isinstance(error, MissingInputError) else self.wrong
        if str(error) not in lines:
            lines.append(str(error))


def check(line: CommandLine) -> Findings:
    """Compose every job of a command line and gather all that is wrong with it.

    Args:
        line: The command line.

    Returns:
        The problems, each in one line, and the overrides to hand to Hydra when there are none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hydra says the same when it runs
        try:
            checker = _Checker(line)
        except RecastError as error:  # a file of the user cannot be read
            unread = Findings(list(line.overrides))
            unread.add(error)
            return unread
        findings = checker.run()
        if checker.is_sweep and not line.multirun:  # a user's experiment may say hydra.mode: MULTIRUN
            return _Checker(dataclasses.replace(line, multirun=True)).run()
        return findings


class _Checker:
    """The state of one check."""

    def __init__(self, line: CommandLine) -> None:
        self.line = line
        self.is_sweep = line.multirun
        self.sweeper: str | None = None  # the option of hydra/sweeper
        self.resumed: Path | None = None
        self.bad: set[str] = set()  # keys and groups with a line of their own
        self.verdicts: dict[str, bool] = {}
        self.findings = Findings(grammar.rewrite(line.overrides, multirun=line.multirun))
        self._resume()
        self.given = self._parse()
        self.composer = self.findings.composer = self._open()
        self.groups = self._groups()
        self.overrides = OverrideChecker(self.composer, self.groups, inputs=line.inputs)

    def run(self) -> Findings:
        """Check single overrides first, then the jobs that the sound ones make."""
        own = [override for override in self.given if not _is_of_all_jobs(override)]
        # The launcher comes first: without it, hydra.launcher.* has other keys.
        self.composer.hydra_overrides = [
            text
            for override in sorted(self.given, key=launchers.is_override, reverse=True)
            if _is_of_all_jobs(override) and self._is_good(text := override.input_line or "")
        ]
        planned = self._jobs(own)
        if self.is_sweep and not self.line.multirun:  # a file says so: all is looked at once more, as a sweep
            return self.findings
        if self.findings.wrong and len(planned) > MANY:
            return self.findings
        self._check_jobs(planned)
        if self.is_sweep:
            self._place_sweep(own)
        elif not self.resumed:
            self._look_at_folder()
        if self.resumed:
            # The last of two values counts, so this folder wins over any other.
            run_dir = f"hydra.run.dir={grammar.quote(str(self.resumed))}"
            self.findings.overrides += [run_dir, "hydra.output_subdir=null"]
        return self.findings

    def _wrong(self, line: str, key: str = "") -> None:
        self.bad.add(key or line.partition(":")[0])
        self.findings.add(UserError(line))

    # What there is to compose

    def _resume(self) -> None:
        """Put the overrides of the run to be resumed below those that were typed."""
        typed = self.findings.overrides
        folders = [found.value() for text in typed if (found := grammar.parse(text)) and found.key_or_group == "resume"]
        if self.is_sweep or not folders or not isinstance(folders[-1], str) or not folders[-1]:
            return
        try:
            with section("resume: "):
                resumed = user_path(str(folders[-1]))
            self.findings.overrides = adopt.merged(adopt.resumed_overrides(resumed), typed)
            self.resumed = resumed
        except RecastError as error:
            self.findings.add(error)

    def _parse(self) -> list[Override]:
        parsed = [(text, grammar.parse(text)) for text in self.findings.overrides]
        self.unparsable = [text for text, override in parsed if override is None]
        return [override for _, override in parsed if override is not None]

    def _open(self) -> Composer:
        folder = self.line.config_dir
        try:
            compose.check_config_dir(folder)
        except RecastError as error:
            self.findings.add(error)
            folder = None
        hydra_overrides = [override.input_line or "" for override in self.given if override.is_hydra_override()]
        return Composer(self.line.config_name, self.line.config_path, folder, hydra_overrides)

    def _groups(self) -> dict[str, list[str]]:
        try:
            groups = self.composer.groups()
        except RecastError as error:
            self.findings.add(error)
            groups = Composer().groups()
        for text in self.unparsable:
            self._wrong(_unparsable(text, groups))
        return groups

    # Jobs

    def _jobs(self, given: list[Override]) -> list[Asked]:
        """Expand a sweep as Hydra's own sweeper does, a search to jobs with all its ends; a single run is one job."""
        last = self._sweep_parameters(given) | {override.get_key_element(): override for override in given}
        given_values = [values for override in last.values() if (values := self._values(override))]
        count = math.prod(map(len, self._interacting(given_values)))
        if count > grammar.MAX_JOBS:
            self._wrong(f"-m: expected at most {grammar.MAX_JOBS} jobs, got {count} or more; split the sweep")
            return []
        choices = [[text for text in values if self._is_good(text)] or [""] for values in given_values]
        swept = {
            text: text.partition("=")[0] for texts in self._interacting(choices) if len(texts) > 1 for text in texts
        }
        made = []
        for texts in self._combinations(choices):
            options = [text for text in texts if self._is_choice(text)]
            values = [text for text in texts if text and text not in options]
            own = {swept[text]: text for text in texts if text in swept}
            made.append(Asked(tuple(options), tuple(values), own, tuple(text for text in texts if text)))
        return made

    def _interacting(self, choices: list[list[str]]) -> list[list[str]]:
        """Those values that are checked in every combination: in a search, which samples them, only the options."""
        if self.sweeper != search.SWEEPER:
            return choices
        return [texts for texts in choices if all(text and self._is_choice(text) for text in texts)]

    def _combinations(self, choices: list[list[str]]) -> Iterator[tuple[str, ...]]:
        """Every combination of the values that interact, and each of the others at least once."""
        interacting = self._interacting(choices)
        others = [texts for texts in choices if texts not in interacting]
        combined = list(itertools.product(*interacting))
        for number in range(max([len(combined), *map(len, others)])):
            yield (*combined[number % len(combined)], *(texts[number % len(texts)] for texts in others))

    def _sweep_parameters(self, given: list[Override]) -> dict[str, Override]:
        """What a file's hydra.sweeper.params adds to a sweep; its seeds are rewritten as typed ones are."""
        whole = self._whole(given)
        if whole is None:
            return {}
        self.is_sweep = self.is_sweep or compose.is_sweep(whole)
        self.sweeper = whole.hydra.runtime.choices.get("hydra/sweeper")
        parameters = {}
        for key, value in compose.sweep_parameters(whole).items() if self.is_sweep else ():
            [text] = grammar.rewrite([f"{key}={value}"], multirun=True)
            override = grammar.parse(text)
            if override is None:
                self._wrong(f"hydra.sweeper.params.{key}: expected comma-separated values or range(), got {value!r}")
                continue
            parameters[override.get_key_element()] = override
            if key == "seed":
                self.findings.overrides.append(f"hydra.sweeper.params.seed={grammar.quote(text.partition('=')[2])}")
        if self.is_sweep and self.sweeper == search.SWEEPER:
            everything = [*parameters.values(), *given]
            self.findings.searched = [override.key_or_group for override in everything if override.is_sweep_override()]
            lines = list(search.problems(whole.hydra.sweeper, everything))
            for line in lines or search.part_problems(whole.hydra.sweeper):
                self._wrong(line)
        return parameters

    def _values(self, override: Override) -> list[str]:
        """The overrides, one for each value, that a sweep stands for; none, and a line, if it cannot run."""
        key, text = override.get_key_element(), override.input_line or ""
        if not override.is_sweep_override():
            return [text]
        typed = text.partition("=")[2].replace('"', "")
        if not self.is_sweep:
            field = keys.field_of(key)
            hint = f", or write {key}=[{typed}] for a list" if field and "list[" in str(field.type) else ""
            self._wrong(f"{key}: expected a single value, got {typed}; add -m to run a job for each value{hint}")
            return []
        if override.is_interval_sweep() and self.sweeper == "basic":
            self._wrong(
                f"{key}: expected comma-separated values or range(start,stop,step) in a plain sweep, got {typed}; "
                "search=optuna searches intervals"
            )
            return []
        override.config_loader = self.composer.loader  # for glob(...)
        try:
            searched = self.sweeper == search.SWEEPER
            values = Parameter.parse(override).ends if searched else grammar.sweep_values(override)
        except RecastError as error:
            self.findings.add(error)
            return []
        except (HydraException, ValueError) as error:  # the latter of range(1,5,0)
            self._wrong(f"{key}: got {typed}: {first_line(error)}")
            return []
        if not values:
            self._wrong(f"{key}: expected at least one value, got {typed}, which is empty")
        again = [value.strip("'\"") for value, count in Counter(values).items() if count > 1]
        if again:
            self._wrong(f"{key}: expected each value once, got {again[0]} more than once in {typed}")
        return [f"{key}={value}" for value in values]

    def _is_choice(self, text: str) -> bool:
        """Whether an override chooses an option that has to be composed; a seed is just a number."""
        override = grammar.parse(text)
        if override is None or override.key_or_group not in self.groups or isinstance(override.value(), dict):
            return False
        return not (override.key_or_group == "seed" and str(override.value()).isdecimal())

    # One override

    def _is_good(self, text: str) -> bool:
        """Report what is wrong with one override, the first time that it is met."""
        if text not in self.verdicts:
            override = grammar.parse(text)
            assert override is not None, text
            try:
                lines = self.overrides.problems(override, multirun=self.is_sweep)
            except RecastError as error:  # the defaults cannot be composed
                lines = [str(error)]
            for line in lines:
                self._wrong(line, override.key_or_group)
            self.verdicts[text] = not lines
        return self.verdicts[text]

    # The jobs

    def _check_jobs(self, all_jobs: list[Asked]) -> None:
        failing: dict[tuple[type[RecastError], str], list[Asked]] = {}
        checker = JobChecker(
            self.composer, multirun=self.is_sweep, resumed=self.resumed, inputs=self.line.inputs
        )  # fmt: skip
        for number, job in enumerate(all_jobs):
            checked = checker.check(job)
            settings, errors = checked.settings, list(checked.errors)
            unfit = None
            if settings is not None and self.sweeper == search.SWEEPER and self.is_sweep:
                errors += map(UserError, search.trial_problems(settings))
            for error in errors:
                if isinstance(error, UnfitError) and self.is_sweep and settings is not None and settings.skip_unfit:
                    unfit = str(error)
                else:
                    failing.setdefault((type(error), str(error)), []).append(job)
            if settings is not None:
                self.findings.jobs.append(Planned(number, job, checked.content, settings, checked.sources, unfit))
        option = next((override.value() for override in self.given if launchers.is_override(override)), "")
        if self.is_sweep and self.line.inputs and (line := launchers.too_many(str(option), len(all_jobs))):
            self._wrong(line)
        for (kind, line), those in failing.items():
            if kind is MissingInputError or not self._is_consequence(line):
                self.findings.add(kind(line + cause(line, those, all_jobs)))

    def _place_sweep(self, own: list[Override]) -> None:
        """Fix the folder of a sweep now, so that what is there already can be looked at."""
        if self.findings.wrong:
            return
        whole = self._whole(own)
        if whole is None:
            return
        name = str(whole.hydra.sweep._get_node("dir"))
        swept = [override.key_or_group for override in own if override.is_sweep_override()]
        if depends := [key for key in swept if "${" + key + "}" in name]:
            self._wrong(
                f"hydra.sweep.dir: expected one folder for all jobs, got {name}, but {depends[0]} differs between jobs"
            )
            return
        try:
            for override in own:
                if not override.is_sweep_override() and not self._is_choice(override.input_line or ""):
                    OmegaConf.update(whole, override.key_or_group, override.value(), force_add=True)
            self.findings.sweep_dir = user_path(str(OmegaConf.select(whole, "hydra.sweep.dir")))
        except OmegaConfBaseException as error:
            self._wrong(f"hydra.sweep.dir: expected a folder that is known before the jobs: {first_line(error)}")
            return
        self.findings.is_grid = whole.hydra.runtime.choices.get("hydra/sweeper") == "basic"
        self.findings.overrides.append(f"hydra.sweep.dir={grammar.quote(str(self.findings.sweep_dir))}")

    def _look_at_folder(self) -> None:
        """Refuse the folder of another run now: Hydra would write over what it was started with."""
        typed = [found for text in self.findings.overrides if (found := grammar.parse(text))]
        folders = [found.value() for found in typed if found.key_or_group == "hydra.run.dir"]
        if self.findings.wrong or not self.findings.jobs or not folders or "${" in str(folders[-1]):
            return
        folder = Path(str(folders[-1]))
        if (folder / layout.SWEEP).is_file():
            self._wrong(f"hydra.run.dir: {folder} is the folder of a sweep; choose a new one")
            return
        try:
            record.check_same(folder, record.read(folder), self.findings.jobs[0].settings, "hydra.run.dir")
        except RecastError as error:
            self.findings.add(error)

    def _is_consequence(self, line: str) -> bool:
        """Whether a line speaks of a key or group with a line of its own: here its default stands in for it."""
        first = re.split("[ :]", line, maxsplit=1)[0]
        typed = {override.key_or_group for override in self.given}
        return any(
            re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", line)
            or (first.startswith(f"{key}.") and first not in typed)
            for key in self.bad
        )

    def _whole(self, given: list[Override]) -> DictConfig | None:
        """Let Hydra compose the options that all jobs share, or note why it cannot."""
        single = [override.input_line or "" for override in given if not override.is_sweep_override()]
        choices = [text for text in single if self._is_good(text) and self._is_choice(text)]
        try:
            return self.composer.whole(choices)
        except RecastError as error:
            self.findings.add(error)
            return None


def _is_of_all_jobs(override: Override) -> bool:
    """Whether an override is no job's own: Hydra's keys, and the launcher."""
    return override.is_hydra_override() or launchers.is_override(override)


def _unparsable(text: str, groups: Mapping[str, list[str]]) -> str:
    if "=" in text:
        return f"{text}: expected key=value or group=option"
    meant = [f"{group}={text}" for group, options in groups.items() if text in options and "/" not in group]
    return f"{text}: expected key=value or group=option, got no value" + (
        f"; did you mean {meant[0]}?" if meant else ""
    )
