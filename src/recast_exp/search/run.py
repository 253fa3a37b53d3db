"""The search itself: asks Optuna for trials, has Hydra's launcher run them, tells Optuna what came of them.

Everything that counts is in the storage before a job starts and after it ends, so a search may be killed at any moment:
a trial that was running is run again under its number and in its folder, where its training goes on from its last
checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from recast_exp.config.grammar import quote
from recast_exp.config.keys import leaves
from recast_exp.errors import RecastError, UserError, first_line
from recast_exp.files import locked, write_text
from recast_exp.runs import layout
from recast_exp.runs import record as job_record
from recast_exp.runs.record import Record
from recast_exp.runs.state import State
from recast_exp.runs.sweep import SearchRecord
from recast_exp.search import results, space
from recast_exp.search.space import Parameter
from recast_exp.search.study import METRIC, Settings, open_study, resume_trial


def search(
    content: Mapping[str, object],
    written: str,
    settings: Settings,
    arguments: Sequence[str],
    folder: Path,
    launcher: Launcher,
    loader: ConfigLoader,
) -> SearchRecord:
    """Run the trials of a search that have not ended yet.

    Args:
        content: The configuration that the trials share, as nested mappings, interpolations as they stand.
        written: The same with the node `hydra`, as YAML, for `multirun.yaml`.
        settings: The node `hydra.sweeper`, resolved.
        arguments: The overrides, those of a sweep with all their values.
        folder: Folder of the search.
        launcher: What runs jobs.
        loader: What `glob(…)` looks for options with.

    Returns:
        The content of search.json.

    Raises:
        UserError: If the folder or the storage holds another search, or one that is running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params = settings["params"] or {}
    parser = OverridesParser.create(config_loader=loader)
    fixed, searched = space.split(parser.parse_overrides([*(f"{k}={v}" for k, v in params.items()), *arguments]))
    described = {parameter.key: parameter.described() for parameter in searched}
    storage = Path(settings["storage"])
    with _alone(storage, folder):
        study = open_study(storage, settings, content, described)
        write_text(folder / layout.MULTIRUN, written)
        return _Search(study, folder, settings, fixed, searched, launcher).run()


@contextlib.contextmanager
def _alone(storage: Path, folder: Path) -> Iterator[None]:
    """Hold a storage that lies elsewhere than in the folder of the search, which is held as a whole.

    Raises:
        UserError: If a search is running on it: both would run the same trials.
    """
    if storage.absolute().parent == folder.absolute():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            lock = storage.with_name(f".{storage.name}.search{layout.LOCK}")  # Optuna has one of its own
            stack.enter_context(locked(lock, str(storage), wait=False))
        except TimeoutError as held:
            raise UserError(
                f"hydra.sweeper.storage: a search is running on {storage}; wait for it, or choose another file; if "
                f"there is none, remove {held}"
            ) from None
        yield


