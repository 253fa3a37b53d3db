"""How to upload offline W&B runs. Nothing heavy is imported, as sweeps use this too."""

from __future__ import annotations

import shlex
from pathlib import Path

OFFLINE = "wandb/offline-run-*"


def how_to_sync(folder: Path) -> str | None:
    """The command that uploads the offline runs below a folder; None if there are none, or all have been uploaded.

    A job that was continued has an offline run for each of its parts, all with one id; they are listed in order.

    Args:
        folder: Folder of a run, or of a sweep with runs in it.
    """
    waiting = sorted(
        (run for run in folder.rglob(OFFLINE) if not any(run.glob("*.wandb.synced"))),
        key=lambda run: run.name,
    )
    jobs = list(dict.fromkeys(run.parent.parent for run in waiting))
    if not waiting:
        return None
    if len(jobs) == 1:
        return shlex.join(["wandb", "sync", *map(str, waiting)])
    depths = sorted({len(job.relative_to(folder).parts) for job in jobs})
    return " ".join(["wandb sync", *(f"{shlex.quote(str(folder))}{'/*' * depth}/{OFFLINE}" for depth in depths)])
