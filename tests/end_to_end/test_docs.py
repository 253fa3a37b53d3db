"""The documentation is true: its examples run, and its commands are accepted."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from omegaconf import OmegaConf
from PIL import Image

from recast_exp import adapters, data
from recast_exp.cli import check as checking
from recast_exp.cli import launchers
from recast_exp.cli import main as cli
from recast_exp.cli.check import CommandLine, check
from recast_exp.config.compose import Composed, Composer
from recast_exp.data import sets
from recast_exp.errors import MissingInputError, UserError
from recast_exp.models.check import check_model
from recast_exp.models.create import blueprint, input_spec
from recast_exp.recast import find_groups
from recast_exp.runs.plan import recipe_line
from support.helpers import load

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_links_lead_somewhere() -> None:
    """Those of the README; those between pages are followed when the site is built."""
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} has a link to {target}"


def test_the_example_adapter_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of a module of this project; `test_plugin_adapter.py` installs it as one of another package."""
    code, program = blocks(DOCS / "adding-an-adapter.md", "python")
    (preset,) = blocks(DOCS / "adding-an-adapter.md", "yaml")
    (tmp_path / "mlp_shift.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        assert "mlp_shift" in adapters.names()
        adapter = adapters.from_config(OmegaConf.create(preset).adapter)
        assert (adapter.name, adapter.label) == ("mlp_shift", "MLPShift")
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            before = model.eval()(images)
            names = adapters.inject_adapter(model, adapter)
            assert torch.equal(model(images), before)
            assert list(names) == ["blocks.0.mlp.shift", "blocks.1.mlp.shift"]
            model.get_parameter(names["blocks.1.mlp.shift"]).normal_()
            trained = model(images)
            assert not torch.equal(trained, before)
        adapters.merge(model)
        assert not adapters.injected(model)
        assert not any(path.endswith("shift") for path, _ in model.named_modules())
        torch.testing.assert_close(model(images), trained)
        with pytest.raises(UserError, match=r"adapter\.scale: expected a number > 0, got 0\.0"):
            adapters.from_config({"name": "mlp_shift", "scale": 0.0})
        with pytest.raises(
            UserError, match="mlp_shift does not fit ResNet; it needs MLPs whose last layer is called fc2"
        ):
            adapters.inject_adapter(timm.create_model("resnet18"), adapter)
        namespace = {"network": timm.create_model("vit_tiny_patch16_224", depth=1), "MLPShift": type(adapter)}
        exec(program, namespace)
        assert namespace["trained"] == {"blocks.0.mlp.shift": "blocks.0.mlp.shift.vector"}
    finally:
        sys.modules.pop("recast_exp.adapters.mlp_shift", None)


def test_the_example_dataset_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(DOCS / "adding-a-dataset.md", "python")
    (preset,) = blocks(DOCS / "adding-a-dataset.md", "yaml")
    assert OmegaConf.create(preset) == {"name": "leaves"}
    modules, root = tmp_path / "modules", tmp_path / "data" / "leaves"
    modules.mkdir()
    (modules / "leaves.py").write_text(code, encoding="utf-8")
    (root / "images").mkdir(parents=True)
    rows = [f"{split}-{name}.png,{name},{split}" for split in ("train", "test") for name in ("oak", "ash")] * 2
    rows = [f"{number}-{row}" for number, row in enumerate(rows)]
    for row in rows:
        Image.new("RGB", (8, 8), (40, len(row), 0)).save(root / "images" / row.split(",")[0])
    monkeypatch.setattr(sets, "__path__", [*sets.__path__, str(modules)])
    importlib.invalidate_caches()
    try:
        assert "leaves" in data.names()
        with pytest.raises(MissingInputError, match=r"no file .*leaves\.csv"):
            load("leaves", tmp_path / "data")
        table = root / "leaves.csv"
        table.write_text("\n".join(["file,species,split", *rows]), encoding="utf-8")
        images = load("leaves", tmp_path / "data", val_fraction=0.5)
        assert images.classes == ("ash", "oak")
        assert {split: len(samples) for split, samples in images.splits.items()} == {"train": 2, "val": 2, "test": 4}
        for samples in images.splits.values():
            names = [path.stem.rpartition("-")[2] for path in samples.images]
            assert names == [images.classes[label] for label in samples.labels]
        assert len(load("leaves", path=str(root)).splits["test"]) == 4
        table.write_text("\n".join(["file,species,split", *rows, "a.png,oak,late"]), encoding="utf-8")
        with pytest.raises(UserError, match=r"leaves\.csv, line 10: expected one of train, val, test, got 'late'"):
            load("leaves", tmp_path / "data")
    finally:
        sys.modules.pop("recast_exp.data.sets.leaves", None)


def test_the_example_backbones_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listing, script = blocks(DOCS / "adding-a-backbone.md", "python")
    exec(listing, {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6
    assert printed[0] == "layers.0.blocks.attn.qkv.0 ('layers.0.blocks.0.attn.qkv', 'layers.0.blocks.1.attn.qkv')"

    (preset,) = blocks(DOCS / "adding-a-backbone.md", "yaml")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "swin_att.yaml").write_text(preset, encoding="utf-8")
    swin = CommandLine(("model=swin_att", "dataset=cifar10"), config_dir=str(tmp_path), inputs=False)
    (job,) = check(swin).jobs
    settings = job.settings
    groups = find_groups(blueprint(settings.model), targets=settings.recast.targets)
    num_sets = settings.recast.num_coefficient_sets
    assert sum(len(group.layers) * num_sets * group.num_templates for group in groups) == 48
    check_model(settings.model, settings.recast, settings.mimicry, settings.adapter)

    (tmp_path / "small_vit.py").write_text(script, encoding="utf-8")
    runpy.run_path(str(tmp_path / "small_vit.py"), run_name="small_vit")
    typed = ("model=recast", "model.backbone=small_vit", "model.weights=small_vit.safetensors", "dataset=cifar10")
    found = check(CommandLine(typed, inputs=False))
    assert found.wrong == []
    settings = found.jobs[0].settings
    check_model(settings.model, settings.recast, settings.mimicry, settings.adapter)
    assert input_spec(settings.model).size == 32
    network = timm.create_model("small_vit", num_classes=0)
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Page, arguments, and the errors, of every command of the program that stands in a console's block."""
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for block in blocks(page, "console"):
            for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                typed, _, output = command.replace("\\\n", " ").partition("\n")
                quoted = re.search(r'--wrap "(.*)"', typed)
                if found := re.search(r"python -m recast_exp(?: +(.*))?$", quoted[1] if quoted else typed):
                    if (found[1] or "").split("#")[0].split()[:1] == ["doctor"]:
                        continue  # which composes nothing: tests/cli/test_doctor.py
                    errors = [line for line in output.splitlines() if line.startswith("error: ")]
                    yield page.name, " ".join((found[1] or "").split()), errors


def test_the_recipes_are_those_that_a_run_prints() -> None:
    found = []
    for page in (ROOT / "README.md", DOCS / "index.md", DOCS / "usage.md"):
        for block in blocks(page, "console"):
            for typed, recipe in re.findall(
                r"^\$ (?:make run|python -m recast_exp)(.*)\n(Recipe: .*)", block, re.MULTILINE
            ):
                line = CommandLine(tuple(shlex.split(typed, comments=True)), inputs=False)
                (job,) = check(line).jobs
                assert recipe == recipe_line(job.settings, job.sources)
                found.append(page.name)
    assert found == ["README.md", "index.md", "usage.md"]


def test_the_example_of_local_settings_works(tmp_path: Path) -> None:
    """Those of a machine, in a folder of the user's own."""
    (example,) = (block for block in blocks(DOCS / "usage.md", "yaml") if "data_dir" in block)
    (tmp_path / "local.yaml").write_text(example, encoding="utf-8")
    for typed in ((), ("data_dir=here", "logger=csv", "model.weights=null")):
        found = check(CommandLine(typed, inputs=False, config_dir=str(tmp_path)))
        assert found.wrong == []
        settings = found.jobs[0].settings
        expected = (
            ("here", "csv", None) if typed else ("/path/to/datasets", "tensorboard", "/path/to/weights.safetensors")
        )
        assert (settings.data_dir, settings.logger.name, settings.model.weights) == expected


COMMANDS = list(commands())
accepted: set[str] = set()
"""Flags and overrides that stood in a command which was accepted: to compose takes most of the time."""


def test_there_are_commands_in_the_docs() -> None:
    assert len({page for page, _, _ in COMMANDS}) >= 8
    assert len(COMMANDS) >= 40


class Remembering(Composer):
    """Composes what several commands share once."""

    composed: ClassVar[dict[tuple[str, ...], Composed]] = {}
    listed: ClassVar[dict[str, list[str]]] = {}

    def groups(self) -> dict[str, list[str]]:
        if not self.listed:
            self.listed.update(super().groups())
        return {group: list(options) for group, options in self.listed.items()}

    def compose(self, choices: Sequence[str] = ()) -> Composed:
        key = (*self.hydra_overrides, "", *choices)
        if key not in self.composed:
            self.composed[key] = super().compose(choices)
        return self.composed[key]


def every_value_once(overrides: list[str]) -> Iterator[list[str]]:
    """Single jobs that together have every value of a sweep, without every combination."""
    choices = [
        [f"{key}={value}" for value in values.split(",")] if not set(values) & set("[({") else [f"{key}={values}"]
        for key, _, values in (text.partition("=") for text in overrides)
    ]
    choices = [values[:1] if values[0].startswith("seed=") else values for values in choices]
    for number in range(max(map(len, choices), default=1)):
        yield [values[number % len(values)] for values in choices]


def not_there(*_: object, **__: object) -> str:
    raise LocalEntryNotFoundError("offline")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "errors"),
    [pytest.param(typed, errors, id=f"{page}: {typed}") for page, typed, errors in COMMANDS],
)
def test_the_command_is_accepted(typed: str, errors: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "Composer", Remembering)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", not_there)  # nobody waits for the network
    monkeypatch.chdir(ROOT)
    args, unknown = cli._parser().parse_known_intermixed_args(shlex.split(typed, comments=True))
    assert unknown == []
    assert args.config_dir is None
    overrides = [text for text in args.overrides if not text.startswith("resume=")]  # there is no such folder
    for text in overrides:
        if text.startswith("launcher=") and (missing := launchers.problem(text[9:], multirun=True, here=False)):
            pytest.skip(missing)
    if any(text.startswith("experiment=paper") for text in overrides):  # all of it is checked elsewhere
        given = {text.partition("=")[0] for text in overrides}
        overrides += [f"{each}" for each in ("method=vit_probe", "dataset=cub") if each.partition("=")[0] not in given]
    found: list[str] = []
    for chosen in [overrides] if errors else every_value_once(overrides):
        parts = {f"multirun={args.multirun}", *chosen}
        if errors or not parts <= accepted:
            wrong = check(CommandLine(tuple(chosen), args.multirun, inputs=False)).wrong
            accepted.update(() if wrong else parts)
            found += wrong
    assert [f"error: {line}" for line in found] == errors
