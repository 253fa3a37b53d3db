"""Weights & Biases: one run for each job, online or offline, and the data sent to it.

Importing `wandb` takes a second or two, so this module is imported only for `logger=wandb`.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import logging
import os
import re
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from msgspec import Meta

from recast_exp import schemas
from recast_exp.config import keys
from recast_exp.config.schema import LoggerConfig
from recast_exp.errors import UserError, one_line
from recast_exp.files import write_json
from recast_exp.runs import layout
from recast_exp.runs.task_header import read_record
from recast_exp.tracking.base import RunFacts, Tracker

if TYPE_CHECKING:
    from wandb.plot.custom_chart import CustomChart

log = logging.getLogger(__name__)

MATRIX_CLASSES = 100
"""The most classes that W&B's own confusion matrix can show: its table has a row for each pair, at most 10,000."""

CONNECT_SECONDS = 3.0
INIT_SECONDS = 30.0
TAG, GROUP = 64, 128  # W&B's limits, in characters


class WandbRun(WandbLogger, Tracker):
    """The W&B run of one job: Lightning's logger, which also receives the results and the end of the job.

    Args:
        started: The run that has been started; None in all but the first process of a distributed job.
        run: The facts about the job.
    """

    def __init__(self, started: wandb.Run | None, run: RunFacts) -> None:
        super().__init__(experiment=started)
        self._run = run
        # Offline, a continued run has a second file, and the first may be cut off: the second has to have all
        self.starts_anew = started is not None and started.offline

    @rank_zero_only
    def report(self, run_dir: Path, summary: Mapping[str, object]) -> None:
        """Send the results of a finished job, its plots, and its task file as an artifact.

        If they cannot be sent, a warning is logged and the job still succeeds: its results are in its folder.

        Args:
            run_dir: Folder of the run.
            summary: Name → result; it replaces the value of the last epoch under that name.
        """
        try:
            media = {f"plots/{path.stem}": wandb.Image(str(path)) for path in layout.plots(run_dir)}
            self.experiment.log(media | confusion_matrix(run_dir))
            self.experiment.summary.update(dict(summary))
            task = run_dir / layout.TASK
            if task.is_file():
                artifact = task_artifact(task, self._run, summary)
                aliases = ["latest", f"seed{self._run.seed}", artifact.metadata["sha256"][:12]]
                self.experiment.log_artifact(artifact, aliases=aliases)
        except (wandb.errors.Error, OSError) as error:
            log.warning("W&B: the results could not be sent (%s); they are in %s", _line(error), run_dir)

    @rank_zero_only
    def close(self, *, failed: bool) -> None:
        """End the run, so that the next job of this process starts one of its own."""
        try:
            self.experiment.finish(exit_code=int(failed))
        except wandb.errors.Error as error:
            log.warning("W&B: the run could not be closed (%s)", _line(error))


def check(logger: LoggerConfig) -> None:
    """Refuse what W&B refuses whenever a run is started, whether there is a connection or not.

    Raises:
        UserError: If it cannot read a variable of the environment, or the name of the project.
    """
    if wrong := _wrong_variable():
        raise UserError(wrong)
    try:
        wandb.Settings(project=logger.project)
    except (ValueError, wandb.errors.Error) as error:
        said = _line(error).partition(" [type=")[0]  # pydantic's goes on
        raise UserError(f"logger.project: expected a name that W&B takes, got {logger.project!r} ({said})") from error


def start(logger: LoggerConfig, run: RunFacts, run_dir: Path) -> WandbRun:
    """Start the run of a job, or continue it if the job is continued.

    Args:
        logger: Project, entity, group and mode.
        run: The facts about the job; its group is also W&B's, unless `logger` names one.
        run_dir: Folder of the job.

    Raises:
        UserError: If no run can be started with `logger.mode=online`.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return WandbRun(None, run)
    mode, reason = choose_mode(logger.mode)
    if reason:
        log.info("W&B: %s (%s)", mode, reason)
    adapter = [run.adapter] if run.adapter != "none" else []
    parts = [run.model, *adapter, run.dataset]
    init = functools.partial(
        wandb.init,
        id=run_id(run.config, run_dir),
        resume="allow",
        dir=run_dir,
        entity=logger.entity,
        project=logger.project,
        group=(logger.group or run.group or "")[-GROUP:] or None,
        job_type=run.stage,
        name="-".join([*parts, str(run.seed)]),
        tags=[text[:TAG] for text in dict.fromkeys((*parts, f"seed{run.seed}"))],
        config={**run.flat(), "config": dict(run.config)},
        settings=wandb.Settings(silent=True, init_timeout=INIT_SECONDS),
    )
    try:
        started = init(mode=mode)
    except wandb.errors.Error as error:
        if mode != "online" or logger.mode == "online":
            raise UserError(
                f"logger.mode: W&B cannot start a run ({_line(error)}); set logger.mode=offline to do without a "
                "connection"
            ) from error
        log.info("W&B: offline (%s)", _line(error))
        started = init(mode="offline")
    started.define_metric("epoch")
    started.define_metric("*", step_metric="epoch", step_sync=True)
    if started.url:
        log.info("W&B: %s", started.url)
    return WandbRun(started, run)


def choose_mode(asked: str) -> tuple[Literal["online", "offline", "disabled"], str]:
    """Choose W&B's mode for `logger.mode`. Nobody is ever prompted at the terminal.

    `auto` follows W&B's own settings (WANDB_MODE, `wandb offline`). If these allow online, it is online if there is an
    API key and the server responds.

    Returns:
        The mode, and the reason for it if users should know it; otherwise an empty string.

    Raises:
        UserError: If `logger.mode=online` and there is no API key, or if W&B's settings cannot be read.
    """
    try:
        settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    except (ValueError, wandb.errors.Error) as error:
        raise UserError(_wrong_variable() or f"logger: W&B's settings are invalid: {_line(error)}") from error
    if asked == "offline":
        return "offline", ""
    if asked == "auto" and settings.mode in ("offline", "dryrun", "disabled"):
        return "disabled" if settings.mode == "disabled" else "offline", f"W&B's settings say {settings.mode}"
    problem = key_problem()
    if asked == "online":
        if problem:
            raise UserError(f"logger.mode: expected auto or offline, got online with {problem}")
        return "online", ""
    problem = problem or connection_problem(settings.base_url)
    return ("offline", problem) if problem else ("online", "")


def _wrong_variable() -> str:
    """The line for an environment variable that W&B's settings do not take; empty if they take all."""
    for name, value in os.environ.items():
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except (ValueError, wandb.errors.Error) as error:
            said = _line(error).partition(" [type=")[0]  # pydantic's goes on
            what = "its value" if name.endswith("_KEY") else f"the value {value!r}"
            return f"{name}: W&B cannot read {what} ({said}); correct or unset this environment variable"
    return ""


