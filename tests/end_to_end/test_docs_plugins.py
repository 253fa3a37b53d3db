"""The examples of the pages on solvers and trackers work as they stand there."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf

from recast_exp.config.schema import LoggerConfig
from recast_exp.errors import UserError
from recast_exp.plugins import SOLVERS, TRACKERS, Registry
from recast_exp.recast import find_groups, mimic
from recast_exp.tracking.base import RunFacts

DOCS = Path(__file__).parents[2] / "docs"


def example(page: str, language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return block


@pytest.fixture
def plugged(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The module of a page, put into the package of its registry; the folder of the test."""
    registry, page, name = request.param
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / f"{name}.py").write_text(example(page, "python"), encoding="utf-8")
    package = importlib.import_module(registry.package)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()
    assert name in registry.names()
    assert OmegaConf.create(example(page, "yaml")) == {"name": name}
    yield tmp_path
    sys.modules.pop(f"{registry.package}.{name}", None)


def of(registry: Registry, page: str, name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("plugged", [(registry, page, name)], indirect=True, ids=[name])


@of(SOLVERS, "adding-a-solver.md", "first_weights")
@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_the_example_solver_works(plugged: Path, granularity: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)
    (group,) = find_groups(model, targets=["*.attn.qkv"], granularity=granularity)
    exact = mimic(model, [group], solver="first_weights")
    for layer in group.layers:
        torch.testing.assert_close(exact.rebuilt(layer), model.get_submodule(layer).weight.detach())
    shrunk = mimic(model, [group], solver="first_weights", ridge=1e6)
    assert shrunk.rebuilt(group.layers[0]).abs().max() < exact.rebuilt(group.layers[0]).abs().max()
    with pytest.raises(UserError, match="rigde"):
        mimic(model, [group], solver="first_weights", rigde=0.1)


@of(TRACKERS, "adding-a-tracker.md", "jsonl")
def test_the_example_tracker_works(plugged: Path) -> None:
    run = RunFacts("RECAST-Att", "vit_att", "none", "digits", 42, "adapt", {})
    start = TRACKERS.load("jsonl").start
    tracker = start(LoggerConfig(name="jsonl", options={"file": "epochs.jsonl"}), run, plugged)
    tracker.log_metrics({"val/accuracy": 0.5}, step=12)
    tracker.report(plugged, {"test/accuracy": 0.4})
    tracker.close(failed=False)
    rows = [json.loads(line) for line in (plugged / "epochs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["method"] == "RECAST-Att"
    assert rows[1:] == [{"step": 12, "val/accuracy": 0.5}, {"test/accuracy": 0.4}, {"failed": False}]
    with pytest.raises(UserError, match=r"logger\.options\.fiel: expected file, got fiel"):
        start(LoggerConfig(name="jsonl", options={"fiel": "a"}), run, plugged)
