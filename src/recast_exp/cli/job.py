"""One job from its beginning to its end, as Hydra calls it: what its folder says, and nothing is done twice."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import gc
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from recast_exp import stages
from recast_exp.config import grammar, rules
from recast_exp.config.schema import Config, typed
from recast_exp.config.variants import Variants
from recast_exp.errors import Pruned, RecastError, UnfitError, UserError, first_line
from recast_exp.files import locked, write_json
from recast_exp.runs import layout, record
from recast_exp.runs.plan import recipe_line, without_effect
from recast_exp.runs.results import Metrics
from recast_exp.runs.state import State
from recast_exp.system import is_main_process

log = logging.getLogger(__name__)

_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE),  # a disk, or a network's, that fails
)

_NO_MEMORY = "out of memory", "can't allocate memory", "not enough memory"
"""What torch says, on a GPU and on a CPU."""


@dataclass
class JobRunner:
    """Runs the jobs of a command, and counts those that failed. Launchers hand it to other processes.

    Attributes:
        sources: By the overrides of a job, which file set each key of its recipe.
        started: How many jobs of this process have been started.
        failures: The exit codes of those that failed, and have said so.
        held: The folder whose lock this process holds already.
    """

    sources: dict[tuple[str, ...], Mapping[str, str]] = field(default_factory=dict)
    started: int = 0
    failures: list[int] = field(default_factory=list)
    held: Path | None = None

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run one job.

        Args:
            cfg: Its composed configuration.

        Returns:
            The validation accuracy, where there is one: what a search maximises. None for a job of a sweep that failed,
            or that its search has given up: its folder says why, and the launcher goes on with the others.

        Raises:
            Exception: In a single run, what is not the user's mistake; its traceback has been logged.
        """
        hydra_cfg = HydraConfig.get()
        in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
        self.started += 1
        overrides = [str(text) for text in hydra_cfg.overrides.task]
        folder = Path(hydra_cfg.runtime.output_dir)
        try:
            settings = typed(cfg)
            metrics = run_job(
                stages.Job(settings, folder, hydra_cfg.sweep.dir if in_sweep else None, Variants.of_this_job),
                overrides=grammar.without_start(overrides),
                number=hydra_cfg.job.num if in_sweep else None,
                sources=self.sources.get(tuple(overrides)) or record.planned_sources(folder),
                held=folder == self.held,
            )
        except RecastError as error:
            log.error("error: %s", error)
            self.failures.append(error.exit_code)
            if not in_sweep:
                sys.exit(error.exit_code)
            return None
        except Pruned as pruned:
            log.info("The trial was %s", pruned)
            return None
        except Exception as error:
            if line := out_of_room(error, folder):
                log.error("error: %s", line)
                self.failures.append(UserError.exit_code)
                if not in_sweep:
                    sys.exit(UserError.exit_code)
                return None
            log.exception("error: the job failed")
            self.failures.append(1)
            if not in_sweep:
                raise
            return None
        accuracy = metrics.get("val/accuracy")
        return None if isinstance(accuracy, str) else accuracy


def out_of_room(error: Exception, folder: Path) -> str | None:
    """The line for an error of a full disk, of one that cannot be written to, or of too little memory."""
    code = error.errno if isinstance(error, OSError) else _code_in(str(error))
    if code in _UNWRITABLE:
        where = getattr(error, "filename", None) or folder
        done = "read or written to" if isinstance(error, PermissionError) else "written to"  # it does not say which
        return (
            f"{where} cannot be {done} ({os.strerror(code)}); what was written before is whole: make room, and "
            f"continue it (a run with resume={folder}, a sweep with the same command)"
        )
    if code in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY):
        where = getattr(error, "filename", None) or folder
        return f"{where}: a folder is in the place of a file, or a file in that of a folder; remove it"
    text = str(error)
    if code in (errno.EMFILE, errno.ENFILE):
        return (
            f"too many files are open ({text}); raise the limit (ulimit -n) or set dataset.num_workers=0, and continue "
            f"it (a run with resume={folder}, a sweep with the same command)"
        )
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return (
            f"dataset.num_workers: a loader process was stopped ({first_line(text)}), perhaps for want of memory; what "
            f"was written before is whole: continue it (resume={folder}), or set dataset.num_workers=0"
        )
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return (
            f"memory: there is not enough ({first_line(text) if text else 'MemoryError'}); lower dataset.batch_size, "
            "dataset.eval_batch_size or model.img_size"
        )
    return None


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Within the block, what the machine lacks is an error of one line, which the record of the job holds too."""
    try:
        yield
    except RecastError:
        raise
    except Exception as error:
        if line := out_of_room(error, folder):
            raise UserError(line) from error
        raise


def _code_in(text: str) -> int:
    """The number of the system's error in the text of another library's; 0 where it tells none."""
    if found := re.search(r"os error (\d+)", text):  # safetensors
        return int(found[1])
    # torch.save, whose streams do not say why
    if "iostream error" in text:
        return errno.EIO
    return errno.ENOSPC if "PytorchStreamWriter failed" in text or "No space left on device" in text else 0


def run_job(
    job: stages.Job,
    *,
    overrides: list[str],
    number: int | None = None,
    sources: Mapping[str, str] | None = None,
    held: bool = False,
) -> Metrics:
    """Run a job in its folder; in a sweep that is run again, only what is left of it.

    Args:
        job: The job, whose settings are checked.
        overrides: The overrides that it was started with, for the record.
        number: Its number in a sweep.
        sources: Which file set each key, for the record.
        held: Whether this process holds the lock of the folder already.

    Returns:
        The job's metrics, flat; none where it does not fit and is left out.

    Raises:
        RecastError: If the request cannot be carried out, or the folder has another job, or one that is running.
        Pruned: If the job is a trial that its search has given up.
    """
    stage = stages.from_config(job.settings.stage)
    if not stage.needs_model:  # it only reads, leaves no record, and imports nothing heavy
        return stage.run(job)
    with contextlib.nullcontext() if held else alone(job.folder, job.settings):
        return _run(stage, job, overrides, number, sources or {})


@functools.cache
def _keep_imports() -> None:
    """Leave what this process has imported out of garbage collection, which takes half a second to look through it."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries complain at the end of what was not collected


