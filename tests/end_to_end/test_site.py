"""The documentation site: builds without a warning, needs no network to be read, and names every key and option."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recast_exp import adapters, heads, stages
from recast_exp.config import schema as config
from recast_exp.config.compose import conf_dir
from recast_exp.config.fields import accepted
from recast_exp.plugins import DATASETS
from recast_exp.training import objectives

DOCS = Path(__file__).parents[2] / "docs"

pytest.importorskip("sphinx", reason="needs the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, with its notebook as it is written; `make docs` runs it, too."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-D", "nb_execution_mode=off"]
    command = [sys.executable, "-m", "sphinx", *options, "-b", "html", str(DOCS), str(folder / "html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>""", html) == []
    for style in site.rglob("*.css"):
        assert re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", style.read_text(encoding="utf-8")) == []


@pytest.mark.slow
def test_what_is_generated_is_on_its_pages(site: Path) -> None:
    """Formulas are MathML, keys have anchors, functions their docstrings."""
    method = (site / "method.html").read_text(encoding="utf-8")
    assert method.count("<math") > 20
    assert "\\sum" not in method
    configuration = (site / "configuration.html").read_text(encoding="utf-8")
    assert 'id="confval-optimizer.coefficients_lr"' in configuration
    library = (site / "api.html").read_text(encoding="utf-8")
    assert 'id="method-title"' in (site / "index.html").read_text(encoding="utf-8")
    assert "5,994 / – / 5,794" in (site / "datasets.html").read_text(encoding="utf-8")
    for name in ("find_groups", "mimic", "inject", "merge", "Banks"):
        assert f'id="recast_exp.{name}"' in library


def test_the_reference_has_every_key_and_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "_ext")
    configuration = importlib.import_module("configuration")
    page = configuration.page()
    for name, field in config.fields():
        described = page.split(f"{{confval}} {name}\n", 1)[1].split("```", 1)[0]
        assert accepted(field) in described
        assert field.metadata["help"][1:] in described
    for group, plugins in (("adapter", adapters), ("head", heads), ("stage", stages), ("training", objectives)):
        for name in plugins.names():
            options = dataclasses.fields(plugins.load(name))
            section = page.split(f"### {group}={name}\n", 1)[1].split("\n##", 1)[0] if options else ""
            for option in options:
                # The second plug-in with the same option has no anchor of its own for it.
                entries = (f"```{{confval}} {group}.{option.name}\n", f"`{group}.{option.name}`\n: ")
                assert sum(section.count(entry) for entry in entries) == 1, f"{group}={name} {option.name}"
                assert option.metadata["help"][1:] in section
    overview = page.split("## Keys of the run", 1)[0]
    for preset in conf_dir().glob("*/*.yaml"):
        option = f"{preset.parent.name}={preset.stem}"
        if not option.startswith("hydra="):
            said = page.split(f"\n`{option}`\n:", 1)[1].split("\n", 1)[0]
            assert said.strip(), f"{preset} has no comment that says what it is"
            assert f"`{preset.stem}`" in overview.split(f"[`{preset.parent.name}`]", 1)[1].split("\n", 1)[0]


def test_a_new_option_or_group_needs_no_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "_ext")
    conf = shutil.copytree(conf_dir(), tmp_path / "conf")
    (conf / "model" / "mine.yaml").write_text("# @package _global_\n# A model of mine.\nmodel:\n  name: mine\n")
    (conf / "colour").mkdir()
    (conf / "colour" / "red.yaml").write_text("# Red.\nname: red\n")
    page = importlib.import_module("configuration").page(conf)
    assert "\n`model=mine`\n: A model of mine.\n" in page
    assert "\n## colour\n\n`colour=red`\n: Red.\n" in page
    assert "| [`colour`](#colour) | `red` |" in page


def test_the_table_of_datasets_has_every_published_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "_ext")
    rows = importlib.import_module("configuration").sets().splitlines()[2:]
    listed = [row.split("`")[1] for row in rows]
    assert listed == [name for name in DATASETS.names() if hasattr(DATASETS.load(name), "layout")]
    assert "| `flowers` | 102 | 1,020 / 1,020 / 6,149 | `flowers-102` |" in rows
