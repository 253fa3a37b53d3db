"""The example of the documentation is a real adapter."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf

from recast_exp import adapters
from recast_exp.errors import UserError

GUIDE = (Path(__file__).parents[1] / "docs" / "adding-an-adapter.md").read_text(encoding="utf-8")


def test_the_example_adapter_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (preset,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "mlp_shift.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        assert "mlp_shift" in adapters.names()
        cfg = OmegaConf.create(preset).adapter
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            before = model.eval()(images)
            names = adapters.inject_adapter(model, cfg)
            assert torch.equal(model(images), before)
            assert list(names) == ["blocks.0.mlp.shift", "blocks.1.mlp.shift"]
            model.get_parameter(names["blocks.1.mlp.shift"]).normal_()
            assert not torch.equal(model(images), before)
        with pytest.raises(UserError, match=r"adapter\.scale: got 0\.0, takes a number > 0"):
            adapters.options_of(OmegaConf.create({"name": "mlp_shift", "scale": 0.0}))
        with pytest.raises(UserError, match="mlp_shift does not fit ResNet, it needs blocks with an mlp"):
            adapters.inject_adapter(timm.create_model("resnet18"), cfg)
    finally:
        sys.modules.pop("recast_exp.adapters.mlp_shift", None)
