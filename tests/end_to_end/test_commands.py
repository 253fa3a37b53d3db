"""The documented commands, typed in a shell: real processes, real training on the embedded digits, shortened."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

SHORT = ("trainer.max_epochs=1", "trainer.accelerator=cpu")
TIMES = {"seconds", "images_per_second", "peak_memory_mb"}
Start = Callable[..., "subprocess.Popen[str]"]
Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `python -m recast_exp` with arguments in an empty folder; what still runs after the test is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "recast_exp", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            process = subprocess.Popen(command, cwd=tmp_path, text=True, env=environment, **pipes)
        finally:
            signal.signal(signal.SIGINT, before)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def program(start: Start) -> Program:
    """Runs it to its end, which must be a good one."""

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        process = start(*arguments)
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return program


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "outputs").glob("*/*")
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_default_run_and_its_evaluation(program: Program, tmp_path: Path) -> None:
    done = program(*SHORT)
    assert "linear probe" in done.stdout
    assert "48 coefficients" in done.stdout
    assert "\r" not in done.stdout + done.stderr  # no progress bar where nobody watches
    run = run_folder(tmp_path)
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files >= {
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        "metrics.json",
        "metrics.csv",
        "parameters.json",
        "task.safetensors",
        "recast_exp.log",
        "plots/learning_curves.png",
        "plots/coefficients.png",
    }
    metrics, parameters = read(run / "metrics.json"), read(run / "parameters.json")
    assert metrics["epochs"] == 1
    assert {"val/accuracy", "val/loss", "test/loss", "probe/test/accuracy", "test/accuracy_per_class/9"} <= set(metrics)
    assert parameters["task_specific"] == parameters["coefficients"] == 48
    assert parameters["task_file_bytes"] == (run / "task.safetensors").stat().st_size

    program("stage=evaluate", f"task={run / 'task.safetensors'}", "hydra.run.dir=evaluated")
    again = read(tmp_path / "evaluated" / "metrics.json")
    tested = {name: value for name, value in metrics.items() if name.startswith("test/")}
    assert {name: value for name, value in again.items() if name.startswith("test/")} == tested


def test_the_paper_in_small(program: Program, tmp_path: Path) -> None:
    short = ("seed=42", *SHORT, "trainer.limit_batches=2", "trainer.num_threads=1")
    done = program("experiment=paper_digits", *short)
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    counts = [read(sweep / str(job) / "parameters.json") for job in range(8)]
    assert [count["coefficients"] for count in counts] == [48, 96, 144, 168, 48, 168, 0, 0]
    assert [bool(count["adapter"]) for count in counts] == [False] * 4 + [True] * 2 + [False] * 2
    labels = [job["label"] for job in read(sweep / "sweep.json")["jobs"]]
    assert labels == [
        *("RECAST-Att", "RECAST-MLP", "RECAST-Att+MLP", "RECAST-ResNet", "RECAST-Att + MeLo", "RECAST-ResNet + CLR"),
        *("linear probe (ViT)", "full fine-tuning (ViT)"),
    ]
    report = (sweep / "report" / "report.md").read_text(encoding="utf-8")
    assert all(label in report for label in labels)
    assert f"Report: {sweep / 'report' / 'report.html'}" in done.stdout
    assert "8 of 8: full fine-tuning (ViT) on digits, seed 42: validation" in done.stderr


def test_reconstruction(program: Program, tmp_path: Path) -> None:
    done = program("stage=reconstruct", "model=vit_att_mlp")
    run = run_folder(tmp_path)
    summary = read(run / "reconstruction.json")
    assert len(summary["layers"]) == 36
    assert Path(summary["bank"]).is_file()
    assert (run / "plots" / "reconstruction.png").stat().st_size > 1000
    assert read(run / "parameters.json")["coefficients"] == 144
    assert summary["relative_error"] < 1e-6 and summary["feature_similarity"] > 1 - 1e-6
    assert "blocks.11.mlp.fc2" in done.stdout


def test_missing_data_leaves_nothing_behind(start: Start, tmp_path: Path) -> None:
    process = start("model=vit_att", "dataset=cub")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 3
    assert len(err.splitlines()) == 1
    assert "CUB_200_2011" in err
    assert not list(tmp_path.iterdir())


def test_a_killed_sweep_continues_to_the_bit(start: Start, program: Program, tmp_path: Path) -> None:
    recipe = ("trainer.max_epochs=4", "trainer.limit_batches=6", "trainer.accelerator=cpu", "probe=false")
    sweep = ("-m", "model=vit_att", "seed=1,2", *recipe)
    folder = tmp_path / "läuft = gut" / "a b"
    odd = f"hydra.sweep.dir={folder.relative_to(tmp_path)}"
    program(*sweep, "hydra.sweep.dir=whole")
    process = start(*sweep, odd)
    checkpoint = folder / "1" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "1" / "metrics.json").exists()
    first = (folder / "0" / "metrics.json").stat().st_mtime_ns

    done = program(*sweep, odd)
    assert "is finished; nothing is left to do" in done.stderr
    assert (folder / "0" / "metrics.json").stat().st_mtime_ns == first
    for job in ("0", "1"):
        whole, killed = (read(parent / job / "metrics.json") for parent in (tmp_path / "whole", folder))
        assert {name for name in whole if whole[name] != killed[name]} <= TIMES
        tensors = [load_file(parent / job / "task.safetensors") for parent in (tmp_path / "whole", folder)]
        assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])
        assert len((folder / job / "metrics.csv").read_text().splitlines()) == 5


def test_an_interrupted_run_says_how_to_continue(start: Start, tmp_path: Path) -> None:
    process = start("trainer.max_epochs=200", "trainer.accelerator=cpu", "probe=false", "hydra.run.dir=stopped")
    deadline = time.monotonic() + 120
    while not (tmp_path / "stopped" / "checkpoints" / "last.ckpt").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resume={tmp_path / 'stopped'}" in err
    assert "Traceback" not in err


def test_a_progress_bar_on_a_terminal(start: Start) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = start(*SHORT, "probe=false", stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait(timeout=60) == 0
    assert b"vit_att:" in shown and b"%|" in shown


def test_trackers(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # no key of W&B's there
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    _, terminal = pty.openpty()  # at which W&B could ask for one, and wait
    options = ("logger=wandb,tensorboard", "seed=1,2", *SHORT, "trainer.limit_batches=2", "probe=false")
    process = start("-m", *options, stdin=terminal)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    offline = [list((sweep / job / "wandb").glob("offline-run-*/*.wandb")) for job in ("0", "1")]
    assert [len(files) for files in offline] == [1, 1]  # a run of its own for each job
    assert len({files[0].name for files in offline}) == 2
    assert out.splitlines()[-1].endswith(f"wandb sync {sweep.relative_to(tmp_path)}/*/wandb/offline-run-*")
    for job in ("2", "3"):
        events = EventAccumulator(str(sweep / job / "tensorboard")).Reload()
        assert set(events.Tags()["scalars"]) == set((sweep / job / "metrics.csv").read_text().split("\n")[0].split(","))
