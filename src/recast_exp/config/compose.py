"""Hydra's composition without Hydra's main: the folder of the configuration, the schema, the seeds, the groups."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped, unused-ignore]
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp.config import grammar, hydra_api, keys
from recast_exp.config.fields import accepted
from recast_exp.config.presets import conf_dir as conf_dir
from recast_exp.config.schema import Config
from recast_exp.errors import RecastError, UserError, first_line
from recast_exp.files import user_path
from recast_exp.schemas import check_yaml

CONFIG_NAME = "config"

OPTIONAL = "experiment", "method"
"""Groups of which no option may be chosen."""

_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)


def run_token() -> str:
    """Six random characters, so that two runs started in one second never share a folder."""
    return secrets.token_hex(3)


def register() -> None:
    """Give Hydra the schema, `experiment=null`, `method=null` and the resolver `run_token`; harmless when repeated."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    # Hydra knows null in a defaults list, but not on the command line.
    for group in OPTIONAL:
        store.store(group=group, name="null", package="_global_", node={})
    # Cached: the folder of a run, and of all jobs of a sweep, is resolved several times and stays one.
    OmegaConf.register_new_resolver("run_token", run_token, use_cache=True, replace=True)


@dataclasses.dataclass(frozen=True)
class Composed:
    """What a choice of options makes."""

    cfg: DictConfig
    """The configuration, without the node `hydra`; interpolations as they stand."""
    choices: dict[str, str | None]
    """The option of every group."""
    sources: dict[str, str]
    """Dotted key → the file that set it last, without its extension (`dataset/digits`)."""


class Composer:
    """Composes as Hydra does, and says in one line what went wrong.

    Args:
        config_name: The primary configuration.
        config_path: The user's `--config-path`, instead of `conf_dir`.
        config_dir: The user's `--config-dir`, which adds options to the groups.
        hydra_overrides: Overrides of Hydra's own keys, and the launcher.

    Raises:
        UserError: If a folder of the user cannot be opened, if a file in it is no YAML, or would take too much memory.
    """

    def __init__(
        self,
        config_name: str = CONFIG_NAME,
        config_path: str | None = None,
        config_dir: str | None = None,
        hydra_overrides: Sequence[str] = (),
    ) -> None:
        register()
        check_config_dir(config_dir)
        for flag, folder in (("--config-path", config_path), ("--config-dir", config_dir)):
            for file in _yaml_files(flag, folder) if folder else ():
                check_yaml(file)
        if (local := conf_dir() / "local.yaml").is_file():
            check_yaml(local)
        self.loader = hydra_api.Loader(hydra_api.search_path(config_path or str(conf_dir()), config_dir))
        self.config_name = config_name
        self.hydra_overrides = list(hydra_overrides)
        self._composed: dict[tuple[str, ...], Composed | RecastError] = {}
        self._planner = hydra_api.Planner(self.loader, config_name)
        self._schema = OmegaConf.structured(Config)

    def groups(self) -> dict[str, list[str]]:
        """All groups, Hydra's too (`hydra/launcher`), and their options.

        Raises:
            UserError: If the primary configuration or the search path is not there.
        """
        try:
            return hydra_api.groups(self.loader, self.config_name, self.hydra_overrides)
        except _ERRORS as error:
            raise UserError(describe(error)) from error

    def option_content(self, group: str, option: str) -> dict[str, object]:
        """The dotted keys that an option of a group sets by itself, interpolations as they stand."""
        loaded = self.loader.repository.load_config(f"{group}/{option}")
        if loaded is None or not isinstance(loaded.config, DictConfig):
            return {}
        package = loaded.header["package"]
        prefix = "" if package == "_global_" else f"{package or group.replace('/', '.')}."
        content = OmegaConf.to_container(loaded.config, resolve=False)
        assert isinstance(content, dict)
        return dict(keys.leaves({str(name): value for name, value in content.items()}, prefix))

    def whole(self, overrides: Sequence[str] = (), *, multirun: bool = False) -> DictConfig:
        """Let Hydra compose everything, with the node `hydra`.

        Args:
            overrides: Overrides of a job; those of a sweep may have several values.
            multirun: Whether they are those of a sweep.

        Raises:
            UserError: If Hydra cannot. One line: the key and the file, where Hydra names them.
        """
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        own = [text for text in self.hydra_overrides if text not in overrides]  # a second `+key=` is an error
        texts = [*own, *overrides, *(["hydra.mode=MULTIRUN"] if multirun else [])]
        try:
            while True:
                try:
                    made: DictConfig = self.loader.load_configuration(self.config_name, texts, mode)
                    _check_logging(made)
                    _check_launch(made)
                    return made
                except MissingConfigException as error:
                    if not self._is_new_seed(error):
                        raise
        except KeyError as error:
            raise UserError(
                f"hydra.job.env_copy: expected environment variables that are set, got {error}, which is not"
            ) from error
        except RecursionError:
            raise _circle(overrides, self.config_name) from None
        except _ERRORS as error:
            raise UserError(describe(error)) from error

    def compose(self, choices: Sequence[str] = ()) -> Composed:
        """Compose a choice of options (`group=option`), each choice once.

        Files are read once for all choices, and the schema is applied once to what they make: fifteen times as fast as
        Hydra, whose own composition is asked where this one fails, for what is wrong and in which file.

        Raises:
            UserError: If it cannot be composed. One line: the key and the file, where Hydra names them.
        """
        known = tuple(choices)
        if known not in self._composed:
            try:
                self._composed[known] = self._compose([*self.hydra_overrides, *choices])
            except RecastError as error:
                self._composed[known] = error
            except RecursionError:
                self._composed[known] = _circle(choices, self.config_name)
            except _ERRORS as error:
                self._composed[known] = self._explained(choices, error)
        result = self._composed[known]
        if isinstance(result, RecastError):
            raise result
        return result

    def _compose(self, texts: list[str]) -> Composed:
        while True:
            try:
                parts, chosen, values = self._planner.plan(texts)
                break
            except MissingConfigException as error:  # a user's file may choose a seed that has no preset
                if not self._is_new_seed(error):
                    raise
        content: dict[str, object] = {}
        sources: dict[str, str] = {}
        for file, part in parts:
            sources |= dict.fromkeys(hydra_api.merge(content, part), file)
        cfg = OmegaConf.merge(self._schema, content)
        assert isinstance(cfg, DictConfig)
        for override in map(grammar.parse, values):
            if override is not None and not override.is_hydra_override():
                OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=keys.is_open(override.key_or_group))  # fmt: skip # noqa: E501
        return Composed(cfg, chosen, sources)

    def _explained(self, choices: Sequence[str], error: BaseException) -> RecastError:
        try:
            self.whole(choices)
        except RecastError as better:
            return better
        return UserError(describe(error))

    def _is_new_seed(self, error: MissingConfigException) -> bool:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        added = group == "seed" and store_seed(name, error.options or ())
        if added:
            self.loader.forget()  # that there was none
        return added


