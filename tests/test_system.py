"""Cores and ranks of this process, and what is put back in it."""

from __future__ import annotations

import builtins
import io
import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from recast_exp.system import is_main_process, usable_cores
from recast_exp.torch_state import seeded, threads

CPU_MAX = "/sys/fs/cgroup/cpu.max"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 cores, all of which the process is bound to, in a container that may use two and a half."""
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)
    opened, exists = builtins.open, os.path.exists

    def fake_open(file: Any, *args: Any, **options: Any) -> Any:
        return io.StringIO("250000 100000\n") if file == CPU_MAX else opened(file, *args, **options)

    monkeypatch.setattr(builtins, "open", fake_open)
    monkeypatch.setattr(os.path, "exists", lambda path: path == CPU_MAX or exists(path))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def test_a_container_has_the_cores_of_its_quota(machine: None) -> None:
    assert usable_cores() == 3


@pytest.mark.parametrize(("given", "cores"), [("2", 2), ("0", 1), ("12", 3), ("", 3), ("all", 3)])
def test_slurm_gives_no_more_than_there_are(
    given: str, cores: int, machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("devices", "environment", "main"),
    [
        (1, {}, True),
        (1, {"LOCAL_RANK": "1"}, True),
        (1, {"NODE_RANK": "1", "LOCAL_RANK": "3"}, True),
        (2, {}, True),
        (2, {"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        (2, {"LOCAL_RANK": "1"}, False),
        (2, {"NODE_RANK": "1"}, False),
    ],
)
def test_a_run_on_one_device_is_its_own_main_process(
    devices: int, environment: dict[str, str], main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process(devices) == main


def sample() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()  # noqa: NPY002


def test_generators_are_seeded_in_a_block_and_put_back_after_it() -> None:
    with seeded(1):
        first = sample()
        with seeded(7):
            inner = sample()
        second = sample()
    with seeded(1):
        assert (sample(), sample()) == (first, second)
    with seeded(7), pytest.raises(KeyError), seeded(1):
        raise KeyError
    with seeded(7):
        assert sample() == inner


def test_threads_are_put_back_after_a_block() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_nothing_heavy_is_imported() -> None:
    modules = "{'torch', 'numpy', 'joblib'} & {*sys.modules}"
    code = f"import sys, recast_exp.system as system; system.is_main_process(1); print({modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_a_terminal_would_obey_is_shown_as_text_in_logs() -> None:
    code = (
        "import logging; from pathlib import Path; from recast_exp.system import steady_output; steady_output();"
        "logging.basicConfig(format='%(message)s');"
        "logging.getLogger('recast_exp.x').warning('%s and %s, %d', Path('a\\x1b[31m'), OSError('b\\x07'), 3);"
        "logging.getLogger('other').warning('%s', 'c\\x1b[0m')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [r"a\x1b[31m and b\x07, 3", "c\x1b[0m"]
