"""Task files of small models, and what tests read from task files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.task_file import copy_into, for_banks, make_record, read_task, write_task
from recast_exp.recast import Banks
from recast_exp.runs.results import Counts

FACTS: dict[str, Any] = {
    "backbone": {"name": "vit_tiny_patch16_224", "fingerprint": "0" * 64},
    "classes": ["a", "b"],
    "input": {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9, "interpolation": "bicubic"},
    "eval_batch_size": 256,
}
"""The least that a record says, beyond the templates."""

COUNTS: dict[str, Any] = dict.fromkeys(Counts.__annotations__, 0) | {"layers": {}}
"""`parameters.json` of a model that trains nothing."""


def write(path: Path, adapted: AdaptedModel, config: dict[str, Any] | None = None, **facts: Any) -> None:
    write_task(path, adapted, make_record(adapted, config or {}, **FACTS | facts))


def read_into(adapted: AdaptedModel, path: Path) -> None:
    copy_into(adapted, for_banks(*read_task(path), adapted.banks))


def coefficients(path: Path, banks: Banks) -> dict[str, Tensor]:
    """Layer → the coefficients of a task file."""
    tensors = for_banks(*read_task(path), banks)
    return {layer: tensors[f"coefficients/{layer}"] for layer in banks.coefficients}
