"""A Ray cluster of one node, this machine, for tests: a head that other processes connect to by its address."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def cluster(python: Path, folder: Path, environment: dict[str, str], cpus: int = 2) -> Iterator[str]:
    """Run a cluster within the block.

    It is ended by its process group: `ray stop` would end every Ray process of the machine.

    Args:
        python: The interpreter of the environment that has Ray.
        folder: A short path for its files, where its workers start too.
        environment: What its processes see.
        cpus: What the node says it has.

    Yields:
        Its address.

    Raises:
        RuntimeError: If it does not start within a minute.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", f"--num-cpus={cpus}",
        f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats",
        "--object-store-memory=80000000",
    ]  # fmt: skip
    log = folder / "head.log"
    with log.open("wb") as out:
        head = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 60
        while b"Ray runtime started" not in log.read_bytes():
            if head.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Ray does not start\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
