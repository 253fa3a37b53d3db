"""A graph of PyTorch (`torch.export`) that needs no code of the model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from recast_exp.export._base import Exported
from recast_exp.files import replacing

TOLERANCE = 1e-5


def write(exported: Exported, folder: Path) -> tuple[list[Path], float]:
    """Write `model.pt2`, which takes any number of normalised images, and compare its logits.

    Returns:
        The files, and the largest difference.

    Raises:
        UserError: If the logits differ.
    """
    path = folder / "model.pt2"
    batch = torch.export.Dim("batch", min=1, max=2**20)
    example = exported.normalised(exported.images(2))
    with torch.no_grad():
        program = torch.export.export(exported.model, (example,), dynamic_shapes=({0: batch},))
    texts = exported.facts.texts()
    with replacing(path) as temporary:
        torch.export.save(program, temporary, extra_files={"recast_exp.json": json.dumps(texts, ensure_ascii=False)})
    module = torch.export.load(path).module()

    def logits(images: Tensor) -> Tensor:
        found: Tensor = module(exported.normalised(images))
        return found

    return [path], exported.compare(path, logits, TOLERANCE)
