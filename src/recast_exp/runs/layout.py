"""The names of the files of a run and of a sweep, each written down once. Paths are relative to the folder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

# A run
JOB = "job.json"
LOCK = ".lock"
HYDRA = ".hydra"
METRICS = "metrics.json"
PARAMETERS = "parameters.json"
HISTORY = "metrics.csv"
TASK = "task.safetensors"
DATASET = "dataset.json"
PREDICTIONS = "predictions.csv"
PREDICTIONS_LINES = "predictions.jsonl"
BROKEN = "broken.csv"
PROGRESS = "progress.json"
VALIDATION = "validation.json"
RECONSTRUCTION = "reconstruction.json"
CHECK = "check.json"
PLOTS = "plots"
CHECKPOINTS = "checkpoints"

EXPORT = "export"
EXPORT_FACTS = "model.json"
PUBLISH = "publish"

# Its trackers
WANDB_RECORD = "wandb.json"
WANDB = "wandb"
TENSORBOARD = "tensorboard"

# A sweep, which is locked as a run is
SWEEP = "sweep.json"
MULTIRUN = "multirun.yaml"  # Hydra's own
SEARCH = "search.json"
STORAGE = "optuna.log"
REPORT = "report"

# stage=sequence
SEQUENCE = "sequence.json"
SEQUENCE_MATRIX = "accuracy.csv"
SEQUENCE_METHODS = "methods.csv"
TASKS = "tasks"
WEIGHTS = "weights.safetensors"

# stage=merge
MERGED = "merged"
MERGED_FACTS = "merged.json"

# stage=reconstruct
BANK_SIZES = "bank_sizes.json"
BANK_SIZES_TABLE = "bank_sizes.csv"

# stage=compare
COMPARISON = "comparison.json"
COMPARISON_TABLE = "comparison.csv"
RECIPES = "recipes.csv"
RUNS = "runs"

WITHOUT_JOBS = frozenset({HYDRA, CHECKPOINTS, PLOTS, REPORT, TENSORBOARD, WANDB, EXPORT, PUBLISH, MERGED})
"""Folders in which nobody looks for jobs."""


FILES = (
    *(JOB, LOCK, METRICS, PARAMETERS, HISTORY, TASK, DATASET, PREDICTIONS, PREDICTIONS_LINES, BROKEN, PROGRESS),
    *(VALIDATION, RECONSTRUCTION, CHECK, WANDB_RECORD, SWEEP, MULTIRUN, SEARCH, STORAGE, SEQUENCE, SEQUENCE_MATRIX),
    *(SEQUENCE_METHODS, BANK_SIZES, BANK_SIZES_TABLE, COMPARISON, COMPARISON_TABLE, RECIPES),
)
FOLDERS = HYDRA, PLOTS, CHECKPOINTS, EXPORT, PUBLISH, WANDB, TENSORBOARD, REPORT, TASKS, MERGED, RUNS


def in_the_way(folder: Path) -> Path | None:
    """What would lead a job's files elsewhere, or stop it: a link, a pipe, a file for a folder, or the reverse."""
    if folder.exists() and not folder.is_dir():
        return folder
    files = [*(folder / name for name in FILES), *folder.glob("*.log"), *(folder / CHECKPOINTS).glob("*.ckpt")]
    folders = [folder / name for name in FOLDERS]
    own = [path for path in folders if path.name != WANDB and not path.is_symlink()]
    for root, below, names in (found for path in own for found in os.walk(path)):
        below[:] = [name for name in below if name != WANDB]  # it links to its newest run, and writes to a new one
        folders += [Path(root, name) for name in below]
        files += [Path(root, name) for name in names]
    wrong = (path for path in folders if path.is_symlink() or (path.exists() and not path.is_dir()))
    wrong_files = (path for path in files if path.is_symlink() or (path.exists() and not path.is_file()))
    return next(wrong, None) or next(wrong_files, None)


def checkpoint(run_dir: Path, name: str = "last") -> Path:
    """The checkpoint of a run that it can be continued from."""
    return run_dir / CHECKPOINTS / f"{name}.ckpt"


def plot(run_dir: Path, name: str) -> Path:
    """A picture of a run, such as `learning_curves`."""
    return run_dir / PLOTS / f"{name}.png"


def plots(run_dir: Path) -> list[Path]:
    """The pictures that a run has, sorted by their names."""
    return sorted((run_dir / PLOTS).glob("*.png"))


LONGEST = 100
"""Bytes of a name within the name of a folder."""


def slug(name: str) -> str:
    """A name as that of a folder: never one that leads elsewhere, and not too long."""
    plain = re.sub(r"^\.+", lambda dots: "_" * len(dots[0]), re.sub(r"[^\w.+-]", "_", name)) or "_"
    if len(plain.encode()) <= LONGEST:
        return plain
    return f"{plain[: LONGEST // 4]}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def compared(run_dir: Path, method: str) -> Path:
    """The folder in which `stage=compare` runs one method."""
    return run_dir / RUNS / slug(method)


def sequenced(run_dir: Path, number: int, task: str, method: str = "") -> Path:
    """The folder in which `stage=sequence` trains one task, counted from 0, or a baseline trains it."""
    return run_dir / TASKS / " ".join(filter(None, (f"{number + 1:02d}", slug(task), method and slug(method))))