def job_label(settings: Config) -> str:
    """The name of a job in lists and records: that of its method, for most stages."""
    from recast_exp.models.label import method_label  # heavy: it knows every adapter

    return stages.from_config(settings.stage).label(method_label(settings.label, settings.model, settings.adapter))


def _run(
    stage: stages.Stage, job: stages.Job, overrides: list[str], number: int | None, sources: Mapping[str, str]
) -> Metrics:
    # Heavy: torch, timm and Lightning
    from recast_exp import heads
    from recast_exp.experiment.effects import no_effect
    from recast_exp.training.trainer import progress_bars, quiet

    _keep_imports()
    settings, folder, sweep = job.settings, job.folder, job.group
    known = record.read(folder)
    record.check_same(folder, known, settings, "hydra.run.dir" if sweep is None else "hydra.sweep.dir")
    if known is None and not settings.resume and settings.stage["name"] == "adapt":
        record.clear(folder)
    if sweep is None and known is not None:
        number = known["number"]  # a job of a sweep that is continued alone
    finished = record.is_finished(folder)
    if finished and sweep is not None:
        log.info("%s is finished; nothing is left to do", folder)
        return record.read_metrics(folder)
    # Bars of several jobs would write over one another
    with quiet(), progress_bars(sweep is None):
        if finished and settings.resume:
            return stage.run(job)
        record.begin(folder, settings, label=job_label(settings), number=number, overrides=overrides, sources=sources)
        if sweep is not None and settings.skip_unfit and (reason := _unfit(settings)):
            record.update(folder, state=State.SKIPPED, reason=reason)
            return {}
        keys = [grammar.key(text) for text in overrides]
        for key in keys:
            if reason := stage.no_effect(key):
                log.warning("%s: no effect: %s", key, reason)
        if settings.stage["name"] == "adapt":
            if rules.trains_only_head(settings) and heads.from_config(settings.head).solved:
                if line := without_effect(keys):
                    log.warning("%s", line)
            else:
                if sweep is None and sources:
                    log.info("%s", recipe_line(settings, sources))
                for key in keys:
                    if reason := no_effect(key, settings):
                        log.warning("%s: no effect: %s", key, reason)
        if settings.stage["name"] != "adapt":  # which goes on from what is there
            (folder / layout.METRICS).unlink(missing_ok=True)
        with record.ending(folder), _room(folder):
            metrics = stage.run(job)
            # The last file of a job: one that has it need not be run again. Most stages write it themselves
            if is_main_process(settings.trainer.devices) and not (folder / layout.METRICS).is_file():
                write_json(folder / layout.METRICS, metrics)
    record.update(folder, **{"val/accuracy": metrics.get("val/accuracy")})
    return metrics


@contextlib.contextmanager
def alone(folder: Path, settings: Config) -> Iterator[None]:
    """Hold the folder of a job, so that a job that was given up on and still runs is not started a second time."""
    if not is_main_process(settings.trainer.devices):
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / layout.LOCK, str(folder), wait=False))
        except TimeoutError as held:
            raise UserError(
                f"hydra.run.dir: a job is running in {folder}; wait for it, or stop it; if there is none, remove {held}"
            ) from None
        yield


def _unfit(settings: Config) -> str | None:
    from recast_exp.models.check import check_model

    if reason := rules.unfit(settings):
        return reason
    try:
        check_model(settings.model, settings.recast, settings.mimicry, settings.adapter)
    except UnfitError as error:
        return str(error)
    return None
