"""What a job writes of itself: `job.json` in its folder. It says what is asked, how far it is, and how it ended.

It is begun before the work, renewed with every epoch and closed at the end, each time atomically; whoever watches a
sweep, continues it or reports on it reads these files, on whatever machine the jobs run. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recast_exp.config.keys import leaves, shown
from recast_exp.errors import Pruned, RecastError
from recast_exp.files import write_json
from recast_exp.runs import adopt as saved
from recast_exp.system import is_main_process

NAME = "job.json"
FORMAT = 1
RUNNING, FINISHED, FAILED, SKIPPED, INTERRUPTED = "running", "finished", "failed", "skipped", "interrupted"


_KEYS = {
    *("format", "state", "reason", "exit_code", "number", "label", "stage", "dataset", "seed", "overrides", "config"),
    *("started", "updated", "epoch", "epochs", "val/accuracy"),
}


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as JSON keeps it, resolved."""
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items()}


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a job's folder; None where there is none, or none that can be read."""
    try:
        record = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not set(record) >= _KEYS or not isinstance(record["config"], dict):
        return None
    return record if isinstance(record["format"], int) and record["format"] <= FORMAT else None


def begin(folder: Path, cfg: DictConfig, *, label: str, number: int | None = None, overrides: list[str]) -> None:
    """Write that a job has begun, in place of what an earlier attempt has written.

    Args:
        folder: Folder of the job.
        cfg: Its whole configuration.
        label: What tables call its method.
        number: Its number in a sweep.
        overrides: The overrides that it was started with.
    """
    if not is_main_process(cfg.trainer.devices):
        return
    now = _now()
    record = {
        "format": FORMAT,
        "state": RUNNING,
        "reason": None,
        "exit_code": None,
        "number": number,
        "label": label,
        "stage": cfg.stage.name,
        "dataset": cfg.dataset.name,
        "seed": cfg.seed,
        "overrides": overrides,
        "config": plain(cfg),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": now,
        "updated": now,
        "epoch": 0,
        "epochs": cfg.trainer.max_epochs,
        "val/accuracy": None,
    }
    write_json(folder / NAME, record)


def update(folder: Path, **changes: Any) -> None:
    """Change what a record says, and when; nothing where there is no record."""
    record = read(folder)
    if record is not None and is_main_process(_devices(record)):
        write_json(folder / NAME, record | {"updated": _now()} | changes)


def _devices(record: Mapping[str, Any]) -> int:
    """The number of devices of the run that a record speaks of."""
    return int(record["config"].get("trainer", {}).get("devices", 1))


@contextlib.contextmanager
def ending(folder: Path) -> Iterator[None]:
    """Record how the job that has begun in a folder ends: with the block, or with what it raises."""
    try:
        yield
    except KeyboardInterrupt:
        update(folder, state=INTERRUPTED, reason="interrupted", exit_code=130)
        raise
    except Pruned as pruned:
        update(folder, state=SKIPPED, reason=str(pruned))
        raise
    except RecastError as error:
        update(folder, state=FAILED, reason=str(error), exit_code=error.exit_code)
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        update(folder, state=FAILED, reason=reason, exit_code=1)
        raise
    update(folder, state=FINISHED)


def clear(folder: Path) -> None:
    """Remove what another job has left in a folder and this one would take for its own."""
    for left in ("metrics.json", "validation.json", "checkpoints/last.ckpt"):
        (folder / left).unlink(missing_ok=True)


def differences(record: Mapping[str, Any], cfg: DictConfig) -> Iterator[str]:
    """What a job was started with and is asked for now: one line for each key that differs."""
    before, now = dict(leaves(record["config"])), dict(leaves(plain(cfg)))
    for key in dict.fromkeys([*now, *before]):
        if key not in saved.WITHOUT_EFFECT and not (key in before and key in now and before[key] == now[key]):
            old, new = (shown(each[key]) if key in each else "nothing" for each in (before, now))
            yield f"{key} was {old}, is {new} now"


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a finished run."""
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def read_results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics and the counts of a finished run."""
    parameters: dict[str, Any] = json.loads((folder / "parameters.json").read_text(encoding="utf-8"))
    return read_metrics(folder), parameters


def is_finished(folder: Path) -> bool:
    """Whether a job has all its results, readable and whole; a record that says so is not enough."""
    record = read(folder)
    if record is None or record["state"] != FINISHED or record["stage"] != "adapt":
        return False
    try:
        metrics, parameters = read_results(folder)
        task = saved.read_record(folder / "task.safetensors")
        accuracy, count = float(metrics["test/accuracy"]), int(parameters["task_specific"])
    except (OSError, ValueError, KeyError, TypeError, RecastError):
        return False
    return 0 <= accuracy <= 1 and count >= 0 and task["config"]["seed"] == record["seed"]


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
