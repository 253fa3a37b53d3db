"""The checkpoint that a run is continued from, looked at before anything of it is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from recast_exp import schemas
from recast_exp.errors import UserError, first_line
from recast_exp.models import torch_file
from recast_exp.models.weights import is_whole


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the checkpoint that a run is continued from, without unpickling code.

    Raises:
        UserError: If it is no checkpoint of a run, or its numbers are not finite, or its epochs contradict each other.
    """
    expected = f"resume: expected a checkpoint of a run, got {path}"
    try:
        content = torch_file.load(path)
        checkpoint = schemas.checked(content, dict[str, Any])
        parts = schemas.checked(content, _Checkpoint)
        _check_history(schemas.checked(parts["callbacks"].get("History"), _History)["rows"], parts["epoch"])
        _check_snapshots(parts["callbacks"].get("Snapshots"), parts["epoch"])
        _check_progress(parts["loops"], parts["epoch"])
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{expected}, which is damaged ({first_line(error)}); start the run from scratch") from error
    for name, tensor in parts["state_dict"].items():
        if not _is_sound(tensor):
            raise UserError(f"{expected}, in which {name} is not made of finite numbers; start the run from scratch")
    return checkpoint


def _is_sound(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and is_whole(tensor) and bool(torch.isfinite(tensor).all())


def _check_history(rows: list[dict[str, int | float]], epoch: int) -> None:
    """Refuse a history that no training of so many epochs has.

    Raises:
        ValueError: One line.
    """
    if [row.get("epoch") for row in rows] != list(range(1, epoch + 2)):
        raise ValueError(f"its history is none of {epoch + 1} epoch(s)")
    for row in rows:
        if not all(math.isfinite(value) for value in row.values()):
            raise ValueError("its history holds NaN or infinity")
        if row.get("images", 0) < 1 or row.get("seconds", 0) <= 0:
            raise ValueError("its history has an epoch without images or time")
        if any(not 0 <= value <= 1 for name, value in row.items() if name.endswith("accuracy")):
            raise ValueError("its history has an accuracy that cannot be")


def _check_progress(loops: object, epoch: int) -> None:
    """Refuse Lightning's own count of the epochs where it is another: training would end too early, or never.

    Raises:
        ValueError: One line.
    """
    counted = schemas.checked(loops, _Loops)["fit_loop"]["epoch_progress"]["current"]
    if epoch < 0 or counted["processed"] != epoch + 1 or counted["completed"] not in (epoch, epoch + 1):
        raise ValueError("its loops have counted other epochs than its history")


def _check_snapshots(content: object, epoch: int) -> None:
    """Refuse the best epoch of a training that did not have it; None is a training that reports its last one.

    Raises:
        ValueError: One line.
    """
    if content is None:
        return
    found = schemas.checked(content, _Snapshots)
    if not 0 <= found["epoch"] <= epoch or not -1 <= found["best"] <= 1:
        raise ValueError("its best epoch is none of its epochs")
    if not all(map(_is_sound, found["tensors"].values())):
        raise ValueError("its best epoch is not made of finite numbers")


class _History(TypedDict):
    """The state of `training.history.History`: a row for each epoch."""

    rows: list[dict[str, int | float]]


class _Counted(TypedDict):
    processed: int
    completed: int


class _Progress(TypedDict):
    current: _Counted


class _FitLoop(TypedDict):
    epoch_progress: _Progress


class _Loops(TypedDict):
    fit_loop: _FitLoop


class _Snapshots(TypedDict):
    """The state of `training.loop.Snapshots`."""

    best: float
    epoch: int
    tensors: dict[str, Any]


class _Checkpoint(TypedDict):
    """What Lightning and this project write, as far as others depend on it."""

    epoch: int
    global_step: int
    trunk: dict[str, Any]
    state_dict: dict[str, Any]
    optimizer_states: list[dict[str, Any]]
    lr_schedulers: list[dict[str, Any]]
    callbacks: dict[str, Any]
    loops: dict[str, Any]
