"""This process among others: its cores and its rank."""

from __future__ import annotations

import os


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
