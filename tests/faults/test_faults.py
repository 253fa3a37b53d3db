"""Kills, full disks, folders that cannot be written to, two processes, interruptions: what is lost is counted.

`make faults` runs these; they take many minutes. Each command runs in a forked child, so that a kill costs no start.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from recast_exp.cli import main as cli
from recast_exp.system import steady_output
from support.fixtures_data import make_folder

KILLS = int(os.environ.get("KILLS", "20"))
QUICK = ("model.pretrained=false", "logger=none", "trainer.num_threads=1", "dataset.num_workers=0")
TIMES = ("seconds", "images_per_second", "memory")


@pytest.fixture(autouse=True)
def wanted(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--all-cases"):
        pytest.skip("make faults runs it")


@dataclass(frozen=True)
class Scenario:
    """A command that is interrupted, and how it goes on.

    Attributes:
        first: Folder → arguments.
        again: Folder → arguments after an interruption.
    """

    first: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]


def run_of(*options: str) -> Scenario:
    def first(folder: Path) -> list[str]:
        return [*QUICK, *options, f"cache_dir={folder / 'cache'}", f"hydra.run.dir={folder / 'run'}"]

    def again(folder: Path) -> list[str]:
        begun = all((folder / "run" / ".hydra" / name).is_file() for name in ("config.yaml", "overrides.yaml"))
        return [f"resume={folder / 'run'}", f"cache_dir={folder / 'cache'}"] if begun else first(folder)

    return Scenario(first, again)


def same(*options: str, place: str = "hydra.run.dir") -> Scenario:
    def first(folder: Path) -> list[str]:
        return [*options, *QUICK, f"cache_dir={folder / 'cache'}", f"{place}={folder / 'run'}"]

    return Scenario(first, first)


SCENARIOS = {
    "a run": run_of("training=joint", "trainer.max_epochs=8", "probe=false"),
    "a run through a solved head": run_of("training=through_head", "trainer.max_epochs=8"),
    "a sweep": same(
        "-m", "seed=1,2", "training=joint", "trainer.max_epochs=2", "probe=false", place="hydra.sweep.dir"
    ),
    "a sequence": same(
        "stage=sequence", "dataset.part=all", "stage.splits=3", "dataset.max_per_class=12", "model=vit_att",
        "training=joint", "trainer.max_epochs=2", "trainer.limit_batches=2", "dataset.batch_size=8", "probe=false",
    ),
    "a cache of images": run_of(
        "dataset=folder", "dataset.path=IMAGES", "model.backbone=vit_tiny_patch16_224", "model.img_size=32",
        "training=joint", "trainer.max_epochs=1",
    ),
    "a bank": same("stage=reconstruct", "model=vit_att_mlp"),
}  # fmt: skip


def child(arguments: list[str], output: Path) -> int:
    """Start a command in a forked process, the first of a group of its own; its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        steady_output()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        code = cli.run(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finished(arguments: list[str], output: Path) -> str:
    """Run a command to its end; what it said."""
    code = ended(child(arguments, output))
    said = output.read_text(errors="replace")
    assert code == 0, said
    return said


def results(folder: Path) -> dict[str, object]:
    """What is to be the same, however often a command was interrupted."""
    found: dict[str, object] = {}
    for path in sorted((folder / "run").rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.json":
            content = json.loads(path.read_text())
            found[name] = {key: value for key, value in content.items() if not any(word in key for word in TIMES)}
        elif path.name in ("task.safetensors", "predictions.csv"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted((folder / "cache").rglob("*.safetensors")):
        if "banks" in path.parts:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@dataclass
class Count:
    """What was lost, over all interruptions of a scenario.

    Attributes:
        results: Results that were looked at after going on.
        different: Those that are missing or other than without an interruption.
        damaged: Files under their own names that could not be read right after the interruption.
    """

    results: int = 0
    different: int = 0
    damaged: int = 0

    def after(self, found: dict[str, object], expected: dict[str, object]) -> None:
        """Add what a folder holds after its command has gone on."""
        self.results += len(expected)
        self.different += sum(found.get(name) != value for name, value in expected.items())

    def __str__(self) -> str:
        return f"{self.different} of {self.results} results lost or changed, {self.damaged} damaged files"


def whole(folder: Path) -> Iterator[str]:
    """The files that are there under their own names and cannot be read."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.name.startswith(".") or ".tmp" in str(path):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np") as file:
                    [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            elif path.suffix == ".ckpt":
                torch.load(path, weights_only=True)
        except Exception as error:
            yield f"{path}: {error}"


def prepared(scenario: Scenario, folder: Path, images: Path) -> tuple[list[str], list[str]]:
    folder.mkdir()
    found = [
        [text.replace("IMAGES", str(images)) for text in make(folder)] for make in (scenario.first, scenario.again)
    ]
    return found[0], found[1]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SCENARIOS)
def test_kills_lose_nothing(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    scenario, random_times = SCENARIOS[name], random.Random(name)
    images = make_folder(tmp_path / "images", count=30)
    first, _ = prepared(scenario, tmp_path / "whole", images)
    finished(first, tmp_path / "out")  # imports and pretraining
    prepared(scenario, tmp_path / "timed", images)
    started = time.monotonic()
    first, again = prepared(scenario, tmp_path / "again", images)
    finished(first, tmp_path / "out")
    duration = time.monotonic() - started
    expected = results(tmp_path / "whole")
    assert expected and results(tmp_path / "again") == expected
    hit, count = 0, Count()
    for number in range(KILLS):
        folder = tmp_path / f"killed {number}"
        first, again = prepared(scenario, folder, images)
        pid = child(first, tmp_path / "out")
        time.sleep(random_times.random() * duration)
        os.killpg(pid, signal.SIGKILL)
        hit += ended(pid) == -signal.SIGKILL
        count.damaged += len(list(whole(folder)))
        again = [text.replace("IMAGES", str(images)) for text in scenario.again(folder)]
        said = finished(again, tmp_path / "out")
        assert "Traceback" not in said
        count.after(results(folder), expected)
    record_property("faults", f"{name}: {hit} of {KILLS} kills hit it within {duration:.1f} s; {count}")
    assert (count.different, count.damaged) == (0, 0)
    assert hit >= KILLS // 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of a chosen size; asked again, it gets another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", f"remount,{options}"] if place.is_mount() else ["-o", options]
        done = subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", str(place)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here ({done.stderr.decode().strip()})")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["a run", "a sweep", "a cache of images", "a bank"])
def test_a_full_disk_is_one_line_and_what_is_written_stays(
    name: str, small_disk: Callable[[str], Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    scenario, images = SCENARIOS[name], make_folder(tmp_path / "images", count=30)
    first, _ = prepared(scenario, tmp_path / "whole", images)
    finished(first, tmp_path / "out")
    need = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    expected = results(tmp_path / "whole")
    full, count = 0, Count()
    for share in (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        disk = small_disk(f"size={int(need * share) + 8192}")
        folder = disk / f"{share}"
        first, _ = prepared(scenario, folder, images)
        code = ended(child(first, tmp_path / "out"))
        said = (tmp_path / "out").read_text(errors="replace")
        assert code in (0, 2) and "Traceback" not in said, said
        if code:
            full += 1
            assert any(words in said for words in ("cannot be", "not enough", "space", " MB are free")), said
        count.damaged += len(list(whole(folder)))
        small_disk("size=2g")
        again = [text.replace("IMAGES", str(images)) for text in scenario.again(folder)]
        finished(again, tmp_path / "out")
        count.after(results(folder), expected)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    record_property("faults", f"{name}: the disk was full {full} of 8 times; {count}")
    assert (count.different, count.damaged) == (0, 0)
    assert full


def test_a_disk_that_cannot_be_written_to(small_disk: Callable[[str], Path], tmp_path: Path) -> None:
    disk = small_disk("size=1m")
    small_disk("ro")
    for place in ("hydra.run.dir", "cache_dir"):
        code = ended(child([*QUICK, "trainer.max_epochs=1", f"{place}={disk / 'x'}"], tmp_path / "out"))
        said = (tmp_path / "out").read_text(errors="replace")
        assert code == 2 and "Traceback" not in said and f"{place}: " in said, said


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    arguments = run_of("training=joint", "trainer.max_epochs=8", "probe=false").first(tmp_path)
    pids = [child(arguments, tmp_path / f"out{number}") for number in range(2)]
    codes = sorted(ended(pid) for pid in pids)
    said = [(tmp_path / f"out{number}").read_text() for number in range(2)]
    assert codes == [0, 2] and "a job is running" in "".join(said), said
    assert list(whole(tmp_path)) == []


def test_two_processes_with_one_cache(tmp_path: Path) -> None:
    pids = []
    for number in range(2):
        arguments = [*QUICK, "stage=reconstruct", f"cache_dir={tmp_path / 'cache'}"]
        pids.append(child([*arguments, f"hydra.run.dir={tmp_path / str(number)}"], tmp_path / f"out{number}"))
    assert [ended(pid) for pid in pids] == [0, 0]
    assert len(list((tmp_path / "cache" / "banks").glob("*.safetensors"))) == 1


def test_a_loader_process_is_killed(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", count=60)
    options = ("dataset=folder", f"dataset.path={images}", "model.backbone=vit_tiny_patch16_224", "model.img_size=32")
    arguments = [*run_of(*options, "training=joint", "trainer.max_epochs=300").first(tmp_path), "dataset.num_workers=1"]
    pid = child(arguments, tmp_path / "out")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.2)
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert workers
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    assert ended(pid) == 2
    said = (tmp_path / "out").read_text()
    assert "dataset.num_workers: " in said and "Traceback" not in said, said
    assert list(whole(tmp_path)) == []


@pytest.mark.parametrize("times", [1, 2])
def test_interruptions(times: int, tmp_path: Path) -> None:
    scenario = run_of("training=joint", "trainer.max_epochs=60", "probe=false")
    pid = child(scenario.first(tmp_path), tmp_path / "out")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.05)
    for _ in range(times):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.05)
    assert ended(pid) in (130, -signal.SIGINT)
    assert list(whole(tmp_path)) == []
    if times == 1:
        assert "resume=" in (tmp_path / "out").read_text()
        assert json.loads((tmp_path / "run" / "job.json").read_text())["state"] == "interrupted"
    finished(scenario.again(tmp_path), tmp_path / "out")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    rates = ("optimizer.lr=1e30", "optimizer.coefficients_lr=1e30", "trainer.gradient_clip=0")
    arguments = run_of("training=joint", "trainer.max_epochs=20", "optimizer=sgd", *rates).first(tmp_path)
    assert ended(child(arguments, tmp_path / "out")) == 2
    said = (tmp_path / "out").read_text()
    assert "optimizer.lr: training diverged" in said and "Traceback" not in said
    assert list(whole(tmp_path)) == []


def test_too_little_memory(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    arguments = [
        *run_of("training=joint", "model.backbone=vit_large_patch16_224", "model.img_size=224").first(tmp_path)
    ]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, limits[1]))
        code = ended(child(arguments, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    said = (tmp_path / "out").read_text()
    assert code == 2 and "memory: there is not enough" in said and "Traceback" not in said, said
