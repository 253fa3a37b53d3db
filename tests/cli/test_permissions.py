"""Files and folders of another user: one line names what cannot be opened, and nothing is left out in silence.

A superuser may open everything: the commands give up that right.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from support.fake_sweep import write_sweep

_CODE = """
import contextlib, io, json, sys
from recast_exp.cli.main import run
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = run(arguments)
    found.append((code, said.getvalue()))
print(json.dumps(found))
"""

Commands = Callable[..., list[tuple[int, str]]]


def _obey_permissions() -> None:
    """Give up what lets a superuser open everything: from the next program on, modes of files count."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "prctl")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder; what is in it can be removed afterwards."""
    yield tmp_path
    for path in tmp_path.rglob("*"):
        path.chmod(0o777)


@pytest.fixture
def commands(place: Path) -> Commands:
    """Runs commands one after another in one process, without the rights of a superuser."""
    if not sys.platform.startswith("linux"):
        pytest.skip("how a superuser gives up rights is Linux's own")

    def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=place,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=_obey_permissions if os.geteuid() == 0 else None,
        )

    def run(*given: Sequence[str]) -> list[tuple[int, str]]:
        done = python(_CODE, json.dumps([list(arguments) for arguments in given]))
        assert done.returncode == 0, done.stderr
        return [(code, said) for code, said in json.loads(done.stdout)]

    return run


def closed(folder: Path) -> Path:
    """Make a folder that nobody else may open."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o000)
    return folder


def test_folders_of_the_command_line(place: Path, commands: Commands) -> None:
    folder = closed(place / "closed")
    within = place / "options"
    (within / "model").mkdir(parents=True)
    closed(within / "dataset")
    found = commands(
        ["--config-dir", str(folder), "--help"],
        ["--config-dir", str(folder)],
        ["--config-dir", str(within), "--cfg", "job"],
        ["--config-path", str(folder)],
        ["stage=report", f"path={folder}"],
    )
    denied = "cannot be opened (Permission denied)"
    assert found == [
        (2, f"error: --config-dir: {folder} {denied}\n"),
        (2, f"error: --config-dir: {folder} {denied}\n"),
        (2, f"error: --config-dir: {within / 'dataset'} {denied}\n"),
        (2, f"error: --config-path: {folder} {denied}\n"),
        (3, f"error: path: {folder} {denied}\n"),
    ]


@pytest.mark.parametrize("name", [".", "train/b", "train/b/deep"])
def test_images_that_cannot_be_opened_are_not_left_out(name: str, place: Path, commands: Commands) -> None:
    for split in ("train", "test"):
        for label in "ab":
            (place / "images" / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(place / "images" / split / label / "0.png")
    folder = closed(place / "images" / name)
    [(code, said)] = commands(["dataset=folder", f"dataset.path={place / 'images'}", "stage=check"])
    assert code == 3
    assert said == (
        f"error: dataset.path: {folder} cannot be opened (Permission denied); make it readable, or move it elsewhere\n"
    )
    assert not (place / "outputs").exists()


def test_a_report_says_which_jobs_cannot_be_read(place: Path, commands: Commands) -> None:
    sweep = place / "sweep"
    write_sweep(sweep)
    planned = json.loads((sweep / "sweep.json").read_text())["jobs"][0]["folder"]
    for path in sweep.rglob("*"):
        path.chmod(0o777)
    sweep.chmod(0o777)
    closed(sweep / planned)
    closed(sweep / "elsewhere")
    [(code, said)] = commands(["stage=report", f"path={sweep}"])
    assert (code, said.count("\n")) == (0, 1)
    assert said.startswith("Report: ")
    text = (sweep / "report" / "report.md").read_text()
    assert "damaged: the folder cannot be opened (Permission denied)" in text
    assert "elsewhere: the folder cannot be opened (Permission denied); what is in it is not shown" in text


def test_files_that_a_command_reads_or_writes(place: Path, commands: Commands) -> None:
    task, folder, cache = place / "task.safetensors", closed(place / "run"), place / "cache"
    task.write_bytes(b"nothing")
    task.chmod(0o000)
    cache.mkdir()
    cache.chmod(0o555)
    for (code, said), named in zip(
        commands(
            ["stage=evaluate", f"task={task}"],
            ["stage=evaluate", f"task={folder / task.name}"],
            [f"resume={folder}"],
            [f"model.weights={folder / 'weights.safetensors'}"],
            [f"bank={folder / 'bank.safetensors'}"],
            ["dataset=cub", f"data_dir={folder}"],
            ["model=vit_att", f"cache_dir={cache}"],
        ),
        (
            f"task: {task}",
            f"{folder / task.name}",
            f"resume: {folder}",
            "model.weights: ",
            "bank: ",
            "dataset cub: ",
            f"cache_dir: {cache}",
        ),
        strict=True,
    ):
        assert code in (2, 3)
        assert said.startswith("error: ")
        assert named in said
        assert "ermission" in said
        assert said.count("\n") == 1
    assert not (place / "outputs").exists()
