"""Sweeps through the launchers, for real: the cores of this machine, SLURM on one node, Ray on one node.

Four small jobs each, in processes that the launcher starts, and a fifth that fails: what a job of a launcher says,
writes and returns is the same as in the process of the command.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cluster import ray_cluster, slurm
from recast_exp.config.schema import Config
from support.running import run_stage

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]  # each process imports torch anew

RUN = ("model=vit_frozen", "training=joint", "trainer=debug", "dataset.batch_size=8", "probe=false")
RATES = ("1e-3", "2e-3", "3e-3", "4e-3", "1e30")
FAILURE = "optimizer.lr: training diverged"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a name short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="rx-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def sweep(
    launcher: str, *options: str, weights: dict[str, Path], cwd: Path, python: str = sys.executable, **environment: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the sweep of five jobs, of which the last one diverges."""
    folder = Path("sweep")  # relative: jobs that start elsewhere must find it all the same
    command = [
        python, "-m", "recast_exp", "-m", f"launcher={launcher}", f"hydra.sweep.dir={folder}", *RUN, *options,
        f"model.weights={weights['digits_vit']}", f"optimizer.lr={','.join(RATES)}", "trainer.num_threads=null",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=560
    )
    return done, cwd / folder


def check(done: subprocess.CompletedProcess[str], folder: Path) -> list[dict[str, float]]:
    """Four jobs have results, the fifth has its line and its exit code; returns the results."""
    assert done.returncode == 2, done.stderr
    assert "1 of 5 job(s) did not finish" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(path.parent.name for path in folder.glob("*/metrics.json")) == ["0", "1", "2", "3"]
    record = json.loads((folder / "4" / "job.json").read_text())
    assert (record["state"], record["exit_code"]) == ("failed", 2)
    assert record["reason"].startswith(FAILURE)
    assert not any("launcher" in text for text in record["overrides"])
    for number, rate in enumerate(RATES):
        chosen = (folder / str(number) / ".hydra" / "overrides.yaml").read_text().splitlines()
        assert [float(text.partition("=")[2]) for text in chosen if "optimizer.lr" in text] == [float(rate)]
    results = [json.loads((folder / str(number) / "metrics.json").read_text()) for number in range(4)]
    assert len({result["test/loss"] for result in results}) == 4
    return results


def losses(results: list[dict[str, float]]) -> list[float]:
    return [result["test/loss"] for result in results]


@pytest.fixture(scope="module")
def expected(
    compose: Callable[..., Config], weights: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """What the jobs give in this process."""
    found = []
    for rate in RATES[:4]:
        cfg = compose(*RUN, f"model.weights={weights['digits_vit']}", f"optimizer.lr={rate}")
        found.append(run_stage(cfg, tmp_path_factory.mktemp("run"))["test/loss"])
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None, reason="the extra joblib is not installed"
)
def test_joblib(weights: dict[str, Path], tmp_path: Path, expected: list[float]) -> None:
    done, folder = sweep("joblib", "hydra.launcher.n_jobs=2", weights=weights, cwd=tmp_path)
    results = check(done, folder)
    assert losses(results) == pytest.approx(expected, rel=1e-5)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {result["device"] for result in results} == {f"cpu ({share} threads)"}


@pytest.mark.skipif(bool(slurm.missing()), reason=f"SLURM is not installed: {', '.join(slurm.missing())}")
@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None, reason="the extra slurm is not installed"
)
def test_slurm(weights: dict[str, Path], tmp_path: Path, folder: Path, expected: list[float]) -> None:
    environment = slurm.start(folder, cpus=2)
    try:
        done, sweep_folder = sweep(
            "slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10", weights=weights, cwd=tmp_path,
            **environment,
        )  # fmt: skip
    finally:
        slurm.stop(folder)
    results = check(done, sweep_folder)
    assert losses(results) == pytest.approx(expected, rel=1e-5)
    assert {result["device"] for result in results} == {"cpu (1 threads)"}
    # Each job is a task of one array that sbatch has put into the queue, and says so itself.
    controller = (folder / "slurmctld.log").read_text()
    ids = {OmegaConf.load(sweep_folder / str(number) / ".hydra" / "hydra.yaml").hydra.job.id for number in range(5)}
    assert ids == {f"1_{number}" for number in range(5)}
    assert "_slurm_rpc_submit_batch_job: JobId=1 " in controller
    assert all(f"JobId=1_{number}(" in controller for number in range(5))  # each was given its cores
    assert "#SBATCH --array=0-4" in next(sweep_folder.glob(".submitit/*.sh")).read_text()


def test_ray(weights: dict[str, Path], tmp_path: Path, folder: Path, expected: list[float]) -> None:
    python = ray_python()
    path = {"PYTHONPATH": os.pathsep.join(text for text in sys.path if text)}
    with ray_cluster.cluster(python, folder, {**os.environ, **path}) as address:
        done, sweep_folder = sweep(
            "ray", weights=weights, cwd=tmp_path, python=str(python), RAY_ADDRESS=address, **path
        )
    results = check(done, sweep_folder)
    assert losses(results) == pytest.approx(expected, rel=1e-5)
    assert {result["device"] for result in results} == {"cpu (1 threads)"}
    workers = "".join(path.read_text(errors="replace") for path in folder.glob("session_latest/logs/worker-*"))
    assert workers.count(":task_name:_run_job") >= 5
    assert f"error: {FAILURE}" in workers


def ray_python() -> Path:
    """The interpreter of an environment with the extra `ray`, which does not fit into that of the other tests."""
    if importlib.util.find_spec("ray") and importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        return Path(sys.executable)
    named = os.environ.get("RECAST_EXP_RAY_PYTHON")
    if not named:
        pytest.skip("the extra ray is not installed here, and RECAST_EXP_RAY_PYTHON names no interpreter that has it")
    return Path(named)
