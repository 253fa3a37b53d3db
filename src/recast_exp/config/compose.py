"""Hydra's composition without Hydra's main: the folder of the configuration, the schema, the seeds, the groups."""

from __future__ import annotations

import copy
import dataclasses
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import recast_exp
from recast_exp.config import keys
from recast_exp.config import schema as config
from recast_exp.errors import RecastError, UserError

VERSION_BASE = "1.3"
CONFIG_NAME = "config"

OPTIONAL = "experiment", "method"
"""Groups of which no option may be chosen."""

_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)
_TASK_MODULE = "recast_exp.cli.main"  # Hydra takes a relative --config-path from there


def conf_dir() -> Path:
    """The folder of the configuration: inside the package (a wheel) or at the top of the checkout."""
    package = Path(recast_exp.__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parents[1] / "conf"


def run_token() -> str:
    """Six random characters, so that two runs started in one second never share a folder."""
    return secrets.token_hex(3)


def register() -> None:
    """Give Hydra the schema, `experiment=null`, `method=null` and the resolver `run_token`; harmless when repeated."""
    store = ConfigStore.instance()
    store.store(name="schema", node=config.Config)
    # Hydra knows null in a defaults list, but not on the command line.
    for group in OPTIONAL:
        store.store(group=group, name="null", package="_global_", node={})
    # Cached: the folder of a run, and of all jobs of a sweep, is resolved several times and stays one.
    OmegaConf.register_new_resolver("run_token", run_token, use_cache=True, replace=True)


@dataclasses.dataclass(frozen=True)
class Composed:
    """What Hydra makes of a choice of options."""

    cfg: DictConfig
    """Our configuration, without the node `hydra`."""
    hydra: DictConfig
    """All of it, with the node `hydra`."""
    choices: dict[str, str | None]
    """The option of every group."""
    is_sweep: bool
    """Whether a file says hydra.mode: MULTIRUN."""
    sweep_parameters: dict[str, Any]
    """What a file sets under hydra.sweeper.params."""


class Composer:
    """Composes as hydra.main would, without its global state, and says in one line what went wrong.

    Args:
        config_name: The primary configuration.
        config_path: The user's `--config-path`, instead of `conf_dir`.
        config_dir: The user's `--config-dir`, which adds options to the groups.
        hydra_overrides: Overrides of Hydra's own keys.
    """

    def __init__(
        self,
        config_name: str = CONFIG_NAME,
        config_path: str | None = None,
        config_dir: str | None = None,
        hydra_overrides: Sequence[str] = (),
    ) -> None:
        version.setbase(VERSION_BASE)
        setup_globals()
        register()
        search_path = create_automatic_config_search_path(None, _TASK_MODULE, config_path or str(conf_dir()))
        if config_dir is not None:
            path = f"file://{Path(config_dir).absolute()}"
            search_path.prepend(provider="command-line", path=path, anchor=SearchPathQuery(provider="schema"))
        self.loader = ConfigLoaderImpl(search_path)
        self.config_name = config_name
        self.hydra_overrides = list(hydra_overrides)
        self._composed: dict[tuple[str, ...], Composed | UserError] = {}

    def groups(self) -> dict[str, list[str]]:
        """All groups, Hydra's too (`hydra/launcher`), and their options.

        Raises:
            UserError: If the primary configuration or the search path is not there.
        """
        search_path = [text for text in self.hydra_overrides if text.startswith("hydra.searchpath=")]
        try:
            # The public get_group_options copies all that Hydra has loaded, once for each group: seconds.
            _, repository = self.loader._parse_overrides_and_create_caching_repo(self.config_name, search_path)
            found: dict[str, list[str]] = {}
            names = repository.get_group_options("", ObjectType.GROUP)
            while names:
                name = names.pop()
                found[name] = repository.get_group_options(name, ObjectType.CONFIG)
                names += [f"{name}/{inner}" for inner in repository.get_group_options(name, ObjectType.GROUP)]
        except _ERRORS as error:
            raise UserError(describe(error)) from error
        return {name: options for name, options in sorted(found.items()) if options}

    def option_content(self, group: str, option: str) -> dict[str, Any]:
        """The dotted keys that an option of a group sets by itself, interpolations as they stand."""
        loaded = self.loader.repository.load_config(f"{group}/{option}")
        if loaded is None or not isinstance(loaded.config, DictConfig):
            return {}
        package = loaded.header["package"]
        prefix = "" if package == "_global_" else f"{package or group.replace('/', '.')}."
        content = OmegaConf.to_container(loaded.config, resolve=False)
        assert isinstance(content, dict)
        return dict(keys.leaves({str(name): value for name, value in content.items()}, prefix))

    def compose(self, choices: Sequence[str] = ()) -> Composed:
        """Compose a choice of options (`group=option`), each choice once.

        Raises:
            UserError: If Hydra cannot. One line: the key and the file, where Hydra names them.
        """
        known = tuple(choices)
        if known not in self._composed:
            try:
                self._composed[known] = self._compose([*self.hydra_overrides, *choices])
            except _ERRORS as error:
                self._composed[known] = UserError(describe(error))
        result = self._composed[known]
        if isinstance(result, RecastError):
            raise result
        return result

    def _compose(self, texts: list[str]) -> Composed:
        while True:
            try:
                cfg = self.loader.load_configuration(self.config_name, texts, RunMode.RUN)
                break
            except MissingConfigException as error:  # a user's file may choose a seed that has no preset
                group, _, name = (error.missing_cfg_file or "").rpartition("/")
                if group != "seed" or not store_seed(name, error.options or ()):
                    raise
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        parameters = OmegaConf.to_container(OmegaConf.create(OmegaConf.select(cfg, "hydra.sweeper.params") or {}))
        assert isinstance(choices, dict)
        assert isinstance(parameters, dict)
        is_sweep = cfg.hydra.mode == RunMode.MULTIRUN
        whole = copy.deepcopy(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        by_name = {str(key): value for key, value in parameters.items()}
        return Composed(cfg, whole, {str(key): value for key, value in choices.items()}, is_sweep, by_name)


def store_seed(name: str, options: Sequence[str]) -> bool:
    """Make an option of the group `seed` out of a whole number, unless there is one of that name already.

    Args:
        name: The number as text.
        options: The options that the group has; storing one of them again would make Hydra warn.

    Returns:
        Whether an option was added: not for one that exists, or for what is not a seed.
    """
    if name in options or not re.fullmatch(r"\d{1,10}", name) or int(name) >= 2**32:
        return False
    ConfigStore.instance().store(group="seed", name=name, package="_global_", node={"seed": int(name)})
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def describe(error: BaseException) -> str:
    """Say in one line why Hydra failed: the key and the file, where it names them, else its own first line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}: line {error.problem_mark.line + 1}: {error.problem}"
    text = f"{error}\n{error.__cause__}" if error.__cause__ else str(error)
    launcher_key = re.match(r".*override '?(hydra\.launcher\.[\w.]+)", text)
    if launcher_key:
        reason = first_line(error.__cause__ or error).rstrip(".")
        return f"{launcher_key[1]}: {reason}; launcher=NAME --cfg hydra -p hydra.launcher lists what a launcher takes"
    file = re.match(r"In '([^']*)'", text)
    place = f" (in {file[1]}.yaml)" if file else ""
    full_key = re.search(r"full_key: (\S+)", text)
    if full_key and not full_key[1].startswith("hydra"):
        field = keys.field_of(full_key[1])
        if field is None:
            return keys.unknown(full_key[1], ()) + place
        value = re.search(r"Value '(.*?)'", text)
        got = f"got {value[1]!r}, " if value else ""
        return f"{full_key[1]}: {got}takes {config.accepted(field)}{place}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        return keys.unknown_option(group, option, error.options)
    return first_line(Exception(text))
