"""Merged weights for `timm.create_model`, which load strictly."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from recast_exp.export._base import Exported
from recast_exp.files import replacing
from recast_exp.models.create import create_network
from recast_exp.models.timm_model import timm_model
from recast_exp.torch_state import seeded

TOLERANCE = 1e-6


def write(exported: Exported, folder: Path) -> tuple[list[Path], float]:
    """Write `model.safetensors`, and compare its logits with those of a stock model that has loaded it.

    Returns:
        The files, and the largest difference.

    Raises:
        UserError: If the model is not a stock timm model, or the logits differ.
    """
    exported.check_stock("timm")
    path = folder / "model.safetensors"
    state = {name: tensor.contiguous().clone() for name, tensor in exported.model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, exported.facts.texts())
    with seeded(0):
        stock = create_network(exported.facts.architecture, exported.facts.input.size)
        timm_model(stock).reset_classifier(len(exported.facts.classes))
    stock.load_state_dict(load_file(path), strict=True)
    return [path], exported.compare_network(path, stock, TOLERANCE)
