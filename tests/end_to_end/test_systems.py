"""Machines that are not at hand, simulated: terminals without Unicode, no reader, Windows, small containers, locks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from recast_exp.config.compose import Composer
from recast_exp.config.schema import ModelConfig, typed
from recast_exp.data.datamodule import ImageDataModule
from recast_exp.data.store import _write
from recast_exp.files import alone_at, locked
from recast_exp.models.create import input_spec
from recast_exp.runs import record as job_record
from support.helpers import load

TINY = ("model.pretrained=false", "logger=none", "trainer.max_epochs=1", "dataset.shots=2", "head=lda", "probe=false")


def command(*words: str, program: str = "-m recast_exp") -> list[str]:
    return [sys.executable, *program.split(" ", 1), *TINY, *words]


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return found


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = command("hydra.run.dir=run", "label=μ · ±")
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert "Task: " in done.stdout.decode("ascii")
    assert record(tmp_path / "run")["state"] == "finished"


def test_what_other_programs_have_set(tmp_path: Path) -> None:
    """A backend of plots that is not there, and ranks that are no numbers."""
    run = command("hydra.run.dir=within/../run")  # and a folder that is not where its first part is
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert record(tmp_path / "run")["state"] == "finished"
    assert list((tmp_path / "run" / "plots").iterdir())
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        done = subprocess.run(
            command(), cwd=tmp_path, env=os.environ | {name: "abc"}, capture_output=True, text=True, check=False
        )
        line = f"error: {name}: expected an integer, got 'abc'; unset this environment variable\n"
        assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.parametrize("sweep", [False, True])
def test_a_reader_that_goes_away(sweep: bool, tmp_path: Path) -> None:
    """As `… | head -1` does."""
    place = ["-m", "seed=1,2", "hydra.sweep.dir=run"] if sweep else ["hydra.run.dir=run"]
    with subprocess.Popen(command(*place), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert "BrokenPipe" not in errors and "Traceback" not in errors
    if sweep:
        assert (tmp_path / "run" / "report" / "report.html").is_file()
    for folder in [tmp_path / "run" / "0", tmp_path / "run" / "1"] if sweep else [tmp_path / "run"]:
        assert record(folder)["state"] == "finished"


FULL = Path("/dev/full")
LOST = "error: the output of this command cannot be written (No space left on device); print it to another place\n"


@pytest.mark.skipif(not FULL.exists(), reason="Linux has this device")
@pytest.mark.parametrize("words", [("--help",), ("--version",), ("--cfg", "job"), ("stage=report", "path=.")])
def test_output_to_a_full_disk(words: tuple[str, ...], tmp_path: Path) -> None:
    with FULL.open("w") as full:
        run = [sys.executable, "-m", "recast_exp", *words]
        done = subprocess.run(run, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    if words[0] == "stage=report":  # there are no runs: what is wrong is said, not that it cannot be printed
        assert (done.returncode, done.stderr.count("\n")) != (0, 0) and LOST not in done.stderr
    else:
        assert (done.returncode, done.stderr) == (2, LOST)


@pytest.mark.skipif(not FULL.exists(), reason="Linux has this device")
def test_a_run_that_cannot_print_is_whole(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        run = command("hydra.run.dir=run")
        done = subprocess.run(run, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and done.stderr.endswith(LOST)
    assert record(tmp_path / "run")["state"] == "finished"
    assert (tmp_path / "run" / "task.safetensors").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such shell")
def test_output_that_is_closed(tmp_path: Path) -> None:
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command("hydra.run.dir=run")]
    assert subprocess.run(closed, cwd=tmp_path, timeout=120, check=False).returncode == 0
    assert record(tmp_path / "run")["state"] == "finished"


@pytest.mark.parametrize(
    ("name", "library"),
    [("HF_HUB_DOWNLOAD_TIMEOUT", "huggingface_hub"), ("TIMM_FUSED_ATTN", "timm"), ("TQDM_MININTERVAL", "tqdm")],
)
def test_variables_that_a_library_cannot_read(name: str, library: str, tmp_path: Path) -> None:
    environment = {"OTHER": "abc"} | os.environ | {name: "abc"}
    done = subprocess.run(command(), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {name}: {library} cannot read the value 'abc' (")
    assert list(tmp_path.iterdir()) == []


def test_a_current_folder_that_was_removed(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    gone = ["sh", "-c", 'cd gone && rmdir ../gone && exec "$@"', "sh", *command()]
    done = subprocess.run(gone, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "error: the current folder does not exist any more; change to another\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="it has no ulimit")
def test_nothing_of_the_current_folder_is_run(tmp_path: Path) -> None:
    """Not what has the name of a library, nor what Hydra would take for a plug-in of its own."""
    (tmp_path / "hydra_plugins").mkdir()
    for name in ("torch.py", "yaml.py", "hydra_plugins/other.py"):
        (tmp_path / name).write_text("raise SystemExit('it was run')", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        command("--cfg", "job"), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "optimizer:" in done.stdout


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command("hydra.run.dir=run")]  # 20 kB
    # What measures the coverage of tests writes a larger file
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(limited, cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    # torch's own writer does not say why
    line = r"cannot be written to \((File too large|Input/output error)\); what was written before is whole: make room"
    assert re.search(line, done.stderr)
    assert record(tmp_path / "run")["state"] == "failed"


# What Windows lacks of the standard library, as far as this project and its libraries may ask for it
WINDOWS = """
import os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("pwrite", "posix_fallocate", "sched_getaffinity", "fork"):
    vars(os).pop(name, None)
