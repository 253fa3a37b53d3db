"""The search: its trials with jobs that cost nothing, then through the command line as a user starts it."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from optuna.storages import JournalStorage

from conftest import TINY, Run
from recast_exp.cli import main as cli
from recast_exp.cli.check import CommandLine, check
from recast_exp.config import grammar as overrides
from recast_exp.config.compose import Composer
from recast_exp.config.schema import typed
from recast_exp.errors import Pruned, UserError
from recast_exp.experiment import adaptation
from recast_exp.search import run
from recast_exp.search.pruning import Pruning
from recast_exp.search.space import Parameter
from recast_exp.search.study import STUDY, _storage
from recast_exp.training.loop import fit
from support.helpers import assert_one_line

SPACE = (
    "optimizer.lr=tag(log,interval(1e-4,1e-1))",
    "scheduler.step_size=int(interval(1,40))",
    "model=vit_att,vit_mlp",
)
PREFLIGHT = cli._preflight
EFFECTIVE = "training=joint", "scheduler=step"
FEW = {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 2}
Objective = Callable[[int, dict[str, str]], Any]
Search = Callable[..., dict[str, Any]]


def objective(trial: int, values: dict[str, str]) -> float:
    """Its maximum is 1, at a rate of 0.01, 20 epochs and vit_mlp."""
    distance = abs(math.log10(float(values["optimizer.lr"])) + 2) + abs(int(values["scheduler.step_size"]) - 20) / 20
    return 1 - distance / 4 - (0.2 if values["model"] == "vit_att" else 0)


class Functions(Launcher):
    """Launches calls of a function, in no time: composing a job takes Hydra a tenth of a second."""

    def __init__(self, function: Objective) -> None:
        self.function = function
        self.batches: list[list[int]] = []

    def setup(self, **kwargs: Any) -> None:
        raise NotImplementedError

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        numbers = list(range(initial_job_idx, initial_job_idx + len(job_overrides)))
        self.batches.append(numbers)
        returns = []
        for number, texts in zip(numbers, job_overrides, strict=True):
            values = dict(text.split("=", 1) for text in texts)
            assert int(values["search.trial"]) == number
            returned = JobReturn(overrides=texts, status=JobStatus.COMPLETED)
            try:
                returned.return_value = self.function(number, values)
            except Exception as error:  # as Hydra's run_job
                returned.return_value, returned.status = error, JobStatus.FAILED
            returns.append(returned)
        return returns


@pytest.fixture(autouse=True)
def a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["recast_exp"])
    monkeypatch.setattr(cli, "_preflight", lambda findings: [])  # timm's part of the check, tested elsewhere
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


@pytest.fixture(scope="session")
def composer() -> Composer:
    return Composer()


@pytest.fixture
def search(composer: Composer) -> Search:
    """Runs a search in a folder; what search.json says."""
    composed, whole = composer.compose(["search=optuna"]), composer.whole(["search=optuna"])

    def search(
        launched: Objective | Launcher, folder: str, *, space: Sequence[str] = SPACE, keys: Any = None, **settings: Any
    ) -> dict[str, Any]:
        plain = OmegaConf.to_container(composed.cfg, resolve=False)
        content = OmegaConf.to_container(OmegaConf.merge(plain, keys or {}), resolve=False)
        assert isinstance(content, dict)
        nodes = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name in whole.hydra.sweeper
            if name != "storage"
            for value in [whole.hydra.sweeper[name]]
        }
        node = {**nodes, "storage": f"{folder}/optuna.log", "n_trials": 6, **settings}
        launcher = launched if isinstance(launched, Launcher) else Functions(launched)
        found = run.search(content, "", node, ["search=optuna", *space], Path(folder), launcher, composer.loader)
        assert found == json.loads(Path(folder, "search.json").read_text())
        return found

    return search


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    """The content of search.json without its times."""
    return {
        **found,
        "best": {**found["best"], "started": "", "ended": ""},
        "trials": [{**trial, "started": "", "ended": ""} for trial in found["trials"]],
    }


def test_the_optimum_of_a_known_function_is_found(search: Search) -> None:
    found = search(objective, "a", n_trials=30)
    best = found["best"]
    values = [trial["value"] for trial in found["trials"]]
    assert best["parameters"]["model"] == "vit_mlp"
    assert best["value"] == max(values) > 0.9
    assert statistics.fmean(values[20:]) > statistics.fmean(values[:10]) + 0.1  # the first ten are drawn at random
    assert [trial["number"] for trial in found["trials"]] == list(range(30))
    assert all(1e-4 <= float(trial["parameters"]["optimizer.lr"]) <= 1e-1 for trial in found["trials"])
    assert len({trial["parameters"]["optimizer.lr"] for trial in found["trials"]}) > 25  # no draw is just repeated


@pytest.mark.parametrize("moment", ["in a job", "in a draw", "in a line of the storage"])
def test_a_killed_search_goes_on_as_if_nothing_had_happened(search: Search, moment: str) -> None:
    undisturbed = search(objective, "a", sampler=FEW)

    def kill(trial: int, values: dict[str, str]) -> float:
        if trial == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return objective(trial, values)

    def child() -> None:
        if moment == "in a draw":
            write, calls = JournalStorage.set_trial_param, []

            def set_trial_param(self: JournalStorage, *args: Any) -> None:
                calls.append(args)
                if len(calls) == 3 * len(SPACE) + 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                write(self, *args)

            JournalStorage.set_trial_param = set_trial_param  # type: ignore[method-assign]
        search(kill, "b", sampler=FEW)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if moment == "in a line of the storage":
        with Path("b/optuna.log").open("a") as file:
            file.write('{"op_code":8,"worker')
    launcher = Functions(objective)
    assert lasting(search(launcher, "b", sampler=FEW)) == lasting(undisturbed)
    assert launcher.batches == [[3], [4], [5]]


def left(trial: int | None, **changes: Any) -> dict[str, Any]:
    """What a job leaves in its folder."""
    record = {
        "format": 1, "state": "finished", "reason": None, "exit_code": None, "number": trial, "label": "",
        "stage": "adapt", "dataset": "digits", "seed": 42, "overrides": [], "config": {"search": {"trial": trial}},
        "started": "", "updated": "", "epoch": 1, "epochs": 1, "val/accuracy": None,
    }  # fmt: skip
    return record | changes


def test_the_lock_of_a_killed_process_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recast_exp.search.study.LEFT", 3)
    path = tmp_path / "optuna.log"
    optuna.create_study(study_name=STUDY, storage=_storage(path))
    (tmp_path / "optuna.log.lock").symlink_to(path)
    started = time.monotonic()
    study = optuna.load_study(study_name=STUDY, storage=_storage(path))
    study.ask()
    assert time.monotonic() - started < 30
    assert len(study.trials) == 1


def test_two_searches_at_once_on_one_storage_are_refused(search: Search, tmp_path: Path) -> None:
    storage = str(tmp_path / "shared" / "optuna.log")
    refused: list[str] = []

    def meanwhile(trial: int, values: dict[str, str]) -> float:
        if not refused:
            with pytest.raises(UserError) as error:
                search(objective, "second", storage=storage)
            refused.append(str(error.value))
        return objective(trial, values)

    found = search(meanwhile, "first", storage=storage)
    assert refused[0].startswith(f"hydra.sweeper.storage: a search is running on {storage}; wait for it")
    assert [trial["state"] for trial in found["trials"]] == ["finished"] * 6
    assert len(search(objective, "second", storage=storage)["trials"]) == 6


def test_what_another_sweep_left_in_the_folder_does_not_count(search: Search) -> None:
    for number, trial in ((0, None), (1, 0)):  # a grid's job; another trial's
        Path("a", str(number)).mkdir(parents=True)
        Path("a", str(number), "job.json").write_text(json.dumps(left(trial)))
        Path("a", str(number), "metrics.json").write_text(json.dumps({"val/accuracy": 0.99}))
    found = search(lambda *_: None, "a", n_trials=2)
    assert [trial["state"] for trial in found["trials"]] == ["failed", "failed"]


def test_what_a_killed_job_left_in_its_folder_counts(search: Search) -> None:
    search(lambda *_: 0.5, "a", n_trials=1)

    def kill(trial: int, values: dict[str, str]) -> float:
        if trial == 1:  # in a batch of three
            for number, name, content in (
                (1, "metrics.json", {"val/accuracy": 0.75, "test/accuracy": 0.1}),
                (1, "job.json", left(1, state="finished")),
                (2, "job.json", left(2, state="skipped", reason="pruned early")),
                (3, "job.json", left(3, state="failed", reason="no memory", exit_code=1)),
                (4, "job.json", left(4, state="running")),
            ):
                Path("a", str(number)).mkdir(exist_ok=True)
                Path("a", str(number), name).write_text(json.dumps(content))
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        search(kill, "a", n_trials=5, n_jobs=5)
    launcher = Functions(lambda *_: 0.5)
    found = search(launcher, "a", n_trials=5)
    assert launcher.batches == [[4]]
    assert [trial["state"] for trial in found["trials"]] == ["finished", "finished", "pruned", "failed", "finished"]
    assert (found["best"]["number"], found["best"]["value"]) == (1, 0.75)
    assert found["trials"][2]["reason"] == "pruned early"


def test_trials_are_launched_together(search: Search) -> None:
    launcher = Functions(objective)
    found = search(launcher, "a", n_trials=7, n_jobs=3)
    assert launcher.batches == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(found["trials"]) == 7


def test_a_changed_search_is_refused_and_a_longer_one_goes_on(search: Search) -> None:
    before = search(objective, "a", n_trials=2)
    changed = ("optimizer.lr=interval(1e-4,1e-1)", *SPACE[1:])
    with pytest.raises(UserError) as error:
        search(objective, "a", space=changed, keys={"optimizer": {"momentum": 0.5}}, seed=7, n_trials=2)
    assert_one_line(
        error,
        "hydra.sweep.dir: the search in a was started with seed 42, not 7; ",
        "optimizer.lr=tag(log,interval(0.0001,0.1)), not interval(0.0001,0.1); ",
        "optimizer.momentum=0.9, not 0.5; ",
    )
    with pytest.raises(UserError, match=r"model=choice\(vit_att,vit_mlp\), not no sweep"):
        search(objective, "a", space=SPACE[:2])
    longer = search(objective, "a", keys={"data_dir": "elsewhere", "dataset": {"num_workers": 1}}, n_trials=3)
    assert longer["trials"][:2] == before["trials"]
    assert len(longer["trials"]) == 3


def test_failed_trials_are_recorded_and_the_search_goes_on(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    def task(trial: int, values: dict[str, str]) -> Any:
        if trial == 1:
            raise UserError("dataset.path: nothing there")
        if trial == 2:
            raise RuntimeError("out of memory\nwith details")
        return {3: None, 4: math.nan}.get(trial, 0.5)

    found = search(task, "a")
    assert [trial["state"] for trial in found["trials"]] == ["finished", *["failed"] * 4, "finished"]
    assert [trial["reason"] for trial in found["trials"][1:5]] == [
        "dataset.path: nothing there",
        "RuntimeError: out of memory",
        "the job returned None, expected a number, val/accuracy",
        "the job returned nan, expected a number, val/accuracy",
    ]
    assert "Trial 2 (6 in all): failed: RuntimeError: out of memory" in capsys.readouterr().err
    assert [trial["exit_code"] for trial in found["trials"]] == [None, 2, 1, 1, 1, None]
    launcher = Functions(task)
    assert search(launcher, "a") == found
    assert launcher.batches == []


def test_the_command_line_searches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    jobs: list[DictConfig] = []

    def task(cfg: DictConfig) -> float:
        jobs.append(cfg)
        if cfg.search.trial == 1:
            raise UserError("dataset.path: nothing there")
        return 1 - float(cfg.optimizer.lr)

    monkeypatch.setattr(cli.JobRunner, "__call__", lambda self, cfg: task(cfg))
    argv = ["-m", "search=optuna", "hydra.sweep.dir=a b", "hydra.sweeper.n_trials=2", "hydra/sweeper/pruner=hyperband"]
    argv += EFFECTIVE
    assert cli.run([*argv, *SPACE, "dataset.classes=['5', '6']"]) == 2  # the exit code of the trial that failed
    found = json.loads(Path("a b/search.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["finished", "failed"]
    assert [path.name for path in sorted(Path("a b").glob("[0-9]"))] == ["0", "1"]
    assert [job.search.storage for job in jobs] == [str(Path("a b/optuna.log").absolute())] * 2
    best = found["best"]
    assert best["command"] in capsys.readouterr().out
    # A changed search is refused: no table, and its report is the one of before
    report = Path("a b/report/report.md").stat().st_mtime_ns
    assert cli.run([*argv, "hydra.sweeper.seed=7", *SPACE]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert Path("a b/report/report.md").stat().st_mtime_ns == report
    # The command runs that setting by itself: no search, the same values
    findings = check(CommandLine(tuple(shlex.split(best["command"])[3:])))
    assert (findings.wrong, findings.missing) == ([], [])
    [alone] = [planned.settings for planned in findings.jobs]
    first = typed(jobs[0])
    assert (alone.optimizer, alone.dataset, alone.model) == (first.optimizer, first.dataset, first.model)
    assert alone.search.trial is None


def test_a_trial_without_settings_is_not_taken_for_the_job_in_its_folder(search: Search) -> None:
    """As those are that stand in a storage twice."""

    search(objective, "a", n_trials=1)
    storage = Path("a/optuna.log")
    storage.write_text(storage.read_text() * 2)
    Path("a/1").mkdir(parents=True)
    Path("a/1/job.json").write_text(json.dumps(left(1, state="finished")))
    Path("a/1/metrics.json").write_text(json.dumps({"val/accuracy": 0.99}))
    found = search(objective, "a", n_trials=2)
    assert [bool(trial["parameters"]) for trial in found["trials"]] == [True, True]


def _changed(lines: list[str], op_code: int, **entries: Any) -> list[str]:
    """The lines of a storage, the first of a kind with other entries."""
    at = next(at for at, line in enumerate(lines) if json.loads(line)["op_code"] == op_code)
    return [*lines[:at], json.dumps(json.loads(lines[at]) | entries), *lines[at + 1 :]]


@pytest.mark.parametrize(
    "damage",
    {
        "a list": lambda lines: [*lines[:3], "[]", *lines[3:]],
        "nothing": lambda lines: [*lines[:3], "null", *lines[3:]],
        "an unknown operation": lambda lines: [*lines, json.dumps(json.loads(lines[-1]) | {"op_code": 99})],
        "a request that is text": lambda lines: _changed(lines, 2, user_attr={"request": "x"}),
        "an empty request": lambda lines: _changed(lines, 2, user_attr={"request": {}}),
        "a distribution": lambda lines: _changed(lines, 5, distribution="x"),
        "results without settings": lambda lines: [line for line in lines if json.loads(line)["op_code"] != 5],
        "a value that is text": lambda lines: _changed(lines, 6, values=["x"]),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_storage_that_others_have_changed_is_one_line(
    damage: tuple[str, Callable[[list[str]], list[str]]], search: Search
) -> None:
    search(objective, "a", n_trials=2)
    storage = Path("a/optuna.log")
    changed = damage[1](storage.read_text().splitlines())
    storage.write_text("\n".join(changed) + "\n")
    with pytest.raises(UserError, match=r"^hydra.sweeper.storage: a/optuna.log cannot be read \(.*elsewhere$") as error:
        search(objective, "a", n_trials=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["hydra.sweeper.sampler.n_startup_trials=-1"], "sampler.n_startup_trials: expected an integer ≥ 0, got -1"),
        (
            ["+hydra.sweeper.sampler.temperature=1"],
            "sampler: .*TPESampler cannot be made: .*'temperature'",
        ),
        (["hydra.sweeper.sampler._target_=optuna.pruners.NopPruner"], "sampler: .* cannot be made: .*"),
        (["hydra.sweeper.sampler=3"], "sampler: expected a class of Optuna and its options, got 3"),
        (["hydra.sweeper.pruner=null"], "pruner: expected a class of Optuna and its options, got None"),
        (
            ["hydra/sweeper/pruner=hyperband", "hydra.sweeper.pruner.min_resource=0"],
            "pruner: optuna.pruners.HyperbandPruner does not work with its options: .*zero.*",
        ),
        (
            ["hydra/sweeper/pruner=hyperband", "hydra.sweeper.pruner.max_resource=${nothing}"],
            "pruner: .*'nothing' not found.*",
        ),
        (["hydra.sweeper.storage=folder"], "storage: expected a file, got folder, which is a folder"),
    ],
)
def test_a_search_that_cannot_work_leaves_nothing(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    assert cli.run(["-m", "search=optuna", "hydra.sweep.dir=a", *EFFECTIVE, *options, *SPACE]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(rf"error: hydra\.sweeper\.{says}\n", told), told
    assert not Path("a").exists()


@pytest.mark.parametrize(
    ("searched", "reason"),
    [
        (["optimizer.lr=interval(1e-4,1e-1)"], "optimizer.lr: .*: what trains has optimizer.coefficients_lr instead"),
        (["optimizer.lr=1e-4,1e-1", "model=vit_frozen"], "optimizer.lr: .*: what trains has a solved head instead"),
        (["scheduler.step_size=int(interval(5,30))"], "scheduler.step_size: .*: scheduler=cosine has no steps"),
        (["optimizer.adapter_lr=interval(0.1,0.2)"], "optimizer.adapter_lr: .*: there is no adapter to train"),
        (
            ["optimizer.coefficients_lr=0.1,0.2", "model=vit_frozen"],
            "optimizer.coefficients_lr: .*: there is no .*",
        ),
    ],
)
def test_a_key_without_effect_is_not_searched_over(searched: list[str], reason: str, weights: dict[str, Path]) -> None:
    found = check(CommandLine(("search=optuna", *searched, f"model.weights={weights['digits_vit']}"), multirun=True))
    assert found.wrong == []
    [error] = PREFLIGHT(found)
    assert re.fullmatch(reason, str(error))


def test_a_key_with_an_effect_on_some_of_the_models_is_searched_over(weights: dict[str, Path]) -> None:
    typed = ("search=optuna", "optimizer.coefficients_lr=0.1,0.2", "model=vit_frozen,vit_att")
    found = check(CommandLine((*typed, f"model.weights={weights['digits_vit']}"), multirun=True))
    assert found.wrong == []
    assert PREFLIGHT(found) == []


def test_a_trial_is_pruned_for_real(weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "test", lambda *args: pytest.fail("the test images of a pruned trial were read"))
    own = [text for text in TINY if not text.startswith("probe")]
    argv = [
        "search=optuna", "hydra.sweep.dir=a", "hydra.sweeper.n_trials=1", "hydra/sweeper/pruner=none", "-m",
        "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner", "+hydra.sweeper.pruner.lower=0.999",
        "optimizer.lr=1e-3,1e-2",
        *own, f"model.weights={weights['digits_vit']}",
    ]  # fmt: skip
    assert cli.run(argv) == 0
    found = json.loads(Path("a/search.json").read_text())
    [trial] = found["trials"]
    assert trial["state"] == "pruned"
    assert re.fullmatch(r"pruned after epoch 1 of 2 at [\d.]+ % validation accuracy", trial["reason"])
    assert list(trial["epochs"]) == ["1"]
    assert found["best"] is None
    assert not Path("a/0/metrics.json").exists()
    assert not Path("a/0/task.safetensors").exists()
    record = json.loads(Path("a/0/job.json").read_text())
    assert (record["state"], record["reason"], record["exit_code"]) == ("pruned", trial["reason"], None)
    assert len(Path("a/0/metrics.csv").read_text().splitlines()) == 2
    assert "Traceback" not in Path("a/0/recast_exp.log").read_text()


def test_a_pruned_run_stays_pruned_and_reports_each_epoch_once(build: Callable[..., Run], tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=2, n_warmup_steps=2))
    trial = study.ask()

    def train() -> Pruning:
        run = build("trainer.max_epochs=4", "trainer.limit_batches=1")
        pruning = Pruning(trial)
        fit(run.recipe, run.adapted, run.data, run_dir=tmp_path, more=[pruning])
        return pruning

    with pytest.raises(Pruned) as error:
        train().check(4)
    assert error.value.epoch == 2
    before = dict(study.trials[0].intermediate_values)
    assert list(before) == [1, 2]
    again = train()  # killed before it could say that it was pruned
    assert again.epoch == 2
    assert study.trials[0].intermediate_values == before
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_mistakes_are_said_before_anything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    typed = {
        "optimizer.lr=interval(0,1)": "optimizer.lr: expected a number > 0, got 0.0",
        "optimizer.momentum=interval(0.5,1)": "optimizer.momentum: expected a number ≥ 0 and < 1, got 1.0",
        "dataset.batch_size=range(0,9,8)": "dataset.batch_size: expected an integer ≥ 1, got 0",
        "trainer.max_epochs=interval(2,9)": "trainer.max_epochs: expected integers, as in int(interval(2,9)), "
        "got interval(2.0,9.0)",
        "optimizer.adapter_lr=interval(1,0.1)": "optimizer.adapter_lr: expected the lower end first, "
        "got interval(1.0,0.1)",
        "optimizer.weight_decay=tag(log,interval(0,1))": "optimizer.weight_decay: expected an interval above 0 "
        "for tag(log, ...), got tag(log,interval(0.0,1.0))",
        "model=vit_att,vit_at": "model: expected one of vit_att, ",
        "seed=1,2": "seed: cannot be searched over (the luckiest seed would win); expected a single value",
        "stage=check": "stage: expected adapt in a search, which goes by validation accuracy, got check",
        "probe=true": "probe: expected false in a search, got true, which would test the probe before a trial is "
        "stopped",
        "search.trial=1": "search.trial: the search sets it itself; leave it out",
        "hydra.sweeper.n_trials=0": "hydra.sweeper.n_trials: expected an integer ≥ 1, got 0",
    }
    assert cli.run(["-m", "search=optuna", *typed]) == 2
    lines = capsys.readouterr().err.splitlines()
    for line in typed.values():
        assert any(found.startswith(f"error: {line}") for found in lines), (line, lines)
    assert len(lines) == len(typed)
    assert cli.run(["-m", "search=optuna", "optimizer.lr=1e-3"]) == 2
    assert capsys.readouterr().err.startswith("error: search: expected at least one sweep")
    assert not list(Path().iterdir())


def test_options_that_do_not_fit_each_other_are_found() -> None:
    line = CommandLine(("search=optuna", "model=vit_frozen,vit_full", "adapter=melo,none", *SPACE[:2]), multirun=True)
    assert check(line).wrong == [
        "adapter: expected none with model=vit_full, which trains every weight, got melo "
        "(where model=vit_full adapter=melo)"
    ]


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    assert cli.run(["-m", "search=optuna", *SPACE]) == 2
    assert capsys.readouterr().err == "error: search: Optuna is not installed; pip install 'recast-exp[search]'\n"


@pytest.mark.parametrize(
    ("text", "ends", "distribution"),
    [
        ("a=interval(1,2)", ["1.0", "2.0"], optuna.distributions.FloatDistribution(1, 2)),
        ("a=tag(log,int(interval(1,64)))", ["1", "64"], optuna.distributions.IntDistribution(1, 64, log=True)),
        ("a=range(8,33,8)", ["8", "32"], optuna.distributions.IntDistribution(8, 32, step=8)),
        ("a=range(8,32,8)", ["8", "24"], optuna.distributions.IntDistribution(8, 24, step=8)),
        ("a=range(0.5,2,0.5)", ["0.5", "1.5"], optuna.distributions.FloatDistribution(0.5, 1.5, step=0.5)),
        ("a=x,y,x", ["x", "y"], optuna.distributions.CategoricalDistribution(("x", "y"))),
        ("a=0.1,null", ["0.1", "null"], optuna.distributions.CategoricalDistribution(("0.1", "null"))),
    ],
)
def test_the_grammar_of_a_space(text: str, ends: list[str], distribution: object) -> None:
    override = overrides.parse(text)
    assert override is not None
    parameter = Parameter.parse(override)
    assert parameter.ends == ends
    assert parameter.distribution() == distribution
