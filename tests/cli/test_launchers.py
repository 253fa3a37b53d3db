"""`launcher=`: what is refused before anything starts, what stays reachable, and how a lost job is told."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

from recast_exp.cli import launchers
from recast_exp.cli import main as cli
from recast_exp.cli.check import CommandLine, check
from recast_exp.config import grammar


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECAST_EXP_DATA", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["launcher=joblib"], "launcher: got joblib without -m, but it starts the jobs of a sweep .*; add -m"),
        (
            ["-m", "launcher=basic,joblib"],
            "launcher: expected one option, which starts all jobs of a sweep, got basic,joblib",
        ),
        (["-m", "launcher=jobli"], "launcher: expected one of .*, got 'jobli'; did you mean joblib\\?"),
        (
            ["-m", "launcher=joblib", "hydra.launcher.n_job=2"],
            "hydra.launcher.n_job: Key 'n_job' .*; launcher=.*",
        ),
        (["-m", "hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs: Key 'n_jobs' .*; launcher=NAME --cfg hydra .*"),
        (["-m", "launcher=joblib", "trainer=ddp"], "trainer.strategy: expected auto in a sweep, got ddp, .*"),
    ],
)
def test_mistakes_about_launchers(
    argv: list[str], pattern: str, capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    assert cli.run(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"error: {pattern}", line)
    assert not list(empty_folder.iterdir())


@pytest.mark.parametrize("launcher", launchers.PLUGINS)
def test_a_launcher_that_is_not_installed(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("hydra_plugins.") else find(name)
    )
    [line] = check(CommandLine((f"launcher={launcher}", "seed=1,2"), multirun=True)).wrong
    assert f"pip install 'recast-exp[{launcher}]'" in line


def test_slurm_needs_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", "")
    [line] = check(CommandLine(("launcher=slurm",), multirun=True)).wrong
    assert "there is no sbatch here" in line
    assert not check(CommandLine(("launcher=slurm",), inputs=False)).wrong  # --cfg only prints


def test_a_launcher_keeps_its_options_and_is_no_part_of_a_job() -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    found = check(CommandLine(("launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2"), multirun=True))
    assert (found.wrong, found.missing, [planned.settings.seed for planned in found.jobs]) == ([], [], [1, 2])
    assert grammar.without_start(["seed=1", "launcher=joblib", "+launcher=x"]) == ["seed=1"]


def test_what_the_library_of_a_launcher_says_is_one_line() -> None:
    error = type("TerminatedWorkerError", (RuntimeError,), {"__module__": "joblib.externals.loky"})
    said = launchers.lost_job(error("A worker process\nwas killed.\n\nThe exit codes of the workers are {SIGKILL(-9)}"))
    assert said == (
        "launcher: joblib cannot start a job, or lost one (TerminatedWorkerError: A worker process was killed.)"
    )
    assert launchers.lost_job(RuntimeError("a bug")) is None


@pytest.mark.parametrize(
    ("said", "refused"), [("MaxArraySize            = 3\n", True), ("MaxArraySize=4", False), ("", False)]
)
def test_a_cluster_says_how_many_jobs_it_takes(
    said: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("sbatch", ""), ("scontrol", f"printf '{said}'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    wrong = check(CommandLine(("launcher=slurm", "seed=1,2,3,4"), multirun=True)).wrong
    assert [line.partition(" got")[0] for line in wrong] == (
        ["launcher: expected at most 3 jobs of a sweep with launcher=slurm, as this cluster's MaxArraySize is,"]
        if refused
        else []
    )
