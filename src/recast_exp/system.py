"""This process among others: its cores, its rank, its memory, and whoever reads what it prints."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from recast_exp.errors import printable


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


def shared_memory() -> int | None:
    """Free bytes of the memory through which processes hand tensors to each other; None where it has no bound.

    Containers of Docker have 64 MB, unless they are given more (`--shm-size`).
    """
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:  # not on Linux
        return None


def peak_memory_mb() -> float | None:
    """Peak memory of this process so far, in MB (10⁶ bytes); None where the system does not tell."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


class _Steady:
    """An output stream that goes on without a reader, or room: `… | head -1` must not make a job fail.

    Attributes:
        lost: Why a part of the output is nowhere, but for a reader that wanted no more.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or throw away where nobody reads on."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or throw away."""
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            self.lost = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what is still in the stream's buffer goes there, too
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _plain_record(name: str, *parts: Any, **more: Any) -> logging.LogRecord:
    """A record of a log whose values hold nothing that a terminal would obey: names of files are anybody's."""
    made = logging.LogRecord(name, *parts, **more)
    if name.startswith("recast_exp") and isinstance(made.args, tuple):
        made.args = tuple(
            printable(str(value)) if isinstance(value, str | os.PathLike | BaseException) else value
            for value in made.args
        )
    return made


def steady_output() -> None:
    """Let this process print on: to a terminal without Unicode, a reader that has gone, a full disk, or nowhere."""
    logging.raiseExceptions = False  # a log that cannot be written says so forty lines at a time
    logging.setLogRecordFactory(_plain_record)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever has started the process (`>&-`)
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  (until the process ends)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if name == "stdout" else "backslashreplace")
            setattr(sys, name, _Steady(stream))


def lost_output() -> OSError | None:
    """Why a part of what this process has printed is nowhere (a full disk), after writing the rest of it."""
    if not isinstance(sys.stdout, _Steady):
        return None
    sys.stdout.flush()
    return sys.stdout.lost
