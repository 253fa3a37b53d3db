"""This process among others: its cores, its rank, and its random generators and threads, which a library puts back."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator


def usable_cores() -> int:
    """The processor cores that this process may use: by its affinity, the quota of its container, and SLURM.

    SLURM does not always bind a job to the cores that it gives it, and says in SLURM_CPUS_PER_TASK how many they are.
    """
    from joblib import cpu_count  # type: ignore[import-untyped, unused-ignore]  # takes a fifth of a second

    cores: int = cpu_count()
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores, max(1, int(given))) if given.isdecimal() else cores


def is_main_process(devices: int) -> bool:
    """Whether this process writes the files of a run: it is the only one of the run, or the first.

    A run on one device is its own main process. Ranks in its environment are those of a program around it.

    Args:
        devices: Number of devices of the run (`trainer.devices`).
    """
    return devices == 1 or (os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python in the block, and put them back as they were after it.

    Args:
        seed: From 0 to 2³² - 1.
    """
    import numpy as np
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - libraries draw from it
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on `count` threads in the block, and on as many as before after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
