"""One job from its beginning to its end: what its folder says of it, and what is there already is not done again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recast_exp import config, job_record
from recast_exp.errors import UnfitError, UserError
from recast_exp.pruned import Pruned

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
        UserError: If the request cannot be carried out, or the folder has another job.
        Pruned: If the job is a trial that its search has given up.
    """
    # Heavy: torch, timm and Lightning
    from recast_exp import stages
    from recast_exp.labels import method_label

    known = job_record.read(folder)
    if sweep is None and known is not None:
        number = known["number"]  # a job of a sweep that is continued alone
    if sweep is not None:
        if known is not None:
            if different := list(job_record.differences(known, cfg)):
                raise UserError(f"hydra.sweep.dir: {folder} has another job: {different[0]}; takes a folder of its own")
            if job_record.is_finished(folder):
                log.info("%s is finished; nothing is left to do", folder)
                return job_record.read_results(folder)[0]
        if cfg.skip_unfit and (reason := _unfit(cfg)):
            job_record.begin(folder, cfg, label=method_label(cfg), number=number, overrides=overrides)
            job_record.update(folder, state=job_record.SKIPPED, reason=reason)
            return {}
    job_record.begin(folder, cfg, label=method_label(cfg), number=number, overrides=overrides)
    try:
        metrics: dict[str, Any] = stages.run(cfg, folder, sweep)
    except KeyboardInterrupt:
        job_record.update(folder, state=job_record.INTERRUPTED, reason="interrupted", exit_code=130)
        raise
    except Pruned as pruned:
        job_record.update(folder, state=job_record.SKIPPED, reason=str(pruned))
        raise
    except UserError as error:
        job_record.update(folder, state=job_record.FAILED, reason=str(error), exit_code=error.exit_code)
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        job_record.update(folder, state=job_record.FAILED, reason=reason, exit_code=1)
        raise
    job_record.update(folder, state=job_record.FINISHED, **{"val/accuracy": metrics.get("val/accuracy")})
    return metrics


def _unfit(cfg: DictConfig) -> str | None:
    from recast_exp.backbones import check_model

    if reason := config.unfit(cfg):
        return reason
    try:
        check_model(cfg)
    except UnfitError as error:
        return str(error)
    return None
