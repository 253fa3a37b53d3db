"""What Hydra needs before it can compose: the folder of the configuration, the schema, the seeds, the resolver."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf

from recast_exp.config import Config

VERSION_BASE = "1.3"
CONFIG_NAME = "config"
MODULE = "recast_exp.cli"
"""The module of the task function, which Hydra takes a relative --config-path from."""


def conf_dir() -> Path:
    """The folder of the configuration: inside the package (a wheel) or at the top of the checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def run_token() -> str:
    """Six random characters, so that two runs started in one second never share a folder."""
    return secrets.token_hex(3)


def register() -> None:
    """Give Hydra the schema and the resolver `run_token`; harmless when repeated."""
    ConfigStore.instance().store(name="schema", node=Config)
    # Cached: the folder of a run, and of all jobs of a sweep, is resolved several times and stays one.
    OmegaConf.register_new_resolver("run_token", run_token, use_cache=True, replace=True)


def open_loader(config_path: str | None = None, config_dir: str | None = None) -> ConfigLoaderImpl:
    """The loader that hydra.main would use, without its global state.

    Args:
        config_path: The user's `--config-path`, instead of `conf_dir`.
        config_dir: The user's `--config-dir`, which adds options to the groups.
    """
    version.setbase(VERSION_BASE)
    setup_globals()
    register()
    search_path = create_automatic_config_search_path(None, MODULE, config_path or str(conf_dir()))
    if config_dir is not None:
        path = f"file://{Path(config_dir).absolute()}"
        search_path.prepend(provider="command-line", path=path, anchor=SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


def list_groups(loader: ConfigLoaderImpl, config_name: str | None, overrides: list[str]) -> dict[str, list[str]]:
    """All groups, Hydra's too (`hydra/launcher`), and their options.

    Args:
        loader: The loader.
        config_name: The primary configuration, which may add to the search path.
        overrides: Overrides of the search path.
    """
    # The public get_group_options copies everything that Hydra has loaded, once for each group.
    _, repository = loader._parse_overrides_and_create_caching_repo(config_name, overrides)
    found: dict[str, list[str]] = {}
    names = repository.get_group_options("", ObjectType.GROUP)
    while names:
        name = names.pop()
        options = repository.get_group_options(name, ObjectType.CONFIG)
        if options:
            found[name] = options
        names += [f"{name}/{inner}" for inner in repository.get_group_options(name, ObjectType.GROUP)]
    return dict(sorted(found.items()))


def option_content(loader: ConfigLoaderImpl, group: str, option: str) -> dict[str, Any]:
    """The dotted keys that an option of a group sets by itself, and the values that need no other key."""
    loaded = loader.repository.load_config(f"{group}/{option}")
    if loaded is None or not isinstance(loaded.config, DictConfig):
        return {}
    package = loaded.header["package"]
    prefix = "" if package == "_global_" else f"{package or group.replace('/', '.')}."
    content = OmegaConf.to_container(loaded.config, resolve=False)
    assert isinstance(content, dict)
    return dict(leaves({str(name): value for name, value in content.items()}, prefix))


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
