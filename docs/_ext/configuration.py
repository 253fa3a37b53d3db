"""The reference of the configuration, written at every build from what the program itself reads.

Keys, types, ranges, defaults and help texts are those of the dataclasses in `recast_exp.config.schema`, and of the
classes of adapters and stages. Options are the files of `conf/`, described by their first comment. The counts of the
datasets are those of their layouts. The results replace the markers in `configuration.md` and `datasets.md`, so that a
new option, adapter, stage or dataset needs no edit here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from sphinx.application import Sphinx

from recast_exp import adapters, heads, stages
from recast_exp.config import schema as config
from recast_exp.config.compose import conf_dir
from recast_exp.config.fields import accepted
from recast_exp.data.types import SPLITS
from recast_exp.plugins import DATASETS
from recast_exp.training import objectives

TITLES = {
    "model": "The backbone and what trains in it",
    "recast": "Templates and coefficients",
    "mimicry": "The solver that finds templates and coefficients",
    "head": "The classifier: trained with the rest, or solved",
    "training": "What gradient descent minimises",
    "adapter": "A second method on the backbone",
    "method": "A row of the results: model, adapter and recipe together",
    "dataset": "Images, splits and batches",
    "optimizer": "The optimiser",
    "scheduler": "The learning rate over the epochs",
    "trainer": "Device, precision and length of training",
    "stage": "What the command does",
    "experiment": "Whole experiments",
    "logger": "Trackers",
    "launcher": "What starts the jobs of a sweep",
    "search": "Searching instead of sweeping",
    "seed": "Seeds",
}
"""Titles of the sections that have one, in the order of the page. A group without a title follows under its name."""


def page(conf: Path | None = None) -> str:
    """The reference, in Markdown.

    Args:
        conf: The folder of the config groups; None is the program's own.
    """
    conf = conf or conf_dir()
    groups = sorted({path.parent.name for path in conf.glob("*/*.yaml")} - {"hydra"})
    keys = dict(config.fields())
    lines = ["## At a glance", "", *_overview(conf, groups)]
    lines += ["## Keys of the run", "", *_keys({name: field for name, field in keys.items() if "." not in name})]
    for group in [*TITLES, *(group for group in groups if group not in TITLES)]:
        lines += [f"## {group}", "", *([f"{TITLES[group]}.", ""] if group in TITLES else [])]
        lines += _options(conf / group, group)
        if group == "adapter":
            lines += _adapters()
        elif group in _PLUGINS:
            lines += _plugins(group)
        elif group == "search":
            lines += _search(conf)
        lines += _keys({name: field for name, field in keys.items() if name.startswith(f"{group}.")})
    return "\n".join(lines)


def sets() -> str:
    """A table of the published datasets, in Markdown."""
    lines = ["| `dataset` | classes | train / val / test | folder below `data_dir` |", "|---|---|---|---|"]
    for name in DATASETS.names():
        module = DATASETS.load(name)
        if hasattr(module, "layout"):
            layout = module.layout(config.DatasetConfig(name=name))
            counts = " / ".join(f"{layout.images[split]:,}" if split in layout.images else "–" for split in SPLITS)
            lines.append(f"| `{name}` | {layout.num_classes} | {counts} | `{layout.folder}` |")
    return "\n".join(lines)


MARKERS = {
    "configuration": ("<!-- generated -->", page),
    "datasets": ("<!-- generated: sets -->", sets),
}
"""What is generated, by page."""


def _overview(conf: Path, groups: list[str]) -> Iterator[str]:
    """A table of all groups and their options."""
    yield from ("| group | options |", "|---|---|")
    for group in [*(group for group in TITLES if group in groups), *(group for group in groups if group not in TITLES)]:
        options = ", ".join(f"`{path.stem}`" for path in _files(conf / group))
        yield f"| [`{group}`](#{group}) | {options}{', or any other integer' if group == 'seed' else ''} |"
    yield ""


def _keys(fields: dict[str, dataclasses.Field[Any]]) -> Iterator[str]:
    for name, field in fields.items():
        help = field.metadata["help"]
        yield from (f"```{{confval}} {name}", f"{help[0].upper()}{help[1:]}.\\")
        yield from (f"Takes {accepted(field)}; default {_default(field)}.", "```", "")


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "empty" if value == "" else f"`{_text(value)}`"


def _options(folder: Path, group: str) -> Iterator[str]:
    """The options of a group, each with its comment and with what it sets."""
    for path in _files(folder):
        yield f"`{group}={path.stem}`"
        yield f": {comment(path)}"
        if settings := ", ".join(f"`{setting}`" for setting in _settings(path, group)):
            yield f"  Sets {settings}."
        yield ""


def _files(folder: Path) -> list[Path]:
    """The options of a group, `none` first."""
    return sorted(folder.glob("*.yaml"), key=lambda path: (path.stem != "none", path.stem))


def comment(path: Path) -> str:
    """What the first comment of a preset says; empty if there is none."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines)


