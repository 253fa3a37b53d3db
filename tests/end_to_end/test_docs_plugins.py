"""The examples of the pages on solvers, stages and trackers work as they stand there."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf

from recast_exp import heads, stages
from recast_exp.config.schema import Config, LoggerConfig
from recast_exp.errors import UserError
from recast_exp.plugins import HEADS, SOLVERS, STAGES, TRACKERS, Registry
from recast_exp.recast import find_groups, mimic
from recast_exp.tracking.base import RunFacts
from support.running import run_stage

DOCS = Path(__file__).parents[2] / "docs"


def example(page: str, language: str) -> str:
    """The module, preset or project file of a page: its first block in that language."""
    block, *_ = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
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
    preset = OmegaConf.create(example(page, "yaml"))
    assert preset.get(registry.kind, preset).name == name
    yield tmp_path
    sys.modules.pop(f"{registry.package}.{name}", None)


def of(registry: Registry, page: str, name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("plugged", [(registry, page, name)], indirect=True, ids=[name])


@of(HEADS, "adding-a-head.md", "diagonal")
def test_the_example_head_works(plugged: Path) -> None:
    preset = OmegaConf.create(example("adding-a-head.md", "yaml")).head
    assert heads.from_config(preset) == heads.load("diagonal")()
    labels = torch.arange(60) % 3
    values = torch.nn.functional.one_hot(labels, 6).float() + 0.2 * torch.randn(60, 6)
    features = heads.Features(values, labels, 3)
    chosen = heads.choose(heads.from_config(preset), features, features)
    assert chosen.trial.accuracy > 0.9
    within = torch.stack([values[labels == number].double().var(0, correction=0) for number in range(3)]).mean(0)
    (solution,) = heads.load("diagonal")().solve(features, [{"floor": 0.01}])
    means = torch.stack([values[labels == number].double().mean(0) for number in range(3)])
    torch.testing.assert_close(solution.weight, means / within)
    best = heads.from_config({"name": "best", "heads": ["lda", "diagonal"]})
    assert {setting["head"] for setting in best.settings()} == {"lda", "diagonal"}


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


@of(STAGES, "adding-a-stage.md", "features")
def test_the_example_stage_works(plugged: Path, tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"stage\.splt: unknown option; .* did you mean stage\.split\?"):
        stages.from_config({"name": "features", "splt": "val"})
    with pytest.raises(UserError, match=r"stage\.split: expected one of val, test, got 'train'"):
        stages.from_config({"name": "features", "split": "train"})
    settings = tiny("adapter=melo")
    stage = stages.from_config({"name": "features"})
    assert list(stage.problems(settings)) == ["adapter: expected none with stage=features, got melo"]
    assert list(stage.problems(tiny())) == []
    for split, count in {"val": 178, "test": 359}.items():
        settings = tiny()
        settings.stage = {"name": "features", "split": split, "file": f"{split}.npz"}
        assert run_stage(settings, plugged) == {"images": count}
        made = np.load(plugged / f"{split}.npz")
        assert made["features"].shape == (count, 96)
        assert set(made["labels"]) == set(range(5))


@pytest.mark.slow
def test_the_example_stage_works_as_an_installed_package(tmp_path: Path, weights: dict[str, Path]) -> None:
    """What pip leaves of the package: its module, and its entry points."""
    page = "adding-a-stage.md"
    project = tomllib.loads(example(page, "toml"))["project"]
    ((group, points),) = project["entry-points"].items()
    module = Path(*points["features"].split(".")).with_suffix(".py")
    info = f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    for file, content in {
        f"site/{module.parent}/__init__.py": "",
        f"site/{module}": example(page, "python"),
        f"site/{info}/METADATA": metadata,
        f"site/{info}/entry_points.txt": f"[{group}]\nfeatures = {points['features']}\n",
        "my_conf/stage/features.yaml": example(page, "yaml"),
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH"))))

    def program(*typed: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recast_exp", "--config-dir", "my_conf", "stage=features", *typed]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
        )

    done = program(f"model.weights={weights['digits_vit']}", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("359 images, 96 features each: ")
    assert json.loads((tmp_path / "run" / "job.json").read_text(encoding="utf-8"))["state"] == "finished"
    refused = program("stage.split=train")
    quoted = re.findall(r"^error: stage.*$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert (refused.returncode, refused.stderr.splitlines()) == (2, quoted)