class _Search:
    """The state of one search."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        settings: Settings,
        fixed: Sequence[str],
        searched: Sequence[Parameter],
        launcher: Launcher,
    ) -> None:
        self.study = study
        self.folder = folder
        self.settings = settings
        self.fixed = fixed
        self.searched = searched
        self.launcher = launcher
        self.storage = Path(settings["storage"]).absolute()

    def run(self) -> SearchRecord:
        total, together = self.settings["n_trials"], self.settings["n_jobs"]
        if there := len(self._trials()):
            _say(f"Search {self.folder} goes on: {there} of {total} trials are there")
        else:
            _say(f"Search {self.folder}")
        self._record()
        # Batches begin at multiples of n_jobs, in a search that goes on as in one that was never stopped.
        for start in range(0, total, together):
            for trials in self._open(range(start, min(start + together, total))):
                self._launch(trials)
                self._record()
        return self._record()  # once more: a trial may have ended by what was found in its folder

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _record(self) -> SearchRecord:
        return results.record(self.study, self.folder, self.settings, self.fixed, self.searched)

    def _open(self, numbers: range) -> Iterator[list[FrozenTrial]]:
        """The trials of a batch that have not ended, in stretches of consecutive numbers, as launchers take them."""
        distributions = {parameter.key: parameter.distribution() for parameter in self.searched}
        stretch: list[FrozenTrial] = []
        for number in numbers:
            there = self._trials()
            if number < len(there):
                if there[number].state.is_finished() or self._settle_from_files(there[number]):
                    if stretch:
                        yield stretch
                    stretch = []
                    continue
                trial = resume_trial(self.study, there[number])
                for parameter in self.searched:  # one that was killed while its values were sampled lacks some
                    trial._suggest(parameter.key, distributions[parameter.key])
            else:
                self.study.ask(distributions)
            stretch.append(self._trials()[number])
        if stretch:
            yield stretch

    def _launch(self, trials: Sequence[FrozenTrial]) -> None:
        jobs = [
            [
                *self.fixed,
                *results.overrides(trial, self.searched),
                f"search.storage={quote(str(self.storage))}",
                f"search.trial={trial.number}",
            ]
            for trial in trials
        ]
        returns = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
        for trial, returned in zip(trials, returns, strict=True):
            self._settle(trial, returned)

    # What came of a trial

    def _settle(self, trial: FrozenTrial, returned: JobReturn) -> None:
        if returned.status == JobStatus.FAILED:
            error = returned._return_value
            code = error.exit_code if isinstance(error, RecastError) else 1
            self._fail(trial, f"{type(error).__name__}: {first_line(error)}" if code == 1 else first_line(error), code)
        elif self._is_value(returned._return_value):
            self._finish(trial, float(returned._return_value))
        elif not self._settle_from_files(trial):
            self._fail(trial, f"the job returned {returned._return_value!r}, expected a number, {METRIC}", 1)

    def _settle_from_files(self, trial: FrozenTrial) -> bool:
        """End a trial whose job has ended, and says so in its folder: the search was killed before it could tell."""
        folder = self.folder / str(trial.number)
        record = job_record.read(folder)
        if record is None or len(trial.params) < len(self.searched) or not _is_of(record, trial):
            return False
        state, reason = record["state"], record["reason"]
        if state == State.FINISHED:
            value = _accuracy(folder)
            if not self._is_value(value):
                return False
            self._finish(trial, float(value))
        elif state in (State.PRUNED, State.SKIPPED):
            self._attribute(trial, results.REASON, reason)
            self.study.tell(trial.number, state=TrialState.PRUNED)
            self._say(trial, f"pruned; {self._best()}")
        elif state == State.FAILED:
            self._fail(trial, str(reason), record.get("exit_code") or 1)
        else:
            return False
        return True

    @staticmethod
    def _is_value(value: object) -> TypeGuard[float]:
        return isinstance(value, int | float) and math.isfinite(value)

    def _finish(self, trial: FrozenTrial, value: float) -> None:
        self.study.tell(trial.number, value)
        self._say(trial, f"validation {100 * value:.1f} %; {self._best()}")

    def _fail(self, trial: FrozenTrial, reason: str, exit_code: int) -> None:
        self._attribute(trial, results.REASON, reason)
        self._attribute(trial, results.EXIT_CODE, exit_code)
        self.study.tell(trial.number, state=TrialState.FAIL)
        self._say(trial, f"failed: {reason}")

    def _say(self, trial: FrozenTrial, what: str) -> None:
        _say(f"Trial {trial.number} ({self.settings['n_trials']} in all): {what}")

    def _best(self) -> str:
        best = results.best(self._trials())
        return f"best {100 * best.values[0]:.1f} % (trial {best.number})" if best else "none has finished"

    def _attribute(self, trial: FrozenTrial, name: str, value: object) -> None:
        resume_trial(self.study, trial).set_user_attr(name, value)


def _is_of(record: Record, trial: FrozenTrial) -> bool:
    """Whether a job in a trial's folder is that trial, with its values: not what another sweep has left there."""
    values = dict(leaves(record["config"]))
    sampled = ((values[key], value) for key, value in trial.params.items() if key in values)
    of_search = record["config"].get("search")
    number = of_search.get("trial") if isinstance(of_search, dict) else None
    return bool(number == trial.number and all(_same(*pair) for pair in sampled))


def _same(recorded: object, drawn: str | float) -> bool:
    if isinstance(recorded, str | float | int):
        with contextlib.suppress(ValueError):
            return float(recorded) == float(drawn)
    return str(recorded) == str(drawn).strip("'\"")


def _accuracy(folder: Path) -> float | str | None:
    try:
        return job_record.read_metrics(folder).get(METRIC)
    except (OSError, ValueError):
        return None


def _say(line: str) -> None:
    """Say how the search gets on. Not by a log: those of a sweep are silent, as a table shows the jobs of a grid."""
    print(line, file=sys.stderr, flush=True)
