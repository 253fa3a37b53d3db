"""All that is used of Hydra beyond its public interface: one place to look when Hydra changes.

`tests/config/test_hydra_api.py` holds the contract: what is composed here is what Hydra composes.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import run_job, setup_globals
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from recast_exp.config.schema import Config

VERSION_BASE = "1.3"
JOB_NAME = "recast_exp"
_MODULE = "recast_exp.cli.main"  # Hydra takes a relative --config-path from there


def parser() -> argparse.ArgumentParser:
    """The parser of Hydra's flags."""
    made: argparse.ArgumentParser = get_args_parser()
    return made


def search_path(config_path: str, config_dir: str | None) -> ConfigSearchPath:
    """Where Hydra looks for options: `--config-dir` first, then the folder of the configuration."""
    version.setbase(VERSION_BASE)
    setup_globals()
    path = create_automatic_config_search_path(None, _MODULE, config_path)
    if config_dir is not None:
        folder = f"file://{Path(config_dir).absolute()}"
        path.prepend(provider="command-line", path=folder, anchor=SearchPathQuery(provider="schema"))
    return path


class Loader(ConfigLoaderImpl):
    """Hydra's loader, which gives a launcher the jobs of a sweep as they were checked instead of composing them again.

    Args:
        path: Where it looks for options.
    """

    def __init__(self, path: ConfigSearchPath) -> None:
        super().__init__(path)
        self.jobs: dict[tuple[str, ...], Mapping[str, object]] = {}
        """By its overrides, each job's composed configuration, as plain values with their interpolations."""
        self.file: Path | None = None
        """sweep.json, which has the same for a launcher's other processes."""
        self._shared: dict[str, CachingConfigRepository] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"jobs": {}, "_shared": {}}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """A job's configuration, for Hydra's launchers."""
        content = self._checked(tuple(sweep_overrides))
        if content is None:  # a search chooses its jobs as it goes
            made: DictConfig = super().load_sweep_config(master_config, sweep_overrides)
            return made
        cfg = copy.deepcopy(master_config)  # with what its resolvers have said: all jobs share the sweep's folder
        put(cfg, content)
        with open_dict(cfg):
            cfg.hydra.overrides.task = list(sweep_overrides)
            cfg.hydra.job.override_dirname = ",".join(sorted(sweep_overrides))
        return cfg

    def _checked(self, overrides: tuple[str, ...]) -> Mapping[str, object] | None:
        if not self.jobs and self.file is not None and self.file.is_file():
            jobs = json.loads(self.file.read_text(encoding="utf-8"))["jobs"]
            self.jobs = {tuple(job["overrides"]): job["config"] for job in jobs if job.get("config")}
        return self.jobs.get(overrides)

    def forget(self) -> None:
        """Look at all files again: an option has been added."""
        self._shared.clear()

    def shared_repository(self, name: str, overrides: Sequence[str]) -> CachingConfigRepository:
        """The files that configurations are composed from, each read once. What is loaded must not be changed."""
        paths = [text for text in overrides if text.startswith("hydra.searchpath=")]
        known = " ".join([name, *paths])
        if known not in self._shared:
            self._shared[known] = self._parse_overrides_and_create_caching_repo(name, paths)[1]
        return self._shared[known]


def put(whole: DictConfig, content: Mapping[str, object]) -> None:
    """Put a job's configuration, as it was checked, in the place of the one that Hydra composed with its own node."""
    with open_dict(whole):
        for name in [name for name in whole if name != "hydra"]:
            del whole[name]
        whole.merge_with(OmegaConf.merge(OmegaConf.structured(Config), content))


def groups(loader: Loader, name: str, overrides: Sequence[str]) -> dict[str, list[str]]:
    """All groups, Hydra's too (`hydra/launcher`), and their options.

    Hydra's public `get_group_options` copies all that it has loaded, once for each group: seconds.
    """
    repository = loader.shared_repository(name, overrides)
    found: dict[str, list[str]] = {}
    names = repository.get_group_options("", ObjectType.GROUP)
    while names:
        group = names.pop()
        found[group] = repository.get_group_options(group, ObjectType.CONFIG)
        names += [f"{group}/{inner}" for inner in repository.get_group_options(group, ObjectType.GROUP)]
    return {group: options for group, options in sorted(found.items()) if options}


Part = tuple[str, dict[str, object]]
"""A file below the folder of the configuration, without its extension, and what it sets, by section."""


class Plan(NamedTuple):
    """What a choice of options is composed of.

    Attributes:
        parts: In order; later ones win.
        choices: The option of every group.
        values: Overrides of values, which come after all parts.
    """

    parts: list[Part]
    choices: dict[str, str | None]
    values: list[str]


