"""The procedure of `stage=merge`: several task files on one set of templates."""

from __future__ import annotations

import logging
from pathlib import Path

from recast_exp.config.schema import Config
from recast_exp.display import console
from recast_exp.experiment.trained import pristine_backbone
from recast_exp.files import cache_folder, write_json
from recast_exp.runs import layout
from recast_exp.runs.results import MergedTask, Metrics
from recast_exp.runs.task_header import task_files
from recast_exp.tasks.merging import check_tasks, merge_tasks

log = logging.getLogger(__name__)


def check(settings: Config) -> None:
    """Refuse tasks that cannot be merged.

    Raises:
        UserError: If the tasks do not belong to one backbone, or have changed more than its weights, or nothing.
        MissingInputError: If a file is not there.
    """
    network = pristine_backbone(settings).network
    check_tasks(network, task_files(settings.task or ""), cache_folder(settings.cache_dir))


def run(settings: Config, run_dir: Path, rank: int | None) -> Metrics:
    """Merge tasks, write a task file for each, and report how much they are in each other's way.

    Args:
        settings: The settings of the command, with the task files.
        run_dir: Folder of the run; the task files and their templates go into `merged` in it.
        rank: Number of templates of each layer; None is that of the tasks.

    Raises:
        UserError: If the tasks do not belong to one backbone, or have changed more than its weights.
        MissingInputError: If a file is not there.
    """
    network = pristine_backbone(settings).network
    files = task_files(settings.task or "")
    merged = merge_tasks(network, files, rank=rank, cache=cache_folder(settings.cache_dir))
    paths = merged.save(run_dir / layout.MERGED)
    rows: list[MergedTask] = [
        {
            "task": name,
            "error": error,
            "averaged": averaged,
            "similarity": {other: value for other, value in zip(merged.names, line, strict=True) if other != name},
            "bytes": path.stat().st_size,
        }
        for name, error, averaged, line, path in zip(
            merged.names, merged.errors, merged.averaged, merged.similarity.tolist(), paths, strict=True
        )
    ]
    bank = sum(path.stat().st_size for path in (run_dir / layout.MERGED).iterdir()) - sum(row["bytes"] for row in rows)
    before = sum(path.stat().st_size for path in files)
    write_json(run_dir / layout.MERGED_FACTS, {"bank_bytes": bank, "bytes_before": before, "tasks": rows})
    console.show_merged(rows, bank, before)
    log.info("Task files: %s", run_dir / layout.MERGED)
    return {"largest_error": max(merged.errors), "bytes": bank + sum(row["bytes"] for row in rows)}
