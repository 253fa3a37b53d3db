"""What a search says: search.json, which is rewritten after every batch of trials, and the table at its end."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Sequence
from pathlib import Path

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from recast_exp.files import write_json
from recast_exp.runs import layout
from recast_exp.runs.state import State
from recast_exp.runs.sweep import SearchRecord, TrialRecord
from recast_exp.search.space import Parameter
from recast_exp.search.study import METRIC, Settings

FORMAT = 1
REASON = "reason"
EXIT_CODE = "exit_code"
"""What the storage keeps of a failed trial, in addition to its state."""

STATES = {
    TrialState.COMPLETE: State.FINISHED,
    TrialState.PRUNED: State.PRUNED,
    TrialState.FAIL: State.FAILED,
    TrialState.RUNNING: State.RUNNING,
    TrialState.WAITING: State.RUNNING,
}


def record(
    study: Study, folder: Path, settings: Settings, fixed: Sequence[str], space: Sequence[Parameter]
) -> SearchRecord:
    """Write search.json.

    Args:
        study: The study.
        folder: That of the search.
        settings: The node `hydra.sweeper`.
        fixed: The overrides that the trials share.
        space: What is searched.

    Returns:
        What was written.
    """
    trials = study.get_trials(deepcopy=False)
    chosen = best(trials)
    content: SearchRecord = {
        "format": FORMAT,
        "metric": METRIC,
        "direction": "maximize",
        "n_trials": settings["n_trials"],
        "seed": settings["seed"],
        "space": {parameter.key: parameter.described() for parameter in space},
        "overrides": list(fixed),
        "best": {**_entry(chosen, space), "command": command(fixed, chosen, space)} if chosen else None,
        "trials": [_entry(trial, space) for trial in trials],
    }
    write_json(folder / layout.SEARCH, content)
    return content


def best(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The finished trial with the highest value, the first of equals; None if none has finished."""
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(finished, key=lambda trial: trial.values[0], default=None)


def command(fixed: Sequence[str], trial: FrozenTrial, space: Sequence[Parameter]) -> str:
    """The command line that runs one trial's setting by itself."""
    kept = [text for text in fixed if not text.startswith(("search=", "hydra", "experiment=null"))]
    if any(text.startswith("experiment=") for text in kept):  # it may choose the search, and a sweep
        kept += ["search=none", "hydra.mode=RUN"]
    return shlex.join(["python", "-m", "recast_exp", *kept, *overrides(trial, space)])


def overrides(trial: FrozenTrial, space: Sequence[Parameter]) -> list[str]:
    """What a trial drew, as overrides."""
    return [f"{parameter.key}={parameter.text(trial.params[parameter.key])}" for parameter in space]


def _entry(trial: FrozenTrial, space: Sequence[Parameter]) -> TrialRecord:
    drawn = {
        parameter.key: parameter.text(trial.params[parameter.key])
        for parameter in space
        if parameter.key in trial.params
    }
    return {
        "number": trial.number,
        "folder": str(trial.number),
        "state": STATES[trial.state],
        "reason": trial.user_attrs.get(REASON),
        "exit_code": trial.user_attrs.get(EXIT_CODE),
        "value": trial.values[0] if trial.state == TrialState.COMPLETE else None,
        "parameters": drawn,
        "epochs": {str(epoch): value for epoch, value in sorted(trial.intermediate_values.items())},
        "started": _time(trial.datetime_start),
        "ended": _time(trial.datetime_complete),
    }


def _time(time: datetime.datetime | None) -> str | None:
    return time.isoformat(timespec="seconds") if time else None
