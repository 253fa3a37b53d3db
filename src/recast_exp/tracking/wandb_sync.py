"""How to upload what W&B has written offline. Nothing heavy is imported: a sweep says it too."""

from __future__ import annotations

import shlex
from pathlib import Path

OFFLINE = "wandb/offline-run-*"


def how_to_sync(folder: Path) -> str | None:
    """The command that uploads the offline runs below a folder; None where there are none, or all are uploaded.

    A job that was continued has an offline run for each of its parts, under one id; they are listed in order.

    Args:
        folder: Folder of a run, or of a sweep with runs in it.
    """
    waiting = sorted(
        (found for found in folder.rglob(OFFLINE) if not any(found.glob("*.wandb.synced"))),
        key=lambda found: found.name,
    )
    jobs = list(dict.fromkeys(found.parent.parent for found in waiting))
    if not waiting:
        return None
    if len(jobs) == 1:
        return shlex.join(["wandb", "sync", *map(str, waiting)])
    depths = sorted({len(job.relative_to(folder).parts) for job in jobs})
    return " ".join(["wandb sync", *(f"{shlex.quote(str(folder))}{'/*' * depth}/{OFFLINE}" for depth in depths)])