class Planner:
    """Finds out what choices of options are composed of.

    Hydra's list of defaults takes most of the time of a composition. Where choices differ only in options that bring no
    defaults of their own, as those of most datasets, they share one list.

    Args:
        loader: The loader.
        name: The primary configuration.
    """

    def __init__(self, loader: Loader, name: str) -> None:
        self._loader = loader
        self._name = name
        self._plans: dict[tuple[str, ...], Plan] = {}

    def plan(self, overrides: Sequence[str]) -> Plan:
        """The parts that overrides choose, for a single job."""
        repository = self._loader.shared_repository(self._name, overrides)
        plain = dict(self._without_defaults(repository, overrides))
        known = tuple(f"{text.partition('=')[0]}=*" if text in plain else text for text in overrides)
        if known not in self._plans:
            self._plans[known] = self._planned(repository, overrides)
        found = self._plans[known]
        chosen = {text.partition("=")[0]: path for text, path in plain.items()}
        parts = [
            _part(repository, chosen[group], group.replace("/", "."))
            if (group := file.rpartition("/")[0]) in chosen
            else (file, content)
            for file, content in found.parts
        ]
        options: dict[str, str | None] = {group: path.rpartition("/")[2] for group, path in chosen.items()}
        return Plan(parts, found.choices | options, found.values)

    @staticmethod
    def _without_defaults(repository: CachingConfigRepository, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
        for text in overrides:
            group, _, option = text.partition("=")
            path = f"{group}/{option}"
            if re.fullmatch(r"[\w/]+", group) and not group.startswith("hydra") and repository.config_exists(path):
                loaded = repository.load_config(path)
                if loaded is not None and all(default.is_self() for default in loaded.defaults_list or ()):
                    yield text, path

    def _planned(self, repository: CachingConfigRepository, overrides: Sequence[str]) -> Plan:
        defaults = create_defaults_list(
            repo=repository,
            config_name=self._name,
            overrides_list=OverridesParser.create().parse_overrides(list(overrides)),
            prepend_hydra=True,
            skip_missing=False,
        )
        parts = [
            _part(repository, default.config_path, default.package or "")
            for default in defaults.defaults
            if default.config_path not in (None, "schema") and not default.config_path.startswith("hydra/")
        ]
        values = [override.input_line or "" for override in defaults.config_overrides]
        return Plan(parts, dict(defaults.overrides.known_choices), values)


def _part(repository: CachingConfigRepository, path: str, package: str) -> Part:
    loaded = repository.load_config(path)
    assert loaded is not None
    content = OmegaConf.to_container(loaded.config, resolve=False)
    if not isinstance(content, dict):
        raise ValueError(f"{path}.yaml: expected keys with values, got a list")
    plain = {str(key): value for key, value in content.items() if key not in ("defaults", "hydra")}
    header = loaded.header["package"]
    for name in reversed((package if header is None else header.replace("_global_", "")).split(".")):
        plain = {name: plain} if name else plain
    return path, plain


def run(loader: Loader, cfg: DictConfig, task: Callable[[DictConfig], object]) -> object:
    """Run one job.

    Args:
        loader: The loader.
        cfg: Its configuration, with the node `hydra`.
        task: What is called with the configuration.

    Returns:
        What `task` returns.

    Raises:
        Exception: What `task` raises.
    """
    context = _context(loader, cfg)
    if cfg.hydra.mode is None:
        cfg.hydra.mode = RunMode.RUN
    context.callbacks.on_run_start(config=cfg, config_name=cfg.hydra.job.config_name)
    returned = run_job(
        hydra_context=context, task_function=task, config=cfg, job_dir_key="hydra.run.dir", job_subdir_key=None
    )
    context.callbacks.on_run_end(config=cfg, config_name=cfg.hydra.job.config_name, job_return=returned)
    return returned.return_value


def sweep(loader: Loader, cfg: DictConfig, task: Callable[[DictConfig], object]) -> object:
    """Run the jobs of a sweep through its sweeper and its launcher.

    Args:
        loader: The loader.
        cfg: The configuration that the jobs share, with the node `hydra`.
        task: What is called with the configuration of each job.
    """
    context = _context(loader, cfg)
    context.callbacks.on_multirun_start(config=cfg, config_name=cfg.hydra.job.config_name)
    sweeper = Plugins.instance().instantiate_sweeper(config=cfg, hydra_context=context, task_function=task)
    result = sweeper.sweep(arguments=list(cfg.hydra.overrides.task))
    context.callbacks.on_multirun_end(config=cfg, config_name=cfg.hydra.job.config_name)
    return result


def _context(loader: Loader, cfg: DictConfig) -> HydraContext:
    GlobalHydra.instance().clear()
    GlobalHydra.instance().initialize(Hydra(task_name=JOB_NAME, config_loader=loader))
    return HydraContext(config_loader=loader, callbacks=Callbacks(cfg))


def merge(base: dict[str, object], over: Mapping[str, object]) -> Iterator[str]:
    """Merge a nested mapping into another in place, as OmegaConf does: mappings key by key, all else replaced.

    Yields:
        The dotted names of the values that were set.
    """
    for name, value in over.items():
        present = base.get(name)
        if isinstance(value, dict) and isinstance(present, dict) and value:
            yield from (f"{name}.{inner}" for inner in merge(present, value))
        else:
            if not (isinstance(value, dict) and isinstance(present, dict)):
                base[name] = copy.deepcopy(value)
            yield from (f"{name}{inner}" for inner in _leaves(value))


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from (f".{name}{rest}" for rest in _leaves(inner))
    else:
        yield ""
