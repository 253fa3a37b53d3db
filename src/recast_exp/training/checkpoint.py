"""The checkpoint that a run is continued from, looked at before anything of it is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from recast_exp import schemas
from recast_exp.errors import UserError, first_line


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the checkpoint that a run is continued from, without unpickling code.

    Raises:
        UserError: If it is no checkpoint of a run, or its numbers are not finite.
    """
    expected = f"resume: expected a checkpoint of a run, got {path}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = schemas.checked(content, dict[str, Any])
        parts = schemas.checked(content, _Checkpoint)
        history = schemas.checked(parts["callbacks"].get("History", {"rows": []}), _History)
        if not all(math.isfinite(value) for row in history["rows"] for value in row.values()):
            raise ValueError("its history holds NaN or infinity")
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{expected}, which is damaged ({first_line(error)}); start the run from scratch") from error
    for name, tensor in parts["state_dict"].items():
        if not isinstance(tensor, Tensor) or not torch.isfinite(tensor).all():
            raise UserError(f"{expected}, in which {name} is not made of finite numbers; start the run from scratch")
    return checkpoint


class _History(TypedDict):
    """The state of `training.history.History`: a row for each epoch."""

    rows: list[dict[str, int | float]]


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
