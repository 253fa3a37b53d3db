"""A SLURM cluster of one node, this machine, for tests: munged, slurmctld and slurmd on the loopback interface.

    python tests/cluster/slurm.py start FOLDER     # prints what a shell has to export
    python tests/cluster/slurm.py stop FOLDER

All its files (configuration, key, state, logs) are in FOLDER. It needs Debian's slurm-wlm and munge, or their like, but
no rights of root, no systemd and no cgroups: processes are followed through /proc, nothing is accounted.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"  # where daemons are, which not every user's PATH has

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 NodeHostname={host} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


def start(folder: Path, cpus: int = 2) -> dict[str, str]:
    """Start the cluster and wait until its node is idle.

    Args:
        folder: A short path (sockets have names of 100 letters at most); made if it is not there.
        cpus: What the node says it has.

    Returns:
        The environment that SLURM's commands need.

    Raises:
        RuntimeError: If a daemon ends or the node is not ready after half a minute; with the ends of the logs.
    """
    folder = folder.absolute()
    for part in (folder, folder / "state", folder / "spool"):
        part.mkdir(parents=True, exist_ok=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            folder=folder,
            ports=_free_ports(2),
            cpus=cpus,
        ),
        encoding="utf-8",
    )
    environment = {"SLURM_CONF": str(configuration), "PATH": _PATH}
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    _daemon(folder, environment, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
    _wait_for(lambda: (folder / "munge.socket").exists(), folder)
    _daemon(folder, environment, "slurmctld", "-D", "-f", str(configuration))
    _daemon(folder, environment, "slurmd", "-D", "-f", str(configuration))

    def is_idle() -> bool:
        asked = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"], env={**os.environ, **environment}, capture_output=True, text=True
        )
        return asked.stdout.strip() == "idle"

    _wait_for(is_idle, folder)
    return environment


def stop(folder: Path) -> None:
    """Cancel what runs, and end the daemons that `start` started, by their process ids."""
    environment = {**os.environ, "SLURM_CONF": str(folder.absolute() / "slurm.conf"), "PATH": _PATH}
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment, capture_output=True, timeout=10)
    pids = _pids(folder)
    for pid in reversed(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            _wait_gone(pid)
    (folder / "pids.json").unlink(missing_ok=True)


def _pids(folder: Path) -> list[int]:
    path = folder / "pids.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _daemon(folder: Path, environment: dict[str, str], name: str, *arguments: str) -> None:
    program = shutil.which(name, path=_PATH)
    assert program is not None, name
    with (folder / f"{name}.out").open("wb") as out:
        process = subprocess.Popen(
            [program, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    (folder / "pids.json").write_text(json.dumps([*_pids(folder), process.pid]), encoding="utf-8")


def _wait_for(is_ready: object, folder: Path, seconds: float = 30) -> None:
    assert callable(is_ready)
    end = time.monotonic() + seconds
    while not is_ready():
        dead = [pid for pid in _pids(folder) if _is_gone(pid)]
        if dead or time.monotonic() > end:
            logs = "\n".join(
                f"{path.name}:\n{path.read_text()[-1000:]}" for path in sorted(folder.glob("*.[lo][ou][gt]"))
            )
            stop(folder)
            raise RuntimeError(f"SLURM does not start\n{logs}")
        time.sleep(0.1)


def _is_gone(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a zombie of ours still counts as a process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _wait_gone(pid: int, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not _is_gone(pid):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["start", name]:
            for variable, value in start(Path(name)).items():
                print(f"export {variable}='{value}'")
        case ["stop", name]:
            stop(Path(name))
        case _:
            sys.exit(__doc__)
