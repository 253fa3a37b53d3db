"""Weights & Biases: one run for each job, online or offline, and all that is sent to it.

Importing `wandb` takes a second or two, so this module is imported where `logger=wandb` asks for it, and nowhere else.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import logging
import re
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from recast_exp.config.keys import leaves
from recast_exp.errors import UserError
from recast_exp.files import json_hash, write_json
from recast_exp.runs.adopt import WITHOUT_EFFECT, read_record
from recast_exp.runs.record import plain
from recast_exp.tracking.start import Tracker

log = logging.getLogger(__name__)

RECORD = "wandb.json"
"""In the folder of a run: the id under which a continued job goes on."""

MATRIX_CLASSES = 100
"""The most classes of a confusion matrix as W&B's own chart: a row for each pair, and its tables end at 10,000."""

CONNECT_SECONDS = 3.0
INIT_SECONDS = 30.0
TAG, GROUP = 64, 128  # the most characters that W&B takes


class WandbRun(WandbLogger, Tracker):
    """The W&B run of one job: Lightning's logger, with the results and the end of a job.

    Args:
        run: The run that has been started; None in all but the first process of a distributed job.
        facts: What the job is, flat: method, model, adapter, dataset, seed.
    """

    def __init__(self, run: Any, facts: Mapping[str, Any]) -> None:
        super().__init__(experiment=run)
        self._facts = dict(facts)

    @rank_zero_only
    def report(self, run_dir: Path, summary: Mapping[str, Any]) -> None:
        """Send the results of a finished job: its numbers, its plots, and its task file as an artifact.

        What cannot be sent costs a warning, not the job: its results are in its folder.

        Args:
            run_dir: Folder of the run.
            summary: Name → result, which replaces what the last epoch has logged under that name.
        """
        try:
            media = {f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted((run_dir / "plots").glob("*.png"))}
            self.experiment.log(media | confusion_matrix(run_dir))
            self.experiment.summary.update(dict(summary))
            task = run_dir / "task.safetensors"
            if task.is_file():
                artifact = task_artifact(task, self._facts, summary)
                aliases = ["latest", f"seed{self._facts['seed']}", artifact.metadata["sha256"][:12]]
                self.experiment.log_artifact(artifact, aliases=aliases)
        except (wandb.errors.Error, OSError) as error:
            log.warning("W&B: the results could not be sent (%s); they are in %s", _line(error), run_dir)

    @rank_zero_only
    def close(self, *, failed: bool) -> None:
        """End the run, so that the next job of this process starts one of its own."""
        try:
            self.experiment.finish(exit_code=int(failed))
        except wandb.errors.Error as error:
            log.warning("W&B: the run could not be ended (%s)", _line(error))


