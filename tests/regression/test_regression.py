"""Files of an earlier version: the same commands give the same bits, and old files still open, evaluate and report."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

pytestmark = pytest.mark.slow

FILES = Path(__file__).parent / "files"
RUNS: dict[str, tuple[str, ...]] = {
    "vit_att": (),
    "vit_att_mlp": ("model=vit_att_mlp", "probe=false"),
    "resnet": ("model=resnet", "probe=false"),
    "melo": ("adapter=melo", "probe=false"),
    "piggyback": ("adapter=piggyback", "optimizer.adapter_lr=1e-2", "probe=false"),
}
SHORT = ("training=joint", "trainer.accelerator=cpu", "trainer.max_epochs=2")
MEASURED = {"seconds", "images_per_second", "peak_memory_mb", "device"}  # of the machine, not of the method
ADDED = ("accuracy_macro", "calibration_error")  # metrics that the earlier version did not have
Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Runs `python -m recast_exp` in one folder of this file's own."""
    folder = tmp_path_factory.mktemp("regression")

    def program(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recast_exp", *arguments]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=280, env=dict(os.environ))
        assert done.returncode == code, done.stderr
        return done

    return program


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def results(folder: Path) -> dict[str, float]:
    """What a run has measured; without its probe, which was trained then and is solved now."""
    metrics = read(folder / "metrics.json")
    kept = {k: v for k, v in metrics.items() if k not in MEASURED and not k.startswith(("version/", "probe/"))}
    return {k: v for k, v in kept.items() if not k.endswith(ADDED)}


def task(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The tensors of a task file, to the bit, and its record."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["recast_exp"])


def same_processor(run: Path, name: str) -> bool:
    """Whether the embedded backbone has the weights that it had where the files were made."""
    fingerprints = [task(p / "task.safetensors")[1]["backbone"]["fingerprint"] for p in (run, FILES / name)]
    return fingerprints[0] == fingerprints[1]


def other_kernels() -> bool:
    """Whether this processor computes in bfloat16 natively, as the one that made the files does not.

    The last bits of a loss were seen to differ there, in float32, although those of the backbone are the same.
    """
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "avx512_bf16" in flags.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Repeats a run, once."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        if not (folder / name).is_dir():
            program(*SHORT, *RUNS[name], f"hydra.run.dir={folder / name}")
        return folder / name

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_repeats_bit_for_bit(runs: Callable[[str], Path], name: str) -> None:
    run = runs(name)
    now, before = results(run), results(FILES / name)
    assert set(now) == set(before)
    if not same_processor(run, name):
        assert now["test/accuracy"] == pytest.approx(before["test/accuracy"], abs=0.1)
        return
    if other_kernels():
        assert now == pytest.approx(before, rel=1e-5, abs=1e-6)
        return
    assert now == before
    tensors, record = task(run / "task.safetensors")
    old_tensors, old_record = task(FILES / name / "task.safetensors")
    # Since format 2, one vector of coefficients, and their relative form
    layers = [layer for group in record["templates"]["groups"] for layer in group[3:]]
    old_tensors["coefficients"] = b"".join(old_tensors.pop(f"coefficients/{layer}") for layer in layers)
    assert tensors.pop("relative")
    assert tensors == old_tensors
    for key in ("bank", "backbone", "classes", "input", "eval_batch_size", "test_images"):
        assert record[key] == old_record[key]
    old, new = read(FILES / name / "parameters.json"), read(run / "parameters.json")
    assert {**new, "task_file_bytes": 0} == {**old, "task_file_bytes": 0}


def test_old_task_files_evaluate(runs: Callable[[str], Path], program: Program, tmp_path: Path) -> None:
    files = ",".join(str(FILES / name / "task.safetensors") for name in RUNS)
    arguments = ["-m", "stage=evaluate", f"task={files}", "trainer.accelerator=cpu", f"hydra.sweep.dir={tmp_path}"]
    if not all(same_processor(runs(name), name) for name in RUNS):
        assert "was trained on" in program(*arguments, code=2).stderr
        pytest.skip("the embedded backbones have other last bits on this processor")
    program(*arguments)
    for number, name in enumerate(RUNS):
        before, now = results(FILES / name), results(tmp_path / str(number))
        expected = {key: before[key] for key in now}
        assert now == (pytest.approx(expected, rel=1e-5) if other_kernels() else expected)
        assert {"test/accuracy", "test/loss"} <= set(now)


def test_an_old_bank_is_taken(runs: Callable[[str], Path], program: Program, tmp_path: Path) -> None:
    run = runs("resnet")
    if not same_processor(run, "resnet"):
        pytest.skip("the embedded backbone has other last bits on this processor")
    bank = FILES / "resnet" / "bank.safetensors"
    program(*SHORT, *RUNS["resnet"], f"bank={bank}", f"hydra.run.dir={tmp_path / 'again'}")
    assert task(tmp_path / "again" / "task.safetensors")[0] == task(run / "task.safetensors")[0]


def test_an_old_run_is_shown_when_it_is_resumed(program: Program, tmp_path: Path) -> None:
    shutil.copytree(FILES / "vit_att", tmp_path / "old")
    before = (tmp_path / "old" / "metrics.json").read_bytes()
    done = program(f"resume={tmp_path / 'old'}")
    assert "61.0 %" in done.stdout
    assert (tmp_path / "old" / "metrics.json").read_bytes() == before


def test_an_old_sweep_is_continued_and_reported(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(FILES / "sweep", folder)
    before = {path: path.read_bytes() for path in folder.glob("*/metrics.json")}
    done = program(
        "-m", "model=vit_frozen,vit_att", "seed=1,2", *SHORT, "probe=false", f"hydra.sweep.dir={folder}"
    )  # fmt: skip
    assert "model=vit_att" in done.stdout
    assert {path: path.read_bytes() for path in folder.glob("*/metrics.json")} == before
    program("stage=report", f"path={folder}")
    with (folder / "report" / "results.csv").open(encoding="utf-8", newline="") as file:
        now = list(csv.DictReader(file))
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        old = list(csv.DictReader(file))
    assert len(now) == 4
    for row, other in zip(now, old, strict=True):
        for name in ("method", "label", "dataset", "seed", "test/accuracy", "val/loss", "parameters/task_specific"):
            assert row[name] == other[name]