def _settings(path: Path, group: str) -> Iterator[str]:
    """What a preset sets, as it would be typed; Hydra's own keys aside."""
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    for entry in content.pop("defaults", ()) if isinstance(content, dict) else ():
        if isinstance(entry, str):
            yield f"{group}={entry}"
        else:
            ((key, value),) = entry.items()
            yield f"{key.removeprefix('override ').removeprefix('/')}={value}"
    prefix = "" if "# @package _global_" in text else f"{group}."
    own_name = (f"{group}.name", path.stem)
    for key, value in _leaves(content, prefix) if isinstance(content, dict) else ():
        if not key.startswith("hydra.") and value not in (None, "", {}) and (key, value) != own_name:
            yield f"{key}={_text(value)}"


def _leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_text(each)}" for key, each in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _adapters() -> Iterator[str]:
    """The options of each adapter, under the names that the command line knows."""
    known: set[str] = set()
    for name in adapters.names():
        adapter = adapters.load(name)
        fields = {f"adapter.{field.name}": field for field in dataclasses.fields(adapter)}
        if fields:
            yield from (f"### adapter={name}", "", f"Needs {adapter.fits}.", "", *_own_keys(fields, known))


def _own_keys(fields: dict[str, dataclasses.Field[Any]], known: set[str]) -> Iterator[str]:
    """Options of a plug-in; one that an earlier plug-in has, too, has its place in the index there."""
    yield from _keys({key: field for key, field in fields.items() if key not in known})
    for key, field in fields.items():
        if key in known:
            help = field.metadata["help"]
            takes = f"Takes {accepted(field)}; default {_default(field)}."
            yield from (f"`{key}`", f": {help[0].upper()}{help[1:]}. {takes}", "")
    known.update(fields)


_PLUGINS: dict[str, tuple[Callable[[], list[str]], Callable[[str], type]]] = {
    "head": (heads.names, heads.load),
    "stage": (stages.names, stages.load),
    "training": (objectives.names, objectives.load),
}
"""Group → names and classes of its options."""


def _plugins(group: str) -> Iterator[str]:
    """The options of each option of a group."""
    names, load = _PLUGINS[group]
    known: set[str] = set()
    for name in names():
        if fields := {f"{group}.{field.name}": field for field in dataclasses.fields(load(name))}:
            yield from (f"### {group}={name}", "", *_own_keys(fields, known))


def _search(conf: Path) -> Iterator[str]:
    """Samplers and pruners, which are groups of Hydra's sweeper."""
    for part in ("sampler", "pruner"):
        yield from _options(conf / "hydra" / "sweeper" / part, f"hydra/sweeper/{part}")


def _insert(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname in MARKERS:
        marker, write = MARKERS[docname]
        assert marker in source[0]
        source[0] = source[0].replace(marker, write())


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages as they are read."""
    app.connect("source-read", _insert)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