def start(cfg: DictConfig, run_dir: Path, facts: Mapping[str, Any], group: str | None) -> WandbRun:
    """Start the run of a job, or go on with it where the job is continued.

    Args:
        cfg: The whole configuration.
        run_dir: Folder of the job.
        facts: What the job is, flat.
        group: W&B group where the configuration names none.

    Raises:
        UserError: If `logger.mode=online` asks for what cannot be had.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return WandbRun(None, facts)
    mode, reason = choose_mode(cfg.logger.mode)
    if reason:
        log.info("W&B: %s (%s)", mode, reason)
    adapter = [facts["adapter"]] if facts["adapter"] != "none" else []
    what = [facts["model"], *adapter, facts["dataset"]]
    options: dict[str, Any] = {
        "id": run_id(cfg, run_dir),
        "resume": "allow",
        "dir": run_dir,
        "entity": cfg.logger.entity,
        "project": cfg.logger.project,
        "group": (cfg.logger.group or group or "")[-GROUP:] or None,
        "job_type": cfg.stage.name,
        "name": "-".join(str(part) for part in (*what, facts["seed"])),
        "tags": [text[:TAG] for text in dict.fromkeys((*what, f"seed{facts['seed']}"))],
        "config": {**facts, "config": plain(cfg)},
        "settings": wandb.Settings(silent=True, init_timeout=INIT_SECONDS),
    }
    try:
        run = wandb.init(mode=mode, **options)
    except wandb.errors.Error as error:
        if mode != "online" or cfg.logger.mode == "online":
            raise UserError(f"logger.mode: W&B cannot start a run ({_line(error)}); logger.mode=offline can") from error
        log.info("W&B: offline (%s)", _line(error))
        run = wandb.init(mode="offline", **options)
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch", step_sync=True)
    if run.url:
        log.info("W&B: %s", run.url)
    return WandbRun(run, facts)


def choose_mode(asked: str) -> tuple[Any, str]:
    """W&B's mode for what `logger.mode` asks, and the reason where it is not plain.

    `auto` is what W&B's own settings say (WANDB_MODE, `wandb offline`); where they leave it at online, a key and a
    server that answers make it so. Nothing is ever asked at the terminal.

    Raises:
        UserError: If `online` is asked for and there is no key, or W&B's settings cannot be read.
    """
    try:
        settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    except ValueError as error:  # pydantic's, several lines
        raise UserError(f"logger: W&B's settings (WANDB_… in the environment) are refused: {_line(error)}") from error
    if asked == "offline":
        return "offline", ""
    if asked == "auto" and settings.mode in ("offline", "dryrun", "disabled"):
        return "disabled" if settings.mode == "disabled" else "offline", f"W&B's settings say {settings.mode}"
    problem = key_problem()
    if asked == "online":
        if problem:
            raise UserError(f"logger.mode: got online, but there is {problem}; or use logger.mode=auto")
        return "online", ""
    problem = problem or connection_problem(settings.base_url)
    return ("offline", problem) if problem else ("online", "")


def key_problem() -> str:
    """Why W&B could not log in without asking; empty where it can."""
    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        return f"no usable API key: {_line(error)}"
    return "" if found else "no API key: set WANDB_API_KEY, or run `wandb login`"


@functools.cache
def connection_problem(url: str) -> str:
    """Why a server does not answer within a few seconds; empty where it does. Asked once in a process.

    A proxy of the environment is used. In a thread, as the time that it takes to look up a name has no limit.
    """
    found = [f"{url} does not answer within {CONNECT_SECONDS:.0f} s"]

    def connect() -> None:
        try:
            urllib.request.urlopen(url, timeout=CONNECT_SECONDS).close()
            found[0] = ""
        except urllib.error.HTTPError:  # an answer
            found[0] = ""
        except (OSError, ValueError) as error:
            found[0] = f"{url} cannot be reached: {_line(getattr(error, 'reason', error))}"

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    return found[0]


def run_id(cfg: DictConfig, run_dir: Path) -> str:
    """The id of a job's W&B run: a new one, or that of a job with this configuration that was begun in this folder."""
    configuration = json_hash({name: value for name, value in leaves(plain(cfg)) if name not in WITHOUT_EFFECT})
    path = run_dir / RECORD
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["configuration"] == configuration:
            return str(record["id"])
    new = secrets.token_hex(4)
    write_json(path, {"id": new, "configuration": configuration})
    return new


def confusion_matrix(run_dir: Path) -> dict[str, Any]:
    """`confusion_matrix` → W&B's own chart of `predictions.csv`; nothing where there are too many classes."""
    path = run_dir / "predictions.csv"
    classes = json.loads((run_dir / "dataset.json").read_text(encoding="utf-8"))["classes"] if path.is_file() else []
    if not 0 < len(classes) <= MATRIX_CLASSES:
        return {}
    number = {name: position for position, name in enumerate(classes)}
    with path.open(encoding="utf-8", newline="") as file:
        pairs = [(number[row["class"]], number[row["predicted"]]) for row in csv.DictReader(file)]
    true, predicted = ([pair[side] for pair in pairs] for side in (0, 1))
    chart = wandb.plot.confusion_matrix(y_true=true, preds=predicted, class_names=classes, title="test images")
    return {"confusion_matrix": chart}


def task_artifact(path: Path, facts: Mapping[str, Any], summary: Mapping[str, Any]) -> wandb.Artifact:
    """A task file as an artifact, with the main facts of its record.

    One artifact for each method and dataset; its versions are the seeds. The file is referred to where it lies, not
    copied: full fine-tuning has hundreds of MB.
    """
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    record = read_record(path)
    kept = ("test/accuracy", "val/accuracy", "parameters/task_specific", "parameters/task_bits", "parameters/head")
    metadata = {
        **facts,
        "backbone": record["backbone"]["name"],
        "backbone_fingerprint": record["backbone"]["fingerprint"],
        "bank": record["bank"],
        "classes": len(record["classes"]),
        "version": record["version"],
        "sha256": content,
        **{name: summary[name] for name in kept if name in summary},
    }
    name = re.sub(r"[^\w.-]+", "_", f"{facts['method']}-{facts['dataset']}", flags=re.ASCII)
    artifact = wandb.Artifact(name[:GROUP], type="task", metadata=metadata)
    artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
    return artifact


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
