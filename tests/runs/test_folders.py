"""Folders that hold something else: nothing that is there is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from recast_exp.cli import main as cli
from recast_exp.files import locked
from recast_exp.runs import layout

QUICK = ("model.pretrained=false", "logger=none", "probe=false", "training=joint", "trainer.max_epochs=1")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.name != layout.LOCK
    }


def newer(name: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"format": 2, "what": "is not known yet"}))

    return make


def made(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).mkdir(parents=True)


def written(name: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")

    return make


CASES = {
    "a run of a newer version": (newer("job.json"), False, "job.json has format 2, this version reads up to 1"),
    "a sweep of a newer version": (newer("sweep.json"), True, "sweep.json has format 2, this version reads up to 1"),
    "a job of a newer version": (newer("0/job.json"), True, "job.json has format 2, this version reads up to 1"),
    "a run in a sweep": (written("sweep.json"), False, "is the folder of a sweep; choose a new one"),
    "a sweep in a run": (written("job.json"), True, "is the folder of a run; choose a new one"),
    "a file for a job": (written("1"), True, "/1, got a file; move it, or choose a new folder"),
    "a folder for a record": (made("0/job.json"), True, "expected a file in FOLDER/0/job.json, got a folder; move it"),
    "a pipe for a file": (
        lambda folder: os.mkfifo(folder / "predictions.csv"),
        *(False, "expected a file in FOLDER/predictions.csv, got a pipe or device"),
    ),
    "a folder for the list of jobs": (made("sweep.json"), True, "expected a file in FOLDER/sweep.json, got a folder"),
    "a folder for Hydra's list": (made("multirun.yaml"), True, "expected a file in FOLDER/multirun.yaml, got a folder"),
    **{
        f"a folder for {name}": (made(name), False, f"expected a file in FOLDER/{name}, got a folder; move it")
        for name in (
            *("job.json", "metrics.json", "parameters.json", "metrics.csv", "task.safetensors", "predictions.csv"),
            *("dataset.json", "checkpoints/last.ckpt", ".lock"),
        )
    },
    **{
        f"a file for {name}": (written(name), False, f"expected a folder in FOLDER/{name}, got a file; move it")
        for name in ("plots", "checkpoints", ".hydra")
    },
}


@pytest.mark.parametrize(
    "name",
    [
        *("plots", "metrics.json", "checkpoints", "report", "0", "recast_exp.log", ".hydra/config.yaml"),
        *("export/config.json", "runs/linear_probe/1/predictions.csv"),
    ],
)
def test_links_are_not_followed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    (folder / name).parent.mkdir(parents=True)
    victim.mkdir()
    (folder / name).symlink_to(victim)
    before = sorted(folder.rglob("*"))
    place = ["-m", "seed=1,2", f"hydra.sweep.dir={folder}"] if name == "0" else ["seed=1", f"hydra.run.dir={folder}"]
    assert cli.run([*QUICK, f"cache_dir={tmp_path.parent / 'cache'}", *place]) == 2
    assert f"{folder / name}" in capsys.readouterr().err
    assert not list(victim.iterdir())
    assert sorted(folder.rglob("*")) == before


def test_the_links_of_wandb_are_its_own(tmp_path: Path) -> None:
    for below in (".", "runs/linear_probe/1"):
        folder = tmp_path / below / "wandb"
        (folder / "offline-run").mkdir(parents=True)
        (folder / "latest-run").symlink_to("offline-run")
    assert layout.in_the_way(tmp_path) is None


@pytest.mark.parametrize("case", CASES)
def test_what_is_there_stays(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, in_sweep, line = CASES[case]
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    before = contents(tmp_path)
    place = ["-m", "seed=1,2", f"hydra.sweep.dir={folder}"] if in_sweep else ["seed=1", f"hydra.run.dir={folder}"]
    assert cli.run([*QUICK, f"cache_dir={tmp_path.parent / 'cache'}", *place]) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and line.replace("FOLDER", str(folder)) in errors[0]
    assert contents(tmp_path) == before


def test_a_folder_in_which_a_job_runs_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    with locked(folder / layout.LOCK, "the test"):
        before = contents(folder)
        command = [*QUICK, f"cache_dir={tmp_path / 'cache'}", "seed=2", f"hydra.run.dir={folder}"]
        assert cli.run(command) == 2
        assert contents(folder) == before == {}
    assert "error: hydra.run.dir: a job is running in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["..", ".", "", "../..", ".hidden", "a/b", "é" * 200, "x" * 300, "plain + name, 1"])
def test_a_name_becomes_one_folder_within(name: str, tmp_path: Path) -> None:
    folder = layout.compared(tmp_path, name)
    folder.mkdir(parents=True)
    assert folder.resolve().parent == (tmp_path / "runs").resolve()
    assert len(folder.name.encode()) <= 100
    assert layout.compared(tmp_path, f"{name}x") != folder