def key_problem() -> str:
    """The reason why W&B cannot log in without a prompt; empty if it can."""
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        return f"no usable API key: {_line(error)}"
    return "" if has_key else "no API key: set WANDB_API_KEY, or run `wandb login`"


@functools.cache
def connection_problem(url: str) -> str:
    """The reason why a server cannot be reached within a few seconds; empty if it can. Checked once per process.

    The proxy settings of the environment apply. The request runs in a thread, as a name lookup ignores the timeout.
    """
    problem = [f"{url} does not respond within {CONNECT_SECONDS:.0f} s"]

    def connect() -> None:
        try:
            urllib.request.urlopen(url, timeout=CONNECT_SECONDS).close()
            problem[0] = ""
        except urllib.error.HTTPError:  # a response
            problem[0] = ""
        except (OSError, ValueError) as error:
            problem[0] = f"{url} cannot be reached: {_line(getattr(error, 'reason', error))}"

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    return problem[0]


class _Record(TypedDict):
    """`wandb.json`."""

    id: Annotated[str, Meta(pattern=r"^[\w-]{1,64}$")]
    settings: NotRequired[dict[str, Any]]


def run_id(config: Mapping[str, object], run_dir: Path) -> str:
    """The id of a job's W&B run: a new one, unless a job with the same settings was started in this folder.

    Only the settings on which results depend are compared (`keys.decides`). A record of version 0.1 holds a hash
    instead of the settings; its run is always continued.

    Args:
        config: The whole configuration, nested.
        run_dir: Folder of the job.
    """
    path = run_dir / layout.WANDB_RECORD
    settings = dict(keys.leaves(config))
    if path.is_file():
        record = schemas.read_json(path, _Record, "the id of a W&B run")
        if "settings" not in record or not keys.differences(record["settings"], settings):
            return record["id"]
    new = secrets.token_hex(4)
    write_json(path, {"id": new, "settings": settings})
    return new


class _Images(TypedDict):
    """Of `dataset.json`, what a chart wants to know."""

    classes: list[str]


def confusion_matrix(run_dir: Path) -> dict[str, CustomChart]:
    """`confusion_matrix` → W&B's own chart of `predictions.csv`; empty if there are too many classes."""
    path = run_dir / layout.PREDICTIONS
    classes: list[str] = []
    if path.is_file():
        classes = schemas.read_json(run_dir / layout.DATASET, _Images, "the images of a run")["classes"]
    if not 0 < len(classes) <= MATRIX_CLASSES:
        return {}
    positions = {name: position for position, name in enumerate(classes)}
    with path.open(encoding="utf-8", newline="") as file:
        pairs = [(positions[row["class"]], positions[row["predicted"]]) for row in csv.DictReader(file)]
    true, predicted = ([pair[side] for pair in pairs] for side in (0, 1))
    chart = wandb.plot.confusion_matrix(y_true=true, preds=predicted, class_names=classes, title="test images")
    return {"confusion_matrix": chart}


def task_artifact(path: Path, run: RunFacts, summary: Mapping[str, object]) -> wandb.Artifact:
    """A task file as an artifact, with the main facts of its record.

    There is one artifact for each method and dataset; its versions are the seeds. The file is not copied to W&B's
    cache: after full fine-tuning it has hundreds of MB.
    """
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    record = read_record(path)
    kept = ("test/accuracy", "val/accuracy", "parameters/task_specific", "parameters/task_bits", "parameters/head")
    metadata = {
        **run.flat(),
        "backbone": record["backbone"]["name"],
        "backbone_fingerprint": record["backbone"]["fingerprint"],
        "bank": record["bank"],
        "classes": len(record["classes"]),
        "version": record["version"],
        "sha256": content,
        **{name: summary[name] for name in kept if name in summary},
    }
    name = re.sub(r"[^\w.-]+", "_", f"{run.method}-{run.dataset}", flags=re.ASCII)
    artifact = wandb.Artifact(name[:GROUP], type="task", metadata=metadata)
    artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
    return artifact


def _line(error: object) -> str:
    return one_line(error, limit=300)
