"""The folder that `timm.create_model("local-dir:FOLDER")` loads, and "hf-hub:OWNER/NAME" once it is on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm

from recast_exp.export._base import Exported
from recast_exp.export.card import model_card
from recast_exp.files import write_text
from recast_exp.torch_state import seeded

TOLERANCE = 1e-6


def write(exported: Exported, folder: Path) -> tuple[list[Path], float]:
    """Write `config.json`, `model.safetensors` and `README.md`, and compare the logits of what timm loads from them.

    Returns:
        The files, and the largest difference.

    Raises:
        UserError: If the model is not a stock timm model, or the logits differ.
    """
    exported.check_stock("huggingface")
    facts, model = exported.facts, exported.model
    spec = facts.input
    own: dict[str, Any] = {
        "input_size": (3, spec.size, spec.size),
        "mean": spec.mean,
        "std": spec.std,
        "crop_pct": spec.crop_pct,
        "crop_mode": "squash" if spec.squash else "center",
        "interpolation": spec.interpolation,
        "num_classes": len(facts.classes),
    }
    vars(model)["pretrained_cfg"] = {**getattr(model, "pretrained_cfg", {}), **own}
    described = {"num_classes": len(facts.classes), "label_names": list(facts.classes)}
    arguments = {"img_size": spec.size} if hasattr(getattr(model, "patch_embed", None), "img_size") else None
    timm.models.save_for_hf(model, str(folder), described, arguments, safe_serialization=True)
    write_text(folder / "README.md", model_card(facts, LOAD))
    with seeded(0):
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    difference = exported.compare_network(folder, loaded, TOLERANCE)
    return [folder / name for name in ("config.json", "model.safetensors", "README.md")], difference


LOAD = """import timm
from PIL import Image
model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
print(model.pretrained_cfg["label_names"][model(transform(Image.open("image.jpg"))[None]).argmax()])
"""
"""Five lines that load it."""
