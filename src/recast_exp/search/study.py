"""Optuna's side of a search: the storage, the study with what it was asked, and a sampler that survives a kill."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import optuna
from hydra.errors import HydraException
from hydra.utils import instantiate
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from recast_exp import schemas
from recast_exp.config import keys
from recast_exp.errors import UserError, first_line

LEFT = 10
"""Seconds after which the lock of a storage counts as left behind."""

STUDY = "recast_exp"
"""Name of the study in its storage. The same in every folder, as Hyperband depends on it."""

METRIC = "val/accuracy"

_REQUEST = "request"


class Settings(TypedDict):
    """The node `hydra.sweeper`, resolved."""

    n_trials: int
    n_jobs: int
    seed: int
    storage: str
    params: dict[str, object] | None
    sampler: dict[str, object]
    pruner: dict[str, object]


class Request(TypedDict):
    """What a study was asked, as its storage keeps it."""

    objective: str
    seed: int
    sampler: dict[str, object]
    pruner: dict[str, object]
    space: dict[str, str]
    config: dict[str, object]


class Reseeded(BaseSampler):
    """Draws that follow from the seed, the trial's number, the parameter, and the trials before.

    A sampler's own generator remembers what this process has sampled, so a search that was killed would go on with
    other values than one that was not. Here each trial has a sampler with a seed of its own.

    Args:
        make: Makes a sampler from a seed.
        seed: Of the whole search.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed

    def _sampler(self, trial: FrozenTrial, parameter: str = "") -> BaseSampler:
        digest = hashlib.sha256(f"{self._seed}/{trial.number}/{parameter}".encode()).digest()
        return self._make(int.from_bytes(digest[:4], "big"))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that are sampled together."""
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        """Draw them."""
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        """Draw one parameter by itself."""
        return self._sampler(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


def check_parts(sampler: dict[str, object], pruner: dict[str, object]) -> None:
    """Make a sampler and a pruner, and let them judge a few trials that nobody ran: some check their options only then.

    Args:
        sampler: The node `hydra.sweeper.sampler`.
        pruner: The node `hydra.sweeper.pruner`.

    Raises:
        UserError: If one cannot be made, is no sampler or pruner, or cannot work with its options.
    """
    quiet()
    parts = {"sampler": sampler, "pruner": pruner}
    for what, node in parts.items():
        for name, value in node.items():
            if name.startswith("n_") and isinstance(value, int) and value < 0:
                raise UserError(f"hydra.sweeper.{what}.{name}: expected an integer ≥ 0, got {value}")
    study = optuna.create_study(sampler=_sampler(sampler, 0), pruner=_pruner(pruner), direction="maximize")
    space: dict[str, BaseDistribution] = {name: FloatDistribution(0, 1) for name in "ab"}
    what = "sampler"
    try:
        for accuracy in (0.1, 0.2, 0.3):
            what = "sampler"
            trial = study.ask(space)
            what = "pruner"
            trial.report(accuracy, 1)
            trial.should_prune()
            study.tell(trial, accuracy)
    except Exception as error:  # a sampler may be anybody's, and fail in any way
        raise UserError(
            f"hydra.sweeper.{what}: {parts[what].get('_target_')} does not work with its options: {first_line(error)}"
        ) from error


def open_study(storage: Path, settings: Settings, content: Mapping[str, object], space: Mapping[str, str]) -> Study:
    """Create a study, or open the one that is there.

    Args:
        storage: Its file.
        settings: The node `hydra.sweeper`.
        content: The configuration that the trials share, as nested mappings, interpolations as they stand.
        space: What is searched, in words, by key.

    Raises:
        UserError: If the study that is there was asked something else, or its file is damaged.
    """
    quiet()
    sampler, pruner = settings["sampler"], settings["pruner"]
    request: Request = {
        "objective": f"maximise {METRIC}",
        "seed": settings["seed"],
        "sampler": sampler,
        "pruner": pruner,
        "space": dict(space),
        "config": _comparable(content, space),
    }
    storage.parent.mkdir(parents=True, exist_ok=True)
    _mend(storage)

    try:
        study = optuna.create_study(
            storage=_storage(storage),
            study_name=STUDY,
            sampler=_sampler(sampler, settings["seed"]),
            pruner=_pruner(pruner),
            direction="maximize",
            load_if_exists=True,
        )
        for trial in study.get_trials(deepcopy=False):
            numbers = [*(trial.values or ()), *trial.intermediate_values.values()]
            if not all(isinstance(number, int | float) for number in numbers):
                raise ValueError(f"trial {trial.number} has results that are no numbers")
            if trial.state == TrialState.COMPLETE and not space.keys() <= trial.params.keys():
                raise ValueError(f"trial {trial.number} has a result, but no settings")
        asked = study.user_attrs.get(_REQUEST)
        if asked is not None:
            asked = schemas.checked(asked, Request)
    except UserError:
        raise
    except Exception as error:  # a log that others have changed can raise anything
        raise UserError(
            f"hydra.sweeper.storage: {storage} cannot be read ({first_line(error)}); start a new search elsewhere"
        ) from error
    if asked is None:
        study.set_user_attr(_REQUEST, request)
    elif lines := list(_differences(asked, request)):
        raise UserError(
            f"hydra.sweep.dir: the search in {storage.parent} was started with {'; '.join(lines)}; go on as it was, or "
            "start a new one in another folder"
        )
    return study


def load_trial(storage: str, number: int) -> Trial | None:
    """The running trial of a job, to report to; None if it has ended, as when its folder is continued by itself.

    Raises:
        UserError: If there is no such trial, or its storage is damaged.
    """
    quiet()
    if not Path(storage).is_file():
        raise UserError(f"search.storage: {storage} is not there; a trial's job needs the storage of its search")
    try:
        study = optuna.load_study(study_name=STUDY, storage=_storage(Path(storage)))
        study.pruner = _recorded_pruner(study.user_attrs[_REQUEST]["pruner"], storage)
        found = [trial for trial in study.get_trials(deepcopy=False) if trial.number == number]
    except UserError:
        raise
    except Exception as error:  # a log that others have changed can raise anything
        raise UserError(
            f"search.storage: expected the storage of a search, got {storage}, which cannot be read "
            f"({first_line(error)}); leave search.storage and search.trial out, which a search sets itself"
        ) from error
    if not found:
        raise UserError(f"search.trial: {storage} has no trial {number}")
    return None if found[0].state.is_finished() else resume_trial(study, found[0])


def resume_trial(study: Study, trial: FrozenTrial) -> Trial:
    """A running trial of the storage, to be continued."""
    return Trial(study, trial._trial_id)


def quiet() -> None:
    """Silence Optuna's own log, and its hints that an option may change in a later version."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def _storage(path: Path) -> JournalStorage:
    # Absolute: the lock is a link to the file, and one that leads nowhere is waited for in vain
    file = str(path.absolute())
    # It is held for milliseconds; one that is older was left by a killed process
    return JournalStorage(JournalFileBackend(file, JournalFileSymlinkLock(file, grace_period=LEFT)))