def check_config_dir(folder: str | None) -> None:
    """Refuse a `--config-dir` that is no folder.

    Raises:
        UserError: If it is none.
    """
    if folder is not None and not user_path(folder).is_dir():
        raise UserError(f"--config-dir: expected a folder with your own options, got {folder}, which is not there")


def _yaml_files(flag: str, folder: str) -> list[Path]:
    """The files that Hydra may read in a folder of the user.

    Raises:
        UserError: If the folder, or one in it, cannot be opened.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # Hydra says that itself, and knows folders of packages
            raise UserError(f"{flag}: {error.filename} cannot be opened ({error.strerror})") from error

    found = os.walk(user_path(folder), onerror=fail)
    return sorted(Path(root) / name for root, _, names in found for name in names if name.endswith(".yaml"))


def _check_logging(whole: DictConfig) -> None:
    """Refuse a logging section that Python cannot set up: Hydra would make the folder of the run first.

    Raises:
        UserError: One line.
    """
    job = str(whole.hydra.job._get_node("name"))
    if "/" in job:
        raise UserError(f"hydra.job.name: expected a name without a slash, as a file of the log has it, got {job!r}")
    for name in ("hydra_logging", "job_logging"):
        section = whole.hydra.get(name)
        if section is not None and section.get("version") != 1:
            raise UserError(
                f"hydra.{name}.version: expected 1, the format that Python knows, got {section.get('version')!r}"
            )


def _check_launch(whole: DictConfig) -> None:
    """Refuse what Hydra would stumble over when it starts jobs, after it has made their folder.

    Raises:
        UserError: One line.
    """
    for part in ("launcher", "sweeper"):
        target = str(OmegaConf.select(whole, f"hydra.{part}._target_"))
        if target not in Plugins.instance().class_name_to_class:
            raise UserError(
                f"hydra.{part}._target_: expected an installed plug-in of Hydra, got {target!r}; choose one with "
                f"hydra/{part}=NAME"
            )
    if OmegaConf.select(whole, "hydra.job.chdir"):
        raise UserError("hydra.job.chdir: expected false, as paths are those of the folder of the command, got true")
    batch = OmegaConf.select(whole, "hydra.sweeper.max_batch_size")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise UserError(f"hydra.sweeper.max_batch_size: expected an integer ≥ 1 or null, got {batch!r}")


def _circle(choices: Sequence[str], name: str) -> UserError:
    return UserError(f"{' '.join(choices) or name}: expected lists of defaults that end, got a circle")


def is_sweep(whole: DictConfig) -> bool:
    """Whether a file says hydra.mode: MULTIRUN."""
    return bool(whole.hydra.mode == RunMode.MULTIRUN)


def sweep_parameters(whole: DictConfig) -> dict[str, object]:
    """What a file sets under hydra.sweeper.params."""
    found = OmegaConf.to_container(OmegaConf.create(OmegaConf.select(whole, "hydra.sweeper.params") or {}))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def store_seed(name: str, options: Sequence[str]) -> bool:
    """Make an option of the group `seed` out of an integer, unless there is one of that name already.

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
    if file and full_key and full_key[1] == file[1].partition("/")[0]:
        return f'{file[1]}.yaml: expected "# @package _global_" as its first line, without which its keys have no place'
    if file and file[1] != "./local" and re.search("full_key: ?$", text, re.MULTILINE):
        return f"{file[1]}.yaml: expected sections and their keys ({text.splitlines()[1]})"
    override = re.match(r"(?:Error merging override|Could not override) '?([\w./@]+)", text)
    if override and override[1].startswith("hydra") and error.__cause__:
        return f"{override[1]}: {first_line(error.__cause__)}; --cfg hydra shows what there is"
    if missing := re.match(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]}: expected a value, got ???"
    if full_key and not full_key[1].startswith("hydra"):
        field = keys.field_of(full_key[1])
        if field is None:
            return keys.unknown(full_key[1], ()) + place
        value = re.search(r"Value '(.*?)'", text)
        got = f", got {value[1]!r}" if value else ""
        return f"{full_key[1]}: expected {accepted(field)}{got}{place}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        return keys.unknown_option(group, option, error.options)
    if file and file[1] == "./local":
        return 'local.yaml: expected "# @package _global_" as its first line, without which its keys have no place'
    return first_line(Exception(text))