from recast_exp.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


def test_the_end_of_a_job_is_recorded_though_too_many_files_are_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    job_record.begin(tmp_path, typed(Composer().compose().cfg), label="x", overrides=[])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 256), limits[1]))
        with pytest.raises(OSError, match="Too many open files"), job_record.ending(tmp_path):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (record(tmp_path)["state"], "Too many open files" in str(record(tmp_path)["reason"])) == ("failed", True)


def test_what_windows_lacks_is_not_needed(tmp_path: Path) -> None:
    run = [sys.executable, "-c", WINDOWS, *TINY, "hydra.run.dir=run", f"cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "peak_memory_mb" not in json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))


def test_images_are_written_without_pwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwrite")
    parts = [np.full((3, 50, 50), number, dtype=np.uint8) for number in range(40)]
    with (tmp_path / "pixels").open("wb") as file:
        jobs = [
            threading.Thread(target=_write, args=(file.fileno(), part, number * part.size))
            for number, part in enumerate(parts)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    assert (tmp_path / "pixels").read_bytes() == np.stack(parts).tobytes()


# Shared memory


@pytest.mark.parametrize(("free", "expected"), [(None, 2), (10**9, 2), (64 * 10**6, 1), (10**6, 0)])
def test_loader_processes_fit_the_shared_memory(
    free: int | None, expected: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("recast_exp.data.datamodule.shared_memory", lambda: free)
    images = load("digits", "data", part="source")
    spec = input_spec(ModelConfig(backbone="vit_tiny_patch16_224", img_size=224))
    data = ImageDataModule(images, spec, "none", batch_size=128, eval_batch_size=128, seed=0, num_workers=2)
    assert data.train_dataloader().num_workers == expected
    assert data.val_dataloader().num_workers == expected
    said = [line for line in caplog.messages if "loader processes" in line]
    assert len(said) == (expected < 2)
    if said:
        assert f"{expected} instead of 2 loader processes" in said[0] and "--shm-size" in said[0]


def test_loader_processes_fit_the_cores(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("recast_exp.data.datamodule.usable_cores", lambda: 2)
    monkeypatch.setattr("recast_exp.data.datamodule.shared_memory", lambda: None)
    images = load("digits", "data", part="source")
    spec = input_spec(ModelConfig(backbone="vit_tiny_patch16_224", img_size=224))
    for asked, expected in ((32, 32), (512, 32)):
        data = ImageDataModule(images, spec, "none", batch_size=128, eval_batch_size=128, seed=0, num_workers=asked)
        assert data.train_dataloader().num_workers == expected
    assert caplog.messages == ["dataset.num_workers: 32 instead of 512 loader processes, as there are 2 cores"]


# Locks


def hold(path: str, seconds: float, ready: multiprocessing.Queue[bool]) -> None:
    with FileLock(path):
        ready.put(True)
        time.sleep(seconds)


def test_a_wait_says_what_for_and_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("recast_exp.files.FIRST_WAIT", 0.2)
    context = multiprocessing.get_context("spawn")
    ready: multiprocessing.Queue[bool] = context.Queue()
    holder = context.Process(target=hold, args=(str(tmp_path / "bank.lock"), 1.5, ready))
    holder.start()
    ready.get(timeout=60)
    with pytest.raises(TimeoutError), locked(tmp_path / "bank.lock", "the bank", wait=False):
        pass
    with alone_at(tmp_path / "bank"):
        assert not holder.is_alive() or holder.join(5) is None
    assert f"waiting for {tmp_path / 'bank'}, on which another job works, for 0 s now" in caplog.text
    assert f"remove {tmp_path / 'bank.lock'}" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES])
def test_without_locks_the_work_is_done(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    done = []
    with locked(tmp_path / "lock", "the bank"):
        done.append(True)
    assert done == [True]
    assert "the bank: no lock can be had" in caplog.text


def test_an_error_in_the_block_is_not_taken_for_one_of_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the work"), locked(tmp_path / "lock", "the bank"):
        raise OSError("of the work")
    with pytest.raises(TimeoutError), locked(tmp_path / "lock", "the bank"):
        raise TimeoutError
    with locked(tmp_path / "lock", "the bank", wait=False):
        pass