def _mend(storage: Path) -> None:
    """Cut off a last line that was not written to its end; what is appended to it would be lost with it."""
    if storage.is_file() and (content := storage.read_bytes()) and not content.endswith(b"\n"):
        with storage.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _sampler(node: dict[str, object], seed: int) -> BaseSampler:
    def make(seed: int) -> BaseSampler:
        made = _make("sampler", node, seed=seed)
        if not isinstance(made, BaseSampler):
            raise _unexpected("sampler", node)
        return made

    make(0)
    return Reseeded(make, seed)


def _pruner(node: dict[str, object]) -> BasePruner:
    made = _make("pruner", node)
    if not isinstance(made, BasePruner):
        raise _unexpected("pruner", node)
    return made


def _make(what: str, node: dict[str, object], **more: object) -> object:
    try:
        return instantiate(node, **more)
    except (HydraException, TypeError, ImportError) as error:  # an option that it does not take, a package of its own
        reason = first_line(error.__cause__ or error)
        raise UserError(f"hydra.sweeper.{what}: {node.get('_target_')} cannot be made: {reason}") from error


def _unexpected(what: str, node: dict[str, object]) -> UserError:
    return UserError(f"hydra.sweeper.{what}: expected a {what} of Optuna, got {node.get('_target_')}")


def _recorded_pruner(node: object, storage: str) -> BasePruner:
    """The pruner that a storage names. Others may have written it: it is a pruner of Optuna, or of pruners of Optuna.

    Raises:
        UserError: If it is anything else, or does not take its options.
    """
    content = dict(node) if isinstance(node, Mapping) else {}
    target = str(content.pop("_target_", node))
    module, _, name = target.rpartition(".")
    listed = module == "optuna.pruners" and name in optuna.pruners.__all__
    kind = getattr(optuna.pruners, name) if listed else None
    if not (isinstance(kind, type) and issubclass(kind, BasePruner)):
        raise UserError(f"search.storage: {storage} names the pruner {target[:80]!r}; expected one of optuna.pruners")
    options = {
        option: _recorded_pruner(value, storage) if isinstance(value, Mapping) else value
        for option, value in content.items()
    }
    try:
        return kind(**options)
    except Exception as error:  # what a class says of values that no user has typed
        raise UserError(f"search.storage: {storage} names options that {target} does not take") from error


def _comparable(content: Mapping[str, object], space: Mapping[str, str]) -> dict[str, object]:
    """The deciding keys that the trials share."""
    searched = {key.lstrip("+") for key in space}
    return {key: value for key, value in keys.leaves(content) if key not in searched and keys.decides(key)}


def _differences(asked: Request, request: Request) -> Iterator[str]:
    for name in ("objective", "seed", "sampler", "pruner"):
        if asked[name] != request[name]:
            yield f"{name} {asked[name]}, not {request[name]}"
    before, now = asked["space"], request["space"]
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            yield f"{key}={before.get(key, 'no sweep')}, not {now.get(key, 'no sweep')}"
    searched = {*before, *now}
    for key, (was, got) in keys.differences(asked["config"], request["config"]).items():
        if key not in searched:
            yield f"{key}={keys.shown(was)}, not {keys.shown(got)}"
