"""One job from its beginning to its end: what its folder says of it, and what is there already is not done again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from recast_exp.config import schema as config
from recast_exp.errors import UnfitError, UserError
from recast_exp.runs import record as job_record
from recast_exp.system import is_main_process

log = logging.getLogger(__name__)


def run_job(
    cfg: DictConfig, folder: Path, *, overrides: list[str], number: int | None = None, sweep: str | None = None
) -> dict[str, Any]:
    """Run a job in its folder; in a sweep that is run again, only what is left of it.

    Args:
        cfg: Its configuration, composed and checked.
        folder: Its folder; it exists.
        overrides: The overrides that it was started with, for the record.
        number: Its number in a sweep.
        sweep: Folder of the sweep.

    Returns:
        The job's metrics, flat; none where it does not fit and is left out.

    Raises:
        UserError: If the request cannot be carried out, or the folder has another job, or one that is running.
        Pruned: If the job is a trial that its search has given up.
    """
    with _alone(folder, cfg.trainer.devices):
        return _run(cfg, folder, overrides, number, sweep)


def _run(cfg: DictConfig, folder: Path, overrides: list[str], number: int | None, sweep: str | None) -> dict[str, Any]:
    # Heavy: torch, timm and Lightning
    from recast_exp import stages
    from recast_exp.models.label import method_label

    known = job_record.read(folder)
    if known is not None and known["stage"] == "adapt" and (different := list(job_record.differences(known, cfg))):
        key = "hydra.run.dir" if sweep is None else "hydra.sweep.dir"
        raise UserError(f"{key}: {folder} has another job: {different[0]}; takes a folder of its own")
    if known is None and not cfg.resume and cfg.stage.name == "adapt":
        job_record.clear(folder)
    if sweep is None and known is not None:
        number = known["number"]  # a job of a sweep that is continued alone
    finished = job_record.is_finished(folder)
    if finished and sweep is not None:
        log.info("%s is finished; nothing is left to do", folder)
        return job_record.read_results(folder)[0]
    if finished and cfg.resume:
        return stages.run(cfg, folder, sweep)
    label = method_label(cfg.label, cfg.model, cfg.adapter)
    job_record.begin(folder, cfg, label=label, number=number, overrides=overrides)
    if sweep is not None and cfg.skip_unfit and (reason := _unfit(cfg)):
        job_record.update(folder, state=job_record.SKIPPED, reason=reason)
        return {}
    with job_record.ending(folder):
        metrics: dict[str, Any] = stages.run(cfg, folder, sweep)
    job_record.update(folder, **{"val/accuracy": metrics.get("val/accuracy")})
    return metrics


@contextlib.contextmanager
def _alone(folder: Path, devices: int) -> Iterator[None]:
    """Hold the folder of a job, so that a job that was given up on and still runs is not started a second time."""
    if not is_main_process(devices):
        yield
        return
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"hydra.run.dir: a job is running in {folder}; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def _unfit(cfg: DictConfig) -> str | None:
    from recast_exp.models.check import check_model

    if reason := config.unfit(cfg):
        return reason
    try:
        check_model(cfg.model, cfg.recast, cfg.adapter)
    except UnfitError as error:
        return str(error)
    return None
